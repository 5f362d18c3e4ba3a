// RMSNorm, LayerNorm and the L2 norm on the CPU, row by row. LayerNorm takes two passes: the mean first, then
// the squared distances from it, so that a large mean costs no digits.
#include <algorithm>
#include <cmath>

#include "cpu/backend_impl.h"

namespace refrag {
namespace {

constexpr double kNormCost = 2.0;

}  // namespace

// ---- scalar loops: sums in double, where the vector loops have many partial sums ------------------------

void scalar::rms_norm(float* out, const float* x, const float* weight, int64_t n, float eps) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    const float inverse = 1.0f / std::sqrt(static_cast<float>(sum / static_cast<double>(n)) + eps);
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

void scalar::layer_norm(float* out, const float* x, const float* weight, const float* bias, int64_t n,
                        float eps) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]);
    const auto mean = static_cast<float>(sum / static_cast<double>(n));
    double squares = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const float d = x[i] - mean;
        squares += static_cast<double>(d) * static_cast<double>(d);
    }
    const float inverse = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(n)) + eps);
    for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

void scalar::l2_normalize(float* x, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    const auto length = static_cast<float>(std::sqrt(sum));
    const float divisor = length < 1e-12f ? 1e-12f : length;  // a NaN stays
    for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

// ---- ops ----------------------------------------------------------------------------------------------

void CpuBackend::rms_norm(Tensor out, Tensor x, Tensor weight, float eps) {
    REFRAG_DCHECK(out.rows == x.rows && out.cols == x.cols && weight.size() == x.cols);
    const int64_t n = x.cols;
    parallel(x.rows, kNormCost * static_cast<double>(n), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            kernels_.rms_norm(out.f32() + r * n, x.f32() + r * n, weight.f32(), n, eps);
        }
    });
}

void CpuBackend::layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) {
    REFRAG_DCHECK(out.rows == x.rows && out.cols == x.cols);
    REFRAG_DCHECK(weight.size() == x.cols && bias.size() == x.cols);
    const int64_t n = x.cols;
    parallel(x.rows, kNormCost * static_cast<double>(n), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            kernels_.layer_norm(out.f32() + r * n, x.f32() + r * n, weight.f32(), bias.f32(), n, eps);
        }
    });
}

void CpuBackend::l2_normalize(Tensor x) {
    parallel(x.rows, kNormCost * static_cast<double>(x.cols), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) kernels_.l2_normalize(x.f32() + r * x.cols, x.cols);
    });
}

}  // namespace refrag
