// Weights of 8 bits: symmetric, with a scale for every 32 weights of a row. The rule that turns a row of a
// matrix into them, and how such a row lies in memory between whoever brings it and a backend's make_matrix.
// weights_tools/quantize.py is the same rule in Python, to the bit. How a backend keeps and multiplies them
// is its own business.
//
// A group is 32 neighbouring weights w of a row (the last one may be shorter). Its scale s is the smallest
// F16 number with 127 s >= max |w|, so that no weight is cut off. A weight becomes q = w / s: the quotient,
// and then the integer, are rounded to nearest, ties to even. A group of zeros has scale 0 and q = 0. So q is
// in
// [-127, 127], and |w - q s| is at most s / 2 (and a rounding of the quotient, 127 s / 2^24).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"

namespace refrag {

inline constexpr int64_t kInt8Group = 32;
// A group with a larger weight would need a scale that F16 does not have: 127 times F16's largest number.
inline constexpr float kInt8Largest = 127.0f * 65504.0f;

inline int64_t int8_groups(int64_t in_dim) {
    return (in_dim + kInt8Group - 1) / kInt8Group;
}

// A row: the F16 scales of its groups, then its in_dim values q, then a byte where in_dim is odd, so that the
// next row's scales are aligned.
inline size_t int8_row_bytes(int64_t in_dim) {
    return static_cast<size_t>(int8_groups(in_dim)) * 2 + static_cast<size_t>(in_dim + in_dim % 2);
}
inline const uint16_t* int8_row_scales(const void* row) {
    return static_cast<const uint16_t*>(row);
}
inline const int8_t* int8_row_values(const void* row, int64_t in_dim) {
    return static_cast<const int8_t*>(row) + int8_groups(in_dim) * 2;
}

// Writes a row of in_dim finite values of `dtype` (F32, F16 or BF16) as int8_row_bytes(in_dim) bytes at
// `out`, aligned to 2. Returns in_dim, or, where some |w| > kInt8Largest, the index of the first such weight
// (what lies at `out` is then unspecified).
int64_t quantize_int8_row(void* out, DType dtype, const void* values, int64_t in_dim);

}  // namespace refrag
