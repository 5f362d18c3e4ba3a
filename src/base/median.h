// The median of a sample.
#pragma once

#include <algorithm>
#include <vector>

namespace refrag {

// The middle value, or the mean of the two middle ones; 0 of nothing.
inline double median(std::vector<double> values) {
    if (values.empty()) return 0.0;
    std::sort(values.begin(), values.end());
    const size_t half = values.size() / 2;
    return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2.0;
}

}  // namespace refrag
