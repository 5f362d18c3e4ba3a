// See pooling.h.
#include "refrag/pooling.h"

#include <cmath>

namespace refrag {

void make_unit(std::vector<float>& vector) {
    double squares = 0.0;
    for (const float value : vector) squares += static_cast<double>(value) * static_cast<double>(value);
    const double scale = squares > 0.0 ? 1.0 / std::sqrt(squares) : 0.0;
    for (float& value : vector) value = static_cast<float>(static_cast<double>(value) * scale);
}

std::vector<float> mean_direction(std::span<const float> rows, int64_t dim) {
    if (rows.empty() || dim == 0) return {};
    std::vector<double> sum(static_cast<size_t>(dim));
    for (size_t i = 0; i < rows.size(); ++i) sum[i % sum.size()] += static_cast<double>(rows[i]);
    std::vector<float> mean(sum.size());
    for (size_t i = 0; i < sum.size(); ++i) mean[i] = static_cast<float>(sum[i]);
    make_unit(mean);
    return mean;
}

}  // namespace refrag
