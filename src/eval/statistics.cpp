// See statistics.h.
#include "eval/statistics.h"

#include <cmath>
#include <numbers>
#include <vector>

#include "base/check.h"

namespace refrag {
namespace {

// P(|T| <= sqrt(df) * tan(theta)): a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
double central_probability(double theta, int64_t df) {
    const double cos2 = std::cos(theta) * std::cos(theta);
    const bool odd = df % 2 != 0;
    double term = odd ? std::cos(theta) : 1.0;
    double sum = 0.0;
    for (int64_t j = 1; j <= df / 2; ++j) {
        sum += term;
        const auto twice = static_cast<double>(2 * j);
        term *= cos2 * (odd ? twice / (twice + 1.0) : (twice - 1.0) / twice);
    }
    const double part = std::sin(theta) * sum;
    return odd ? (theta + part) * 2.0 / std::numbers::pi : part;
}

}  // namespace

Mean mean_of(std::span<const double> values) {
    REFRAG_DCHECK(!values.empty());
    const auto n = static_cast<double>(values.size());
    Mean mean;
    for (const double value : values) mean.value += value;
    mean.value /= n;
    double squares = 0.0;
    for (const double value : values) squares += (value - mean.value) * (value - mean.value);
    if (values.size() > 1) mean.standard_error = std::sqrt(squares / (n - 1.0) / n);
    return mean;
}

PairedDifference paired_difference(std::span<const double> values, std::span<const double> base) {
    REFRAG_DCHECK(values.size() == base.size());
    std::vector<double> differences(values.begin(), values.end());
    for (size_t i = 0; i < base.size(); ++i) differences[i] -= base[i];
    const Mean mean = mean_of(differences);
    PairedDifference result{mean.value, {}};
    if (mean.standard_error) result.ci95 = student_t_95(std::ssize(differences) - 1) * *mean.standard_error;
    return result;
}

double student_t_95(int64_t degrees_of_freedom) {
    REFRAG_DCHECK(degrees_of_freedom >= 1);
    const auto df = static_cast<double>(degrees_of_freedom);
    if (degrees_of_freedom > 1000) {
        // The expansion around the normal quantile (26.7.5); the first term left out is below 2 / df^4.
        constexpr double z = 1.959963984540054;
        constexpr double z2 = z * z;
        constexpr double first = z * (z2 + 1.0) / 4.0;
        constexpr double second = z * ((5.0 * z2 + 16.0) * z2 + 3.0) / 96.0;
        constexpr double third = z * (((3.0 * z2 + 19.0) * z2 + 17.0) * z2 - 15.0) / 384.0;
        return z + (first + (second + third / df) / df) / df;
    }
    // Bisection on the angle, down to a double's last bits.
    double low = 0.0;
    double high = std::numbers::pi / 2.0;
    for (int step = 0; step < 60; ++step) {
        const double middle = (low + high) / 2.0;
        (central_probability(middle, degrees_of_freedom) < 0.95 ? low : high) = middle;
    }
    return std::sqrt(df) * std::tan((low + high) / 2.0);
}

}  // namespace refrag
