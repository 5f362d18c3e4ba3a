// Embedding look-ups on the CPU. Rows are read out of the packed matrix that a tied output layer multiplies
// with, so one copy serves both; a row's elements lie a cache line apart there.
#include <algorithm>

#include "cpu/backend_impl.h"

namespace refrag {
namespace {

constexpr double kPackedReadCost = 4.0;

}  // namespace

void CpuBackend::embed(Tensor out, const Matrix& table, const int32_t* source, Tensor vectors) {
    const auto& matrix = dynamic_cast<const PackedMatrix&>(table);
    const int64_t dim = out.cols;
    REFRAG_DCHECK(table.in_dim() == dim);
    parallel(out.rows, kPackedReadCost * static_cast<double>(dim), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* to = out.f32() + r * dim;
            if (source[r] >= 0) {
                REFRAG_DCHECK(source[r] < table.out_dim());
                matrix.copy_row_to(to, source[r]);
            } else {
                const int64_t row = -1 - static_cast<int64_t>(source[r]);
                REFRAG_DCHECK(row < vectors.rows && vectors.cols == dim);
                std::copy_n(vectors.f32() + row * dim, dim, to);
            }
        }
    });
}

void CpuBackend::add_embed(Tensor x, const Matrix& table, const int32_t* ids) {
    const auto& matrix = dynamic_cast<const PackedMatrix&>(table);
    REFRAG_DCHECK(table.in_dim() == x.cols);
    parallel(x.rows, kPackedReadCost * static_cast<double>(x.cols), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            REFRAG_DCHECK(ids[r] >= 0 && ids[r] < table.out_dim());
            matrix.add_row_to(x.f32() + r * x.cols, ids[r]);
        }
    });
}

void CpuBackend::gather_rows(Tensor out, Tensor x, const int32_t* index) {
    REFRAG_DCHECK(out.cols == x.cols);
    const int64_t n = x.cols;
    parallel(out.rows, static_cast<double>(n), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            REFRAG_DCHECK(index[r] >= 0 && index[r] < x.rows);
            std::copy_n(x.f32() + static_cast<int64_t>(index[r]) * n, n, out.f32() + r * n);
        }
    });
}

}  // namespace refrag
