// Rotary positions and the KV cache's writes on the CPU.
#include <algorithm>
#include <cmath>

#include "cpu/backend_impl.h"

namespace refrag {
namespace {

constexpr double kSinCosCost = 20.0;
constexpr double kRotateCost = 2.0;

}  // namespace

void scalar::rope(float* x, const float* cos_sin, int64_t half) {
    for (int64_t m = 0; m < half; ++m) {
        const float first = x[m], second = x[half + m];
        const float c = cos_sin[m], s = cos_sin[half + m];
        x[m] = first * c - second * s;
        x[half + m] = second * c + first * s;
    }
}

void CpuBackend::rope_table(Tensor cos_sin, const float* position, Tensor inv_freq) {
    const int64_t head_dim = cos_sin.cols, half = head_dim / 2;
    REFRAG_DCHECK(inv_freq.size() == half && head_dim % 2 == 0);
    parallel(cos_sin.rows, kSinCosCost * static_cast<double>(head_dim), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* row = cos_sin.f32() + r * head_dim;
            for (int64_t m = 0; m < half; ++m) {
                // The product rounded to fp32 is the angle; the library reduces angles of any size exactly.
                const float angle = position[r] * inv_freq.f32()[m];
                row[m] = std::cos(angle);
                row[half + m] = std::sin(angle);
            }
        }
    });
}

void CpuBackend::rotate(std::span<const Tensor> tensors, Tensor cos_sin) {
    const int64_t head_dim = cos_sin.cols;
    double cost = 0.0;
    for (const Tensor& x : tensors) {
        REFRAG_DCHECK(x.rows == cos_sin.rows && x.cols % head_dim == 0);
        cost += kRotateCost * static_cast<double>(x.cols);
    }
    parallel(cos_sin.rows, cost, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            for (const Tensor& x : tensors) {
                for (int64_t h = 0; h < x.cols; h += head_dim) {
                    kernels_.rope(x.f32() + r * x.cols + h, cos_sin.f32() + r * head_dim, head_dim / 2);
                }
            }
        }
    });
}

void CpuBackend::rope(Tensor x, Tensor cos_sin) {
    rotate({&x, 1}, cos_sin);
}

void CpuBackend::rope_kv_append(const KvView& kv, int32_t layer, Tensor q, Tensor k, Tensor v, Tensor cos_sin,
                                const Batch& batch) {
    const Tensor both[] = {q, k};
    rotate(both, cos_sin);
    kv_append(kv, layer, k, v, batch);
}

void CpuBackend::kv_append(const KvView& kv, int32_t layer, Tensor k, Tensor v, const Batch& batch) {
    const bool bf16 = kv.dtype == DType::bf16;
    REFRAG_DCHECK(kv.dtype == DType::f32 || (bf16 && kernels_.pack_kv != nullptr));
    REFRAG_DCHECK(k.cols == static_cast<int64_t>(kv.n_kv_heads) * kv.head_dim && v.cols == k.cols);
    REFRAG_DCHECK(k.rows == batch.n_rows && v.rows == batch.n_rows);
    const int64_t dim = kv.head_dim;
    const int64_t page_elements = 2 * kPageEntries * dim;
    const int64_t n_heads = kv.n_kv_heads;
    // One item is one head of one sequence: items touch different pages and lengths.
    const int64_t items = batch.n_seq * n_heads;
    if (items == 0) return;
    const double cost = static_cast<double>(k.size() + v.size()) / static_cast<double>(items);
    parallel(items, cost, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t s = item / n_heads, h = item % n_heads;
            if (batch.slot[s] < 0) continue;
            const int64_t head = kv.head_index(batch.slot[s], layer, static_cast<int32_t>(h));
            int64_t entry = kv.length[head];
            for (int64_t r = batch.row_begin[s], n = 0; r < batch.row_begin[s + 1]; r += n, entry += n) {
                const int64_t first = entry % kPageEntries;
                n = std::min<int64_t>(kPageEntries - first, batch.row_begin[s + 1] - r);
                REFRAG_DCHECK(entry / kPageEntries < kv.max_pages);
                const int64_t page = kv.page_table[head * kv.max_pages + entry / kPageEntries];
                const float* const from_k = k.f32() + r * k.cols + h * dim;
                const float* const from_v = v.f32() + r * v.cols + h * dim;
                if (bf16) {
                    kernels_.pack_kv(static_cast<uint16_t*>(kv.pages) + page * page_elements, first, n,
                                     from_k, k.cols, from_v, v.cols, dim);
                    continue;
                }
                float* to = static_cast<float*>(kv.pages) + page * page_elements + first * dim;
                for (int64_t i = 0; i < n; ++i, to += dim) {
                    std::copy_n(from_k + i * k.cols, dim, to);
                    std::copy_n(from_v + i * v.cols, dim, to + kPageEntries * dim);
                }
            }
            kv.length[head] = static_cast<int32_t>(entry);
        }
    });
}

}  // namespace refrag
