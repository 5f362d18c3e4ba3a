// RMSNorm, LayerNorm and the L2 norm on a GPU, row by row. LayerNorm takes two passes: the mean first, then
// the squared distances from it, so that a large mean costs no digits.
#include "backend_impl.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The sum of every thread's x, in all of them.
// Reduction order: lanes as warp_sum, then the warps' sums likewise, the missing lanes 0.
// Shared memory bytes: 4 * kWarps.
__device__ float block_sum(float x) {
    REFRAG_SHARED(float, of_warp, kWarps);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    x = warp_sum(x);
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    x = warp_sum(lane < kWarps ? of_warp[lane] : 0.0f);
    __syncthreads();  // before a next sum writes there
    return x;
}

// Mapping of all: a block for each row, thread t takes elements t, t + kThreads, ... Reduction order: a
// thread's elements in ascending order, then block_sum. Bound by: memory.
__global__ void rms_norm_kernel(float* out, const float* x, const float* weight, int64_t n, float eps) {
    const float* const row = x + blockIdx.x * n;
    float* const to = out + blockIdx.x * n;
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) squares += row[i] * row[i];
    const float inverse = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(n) + eps);
    for (int64_t i = threadIdx.x; i < n; i += kThreads) to[i] = row[i] * inverse * weight[i];
}

__global__ void layer_norm_kernel(float* out, const float* x, const float* weight, const float* bias,
                                  int64_t n, float eps) {
    const float* const row = x + blockIdx.x * n;
    float* const to = out + blockIdx.x * n;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += row[i];
    const float mean = block_sum(sum) / static_cast<float>(n);
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) squares += (row[i] - mean) * (row[i] - mean);
    const float inverse = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(n) + eps);
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        to[i] = (row[i] - mean) * inverse * weight[i] + bias[i];
    }
}

__global__ void l2_normalize_kernel(float* x, int64_t n) {
    float* const row = x + blockIdx.x * n;
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) squares += row[i] * row[i];
    const float length = sqrtf(block_sum(squares));
    const float divisor = length < 1e-12f ? 1e-12f : length;  // a NaN stays
    for (int64_t i = threadIdx.x; i < n; i += kThreads) row[i] /= divisor;
}

}  // namespace

void CudaBackend::rms_norm(Tensor out, Tensor x, Tensor weight, float eps) {
    REFRAG_DCHECK(out.rows == x.rows && out.cols == x.cols && weight.size() == x.cols);
    if (x.empty()) return;
    CUDA_CHECK(launch(rms_norm_kernel, dim3(static_cast<unsigned>(x.rows)), dim3(kThreads), 0, stream(),
                      out.f32(), x.f32(), weight.f32(), x.cols, eps));
}

void CudaBackend::layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) {
    REFRAG_DCHECK(out.rows == x.rows && out.cols == x.cols);
    REFRAG_DCHECK(weight.size() == x.cols && bias.size() == x.cols);
    if (x.empty()) return;
    CUDA_CHECK(launch(layer_norm_kernel, dim3(static_cast<unsigned>(x.rows)), dim3(kThreads), 0, stream(),
                      out.f32(), x.f32(), weight.f32(), bias.f32(), x.cols, eps));
}

void CudaBackend::l2_normalize(Tensor x) {
    if (x.empty()) return;
    CUDA_CHECK(launch(l2_normalize_kernel, dim3(static_cast<unsigned>(x.rows)), dim3(kThreads), 0, stream(),
                      x.f32(), x.cols));
}

}  // namespace refrag::REFRAG_CUDA
