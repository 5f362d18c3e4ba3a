// Turns a matrix of floats into one of 8 bits while it is loaded: row by row on its way from where it comes
// into the device's packing, so that no second copy exists at any time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "ops/backend.h"

namespace refrag {

// Values of a matrix that are read at a time, where a row has fewer: few enough that they are still in a
// core's own cache when they are checked or quantised.
inline constexpr int64_t kPieceValues = 1 << 16;

// How the matrices that a network multiplies by are kept: as the file has them, or quantised to I8 where they
// are floats (base/int8.h).
enum class WeightFormat { as_stored, int8 };

// "auto" or "int8"; anything else is an Error(Status::usage) that begins with `option`.
WeightFormat parse_weight_format(const std::string& option, const std::string& word);

// make_matrix(I8) of the matrix that `read` delivers in `dtype` (F32, F16 or BF16). `refuse` is called with
// the place of a weight that is too large for an I8 matrix, and does not return.
std::unique_ptr<Matrix> make_int8_matrix(Device& device, DType dtype, int64_t out_dim, int64_t in_dim,
                                         const RowReader& read,
                                         const std::function<void(int64_t row, int64_t column)>& refuse);

}  // namespace refrag
