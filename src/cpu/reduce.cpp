// Reductions on the CPU: pooling a sequence's rows, and the negative log-likelihood of target tokens.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/backend_impl.h"
#include "cpu/scalar_math.h"

namespace refrag {
namespace {

constexpr double kSoftmaxCost = 2.0;
constexpr double kTopCost = 8.0;

}  // namespace

float scalar::max(const float* x, int64_t n) {
    float largest = x[0];
    for (int64_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

double scalar::sum_exp(const float* x, int64_t n, float shift) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(math::exp(x[i] - shift));
    return sum;
}

void scalar::scale(float* out, const float* x, float factor, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

void CpuBackend::pool(Tensor out, Tensor x, const Batch& batch, Pooling pooling) {
    const int64_t n = x.cols;
    REFRAG_DCHECK(out.rows == batch.n_seq && out.cols == n);
    if (batch.n_seq == 0) return;
    const double rows = pooling == Pooling::cls ? 1.0 : static_cast<double>(x.rows) / batch.n_seq;
    parallel(batch.n_seq, rows * static_cast<double>(n), [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
            const int64_t first = batch.row_begin[s], last = batch.row_begin[s + 1];
            REFRAG_DCHECK(first < last);
            float* to = out.f32() + s * n;
            std::copy_n(x.f32() + first * n, n, to);
            if (pooling == Pooling::cls) continue;
            for (int64_t r = first + 1; r < last; ++r) kernels_.add(to, x.f32() + r * n, n);
            kernels_.scale(to, to, 1.0f / static_cast<float>(last - first), n);
        }
    });
}

void CpuBackend::nll(Tensor out, Tensor logits, const int32_t* target) {
    const int64_t n = logits.cols;
    REFRAG_DCHECK(out.size() == logits.rows);
    if (n == 0) return;
    parallel(logits.rows, kSoftmaxCost * static_cast<double>(n), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const float* row = logits.f32() + r * n;
            REFRAG_DCHECK(target[r] >= 0 && target[r] < n);
            // Without a finite maximum nothing is subtracted, and inf and NaN come out as the formula says.
            const float largest = kernels_.max(row, n);
            const float shift = std::isfinite(largest) ? largest : 0.0f;
            const double log_sum = std::log(kernels_.sum_exp(row, n, shift)) + static_cast<double>(shift);
            out.f32()[r] = static_cast<float>(log_sum - static_cast<double>(row[target[r]]));
        }
    });
}

void CpuBackend::top_logits(Tensor values, int32_t* ids, Tensor logits) {
    const int64_t n = values.cols, cols = logits.cols;
    REFRAG_DCHECK(values.rows == logits.rows && n >= 1 && n <= kMaxTopLogits && n <= cols);
    parallel(logits.rows, kTopCost * static_cast<double>(cols), [&](int64_t begin, int64_t end) {
        std::vector<int32_t> order(static_cast<size_t>(cols));
        for (int64_t r = begin; r < end; ++r) {
            const float* row = logits.f32() + r * cols;
            const auto before = [row](int32_t a, int32_t b) {
                const bool a_nan = std::isnan(row[a]), b_nan = std::isnan(row[b]);
                if (a_nan != b_nan) return a_nan;
                return a_nan || row[a] == row[b] ? a < b : row[a] > row[b];
            };
            std::iota(order.begin(), order.end(), 0);
            std::partial_sort(order.begin(), order.begin() + n, order.end(), before);
            for (int64_t i = 0; i < n; ++i) {
                ids[r * n + i] = order[static_cast<size_t>(i)];
                values.f32()[r * n + i] = row[ids[r * n + i]];
            }
        }
    });
}

}  // namespace refrag
