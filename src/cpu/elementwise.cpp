// Element-by-element ops on the CPU: add, exact GELU, tanh, and SwiGLU's gated SiLU.
#include "cpu/backend_impl.h"
#include "cpu/scalar_math.h"

namespace refrag {
namespace {

// Relative cost of an element against a load and store, for deciding whether threads are worth it.
constexpr double kAddCost = 1.0;
constexpr double kExpCost = 4.0;

}  // namespace

// ---- scalar loops -------------------------------------------------------------------------------------

void scalar::add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

void scalar::gelu(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = math::gelu(x[i]);
}

void scalar::tanh(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = math::tanh(x[i]);
}

void scalar::silu_mul(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + math::exp(-gate[i])) * up[i];
}

// ---- ops ----------------------------------------------------------------------------------------------

void CpuBackend::add(Tensor x, Tensor y) {
    REFRAG_DCHECK(y.cols == x.cols && (y.rows == x.rows || y.rows == 1));
    const int64_t cols = x.cols;
    const int64_t y_step = y.rows == 1 ? 0 : cols;
    parallel(x.rows, kAddCost * static_cast<double>(cols), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) kernels_.add(x.f32() + r * cols, y.f32() + r * y_step, cols);
    });
}

void CpuBackend::gelu(Tensor x) {
    parallel(
        x.size(), kExpCost, [&](int64_t begin, int64_t end) { kernels_.gelu(x.f32() + begin, end - begin); },
        kPanel);
}

void CpuBackend::tanh(Tensor x) {
    parallel(
        x.size(), kExpCost, [&](int64_t begin, int64_t end) { kernels_.tanh(x.f32() + begin, end - begin); },
        kPanel);
}

void CpuBackend::silu_mul(Tensor gate, Tensor up) {
    REFRAG_DCHECK(gate.rows == up.rows && gate.cols == up.cols);
    parallel(
        gate.size(), kExpCost,
        [&](int64_t begin, int64_t end) {
            kernels_.silu_mul(gate.f32() + begin, up.f32() + begin, end - begin);
        },
        kPanel);
}

}  // namespace refrag
