// Reductions on a GPU: pooling a sequence's rows, and the negative log-likelihood of target tokens.
#include "backend_impl.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Mapping: a block for each sequence, threads along a row. Reduction order: rows in ascending order.
__global__ void pool_kernel(float* out, const float* x, const int32_t* row_begin, int64_t n, bool mean) {
    const int64_t first = row_begin[blockIdx.x], last = mean ? row_begin[blockIdx.x + 1] : first + 1;
    const float factor = 1.0f / static_cast<float>(last - first);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        float sum = x[first * n + i];
        for (int64_t r = first + 1; r < last; ++r) sum += x[r * n + i];
        out[blockIdx.x * n + i] = mean ? sum * factor : sum;
    }
}

// Mapping: a block for each row, thread t takes elements t, t + kThreads, ... Reduction order: a thread's
// elements, the lanes of a warp from the last to the first, the warps in order; in double.
// Shared memory bytes: 12 * kWarps.
__global__ void nll_kernel(float* out, const float* logits, const int32_t* target, int64_t n) {
    const float* const row = logits + blockIdx.x * n;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    REFRAG_SHARED(float, largest_of, kWarps);
    REFRAG_SHARED(double, sum_of, kWarps);
    float largest = -INFINITY;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) largest = fmaxf(largest, row[i]);
    largest = warp_max(largest);
    if (lane == 0) largest_of[warp] = largest;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, largest_of[w]);
    // Without a finite maximum nothing is subtracted, and inf and NaN come out as the formula says.
    const float shift = isinf(largest) ? 0.0f : largest;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += static_cast<double>(expf(row[i] - shift));
    for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_down_sync(kAllLanes, sum, d);
    if (lane == 0) sum_of[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += sum_of[w];
    const double log_sum = log(sum) + static_cast<double>(shift);
    out[blockIdx.x] = static_cast<float>(log_sum - static_cast<double>(row[target[blockIdx.x]]));
}

}  // namespace

void CudaBackend::pool(Tensor out, Tensor x, const Batch& batch, Pooling pooling) {
    REFRAG_DCHECK(out.rows == batch.n_seq && out.cols == x.cols);
    if (out.empty()) return;
    CUDA_CHECK(launch(pool_kernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream_,
                      out.f32(), x.f32(), batch.row_begin, x.cols, pooling == Pooling::mean));
}

void CudaBackend::nll(Tensor out, Tensor logits, const int32_t* target) {
    REFRAG_DCHECK(out.size() == logits.rows);
    if (logits.empty()) return;
    CUDA_CHECK(launch(nll_kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream_,
                      out.f32(), logits.f32(), target, logits.cols));
}

}  // namespace refrag::REFRAG_CUDA
