// Chunk embeddings pooled to one vector for a passage or a question.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace refrag {

// To length 1; zeros stay.
void make_unit(std::vector<float>& vector);
// The mean of rows [n, dim], of length 1; empty without rows.
std::vector<float> mean_direction(std::span<const float> rows, int64_t dim);

}  // namespace refrag
