// A view of a dense row-major matrix in some backend's memory. Owns nothing, knows no backend.
// Everything a network passes between ops is a matrix [rows, cols]; a vector is [1, n].
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace refrag {

struct Tensor {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t rows = 0;
    int64_t cols = 0;

    int64_t size() const { return rows * cols; }
    size_t bytes() const { return static_cast<size_t>(size()) * dtype_bytes(dtype); }
    bool empty() const { return rows == 0 || cols == 0; }

    float* f32() const {
        REFRAG_DCHECK(dtype == DType::f32);
        return static_cast<float*>(data);
    }

    // Rows [begin, begin + n) as a view of the same memory.
    Tensor row_slice(int64_t begin, int64_t n) const {
        REFRAG_DCHECK(begin >= 0 && n >= 0 && begin + n <= rows);
        auto* base = static_cast<std::byte*>(data);
        return {base + static_cast<size_t>(begin * cols) * dtype_bytes(dtype), dtype, n, cols};
    }
};

}  // namespace refrag
