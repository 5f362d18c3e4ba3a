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

// What a candidate for the largest logits is: its value's place in the order, then its column.
struct Candidate {
    float value;
    int32_t id;  // -1: none
};

// NaN before everything, then the larger value, then the lower id.
__device__ __forceinline__ bool is_before(const Candidate& a, const Candidate& b) {
    if (a.id < 0 || b.id < 0) return b.id < 0 && a.id >= 0;
    const bool a_nan = isnan(a.value), b_nan = isnan(b.value);
    if (a_nan != b_nan) return a_nan;
    return a_nan || a.value == b.value ? a.id < b.id : a.value > b.value;
}

__device__ __forceinline__ Candidate first_of_warp(Candidate best) {
    for (int d = kWarp / 2; d > 0; d /= 2) {
        Candidate other;
        other.value = __shfl_xor_sync(kAllLanes, best.value, d);
        other.id = __shfl_xor_sync(kAllLanes, best.id, d);
        if (is_before(other, best)) best = other;
    }
    return best;
}

constexpr int kPieceColumns = 4096;

// The first n of the order among a piece of a row: of the logits, or of the pieces' own firsts.
// Mapping: block (piece, row). n rounds, each finding the first of what is behind the round before.
// Reduction order: comparisons alone. Shared memory bytes: 8 * kWarps + 8.
// Bound by: n passes over the piece, which the caches hold.
template <bool kFromLogits>
__global__ void top_kernel(Candidate* out, const float* logits, const Candidate* pieces, int64_t cols,
                           int32_t n) {
    const int64_t row = blockIdx.y,
                  begin = kFromLogits ? static_cast<int64_t>(blockIdx.x) * kPieceColumns : 0;
    const int64_t size = kFromLogits ? min(static_cast<int64_t>(kPieceColumns), cols - begin) : cols;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    REFRAG_SHARED(Candidate, of_warp, kWarps);
    Candidate* const to = out + (row * gridDim.x + blockIdx.x) * n;
    Candidate last{0.0f, -1};
    for (int32_t round = 0; round < n; ++round) {
        Candidate best{0.0f, -1};
        for (int64_t i = threadIdx.x; i < size; i += kThreads) {
            Candidate c;
            if (kFromLogits)
                c = {logits[row * cols + begin + i], static_cast<int32_t>(begin + i)};
            else
                c = pieces[row * cols + i];
            if ((round == 0 || is_before(last, c)) && is_before(c, best)) best = c;
        }
        best = first_of_warp(best);
        if (lane == 0) of_warp[warp] = best;
        __syncthreads();
        best = of_warp[0];
        for (int w = 1; w < kWarps; ++w) {
            if (is_before(of_warp[w], best)) best = of_warp[w];
        }
        if (threadIdx.x == 0) to[round] = best;
        last = best;
        if (best.id < 0) last = {0.0f, INT32_MAX};  // none is left
        __syncthreads();                            // before the next round writes there
    }
}

__global__ void split_candidates_kernel(float* values, int32_t* ids, const Candidate* from, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    values[i] = from[i].value;
    ids[i] = from[i].id;
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

void CudaBackend::top_logits(Tensor values, int32_t* ids, Tensor logits) {
    const auto n = static_cast<int32_t>(values.cols);
    const int64_t rows = logits.rows, n_pieces = ceil_div(logits.cols, kPieceColumns);
    REFRAG_DCHECK(values.rows == rows && n >= 1 && n <= kMaxTopLogits && n <= logits.cols);
    if (rows == 0) return;
    const int64_t of_pieces = rows * n_pieces * n;
    auto* const pieces =
        static_cast<Candidate*>(scratch(top_, static_cast<size_t>(of_pieces + rows * n) * sizeof(Candidate)));
    Candidate* const firsts = pieces + of_pieces;
    const float* const from = logits.f32();
    CUDA_CHECK(launch(top_kernel<true>, dim3(static_cast<unsigned>(n_pieces), static_cast<unsigned>(rows)),
                      dim3(kThreads), 0, stream_, pieces, from, nullptr, logits.cols, n));
    CUDA_CHECK(launch(top_kernel<false>, dim3(1, static_cast<unsigned>(rows)), dim3(kThreads), 0, stream_,
                      firsts, nullptr, static_cast<const Candidate*>(pieces), n_pieces * n, n));
    CUDA_CHECK(launch(split_candidates_kernel, dim3(static_cast<unsigned>(ceil_div(rows * n, kThreads))),
                      dim3(kThreads), 0, stream_, values.f32(), ids, static_cast<const Candidate*>(firsts),
                      rows * n));
}

}  // namespace refrag::REFRAG_CUDA
