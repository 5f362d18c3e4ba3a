// What a list of figures, one for each window or question, says: its mean with a standard error, and how far
// it lies from another list over the same windows or questions. Pairs are compared, not means: what makes a
// question hard is hard in both lists and drops out of the difference.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace refrag {

struct Mean {
    double value = 0.0;
    std::optional<double> standard_error;  // sample deviation / sqrt(n); none with fewer than two values
};

// values [n], n >= 1.
Mean mean_of(std::span<const double> values);

struct PairedDifference {
    double mean = 0.0;           // of values[i] - base[i]
    std::optional<double> ci95;  // half width of the mean's 95% interval; none with fewer than two pairs
};

// values, base [n], n >= 1. The interval is Student's: the quantile for n - 1 degrees of freedom times the
// standard error of the differences.
PairedDifference paired_difference(std::span<const double> values, std::span<const double> base);

// The t with P(|T| <= t) = 0.95 for Student's T, degrees_of_freedom >= 1; within 1e-9 of it.
double student_t_95(int64_t degrees_of_freedom);

}  // namespace refrag
