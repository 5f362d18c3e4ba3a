// Element-by-element ops on a GPU: add, exact GELU, tanh, and SwiGLU's gated SiLU.
#include "backend_impl.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

// Mapping of all: a thread for each element, blocks going round where there are more. Bound by: memory.
__device__ __forceinline__ int64_t first_element() {
    return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t element_step() {
    return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

__global__ void add_kernel(float* x, const float* y, int64_t n, int64_t y_size) {
    for (int64_t i = first_element(); i < n; i += element_step()) x[i] += y[y_size == n ? i : i % y_size];
}

__global__ void gelu_kernel(float* x, int64_t n) {
    // Phi(x) as erfc(z) / 2, z = -x / sqrt(2), which does not cancel where x is far below 0. There erfc is so
    // steep that z's rounding, d, shows: erfc(z + d) = erfc(z) - d 2 / sqrt(pi) exp(-z^2).
    constexpr float kRootHalf = 0.70710678118654752f;
    constexpr float kRootHalfRest = 1.21016171e-8f;  // sqrt(1/2) beyond its fp32 value
    for (int64_t i = first_element(); i < n; i += element_step()) {
        const float z = -x[i] * kRootHalf;
        const float d = __fmaf_rn(-x[i], kRootHalf, -z) - x[i] * kRootHalfRest;
        float twice = erfcf(z);
        if (z > 1.0f && z < 11.0f) twice -= d * 1.12837917f * expf(-z * z);
        x[i] = 0.5f * x[i] * twice;
    }
}

__global__ void tanh_kernel(float* x, int64_t n) {
    for (int64_t i = first_element(); i < n; i += element_step()) x[i] = tanhf(x[i]);
}

__global__ void silu_mul_kernel(float* gate, const float* up, int64_t n) {
    for (int64_t i = first_element(); i < n; i += element_step()) {
        gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

dim3 blocks_for(int64_t n) {
    return dim3(static_cast<unsigned>(std::min(kMaxBlocks, ceil_div(n, kThreads))));
}

}  // namespace

void CudaBackend::add(Tensor x, Tensor y) {
    REFRAG_DCHECK(y.cols == x.cols && (y.rows == x.rows || y.rows == 1));
    if (x.empty()) return;
    CUDA_CHECK(launch(add_kernel, blocks_for(x.size()), dim3(kThreads), 0, stream(), x.f32(), y.f32(),
                      x.size(), y.size()));
}

void CudaBackend::gelu(Tensor x) {
    if (x.empty()) return;
    CUDA_CHECK(launch(gelu_kernel, blocks_for(x.size()), dim3(kThreads), 0, stream(), x.f32(), x.size()));
}

void CudaBackend::tanh(Tensor x) {
    if (x.empty()) return;
    CUDA_CHECK(launch(tanh_kernel, blocks_for(x.size()), dim3(kThreads), 0, stream(), x.f32(), x.size()));
}

void CudaBackend::silu_mul(Tensor gate, Tensor up) {
    REFRAG_DCHECK(gate.rows == up.rows && gate.cols == up.cols);
    if (gate.empty()) return;
    CUDA_CHECK(launch(silu_mul_kernel, blocks_for(gate.size()), dim3(kThreads), 0, stream(), gate.f32(),
                      up.f32(), gate.size()));
}

}  // namespace refrag::REFRAG_CUDA
