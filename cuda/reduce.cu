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
constexpr int kSumColumns = 512;  // of a sum: one thread may have to walk through as many

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

// Of a piece of a row: sum exp((l - largest) / temperature), in double.
// Mapping: block (piece, row). Reduction order: a thread's elements, a warp's lanes from the last to the
// first, the warps in order. Shared memory bytes: 8 * kWarps. Bound by: exp in double.
__global__ void piece_sums_kernel(double* out, const float* logits, const Candidate* firsts, int32_t n,
                                  const TokenDraw* draws, int64_t cols) {
    const int64_t row = blockIdx.y, begin = static_cast<int64_t>(blockIdx.x) * kSumColumns;
    const int64_t size = min(static_cast<int64_t>(kSumColumns), cols - begin);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    REFRAG_SHARED(double, of_warp, kWarps);
    const auto largest = static_cast<double>(firsts[row * n].value);
    const auto temperature = static_cast<double>(draws[row].temperature);
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
        sum += exp((static_cast<double>(logits[row * cols + begin + i]) - largest) / temperature);
    }
    for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_down_sync(kAllLanes, sum, d);
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
    out[row * gridDim.x + blockIdx.x] = sum;
}

// Steps 4 to 8 of refrag/sampler.h over a row's n largest logits, or, where nothing is filtered, over all of
// it. Mapping: a block for each row; the choice is thread 0's, the walk through one piece its own warp's.
// Reduction order: sums of probabilities in the order in which the sampler on the host adds them; of a whole
// row, by pieces. Shared memory bytes: 24 * kMaxTopLogits. Bound by: latency.
__global__ void draw_kernel(int32_t* ids, const Candidate* firsts, int32_t n, const double* piece_sums,
                            int32_t n_pieces, const float* logits, int64_t cols, const TokenDraw* draws) {
    constexpr int32_t kMost = Backend::kMaxTopLogits;
    const int64_t row = blockIdx.x;
    const TokenDraw d = draws[row];
    const Candidate* const first = firsts + row * n;
    REFRAG_SHARED(double, p, kMost);
    REFRAG_SHARED(double, q, kMost);
    REFRAG_SHARED(int32_t, id, kMost);
    const auto largest = static_cast<double>(first[0].value),
               temperature = static_cast<double>(d.temperature);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n; i += kThreads) {
        q[i] = exp((static_cast<double>(first[i].value) - largest) / temperature);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    // Not finite: for the host to refuse, by name.
    if (!(fabsf(first[0].value) < INFINITY)) {
        ids[row] = -1;
        return;
    }
    if (d.temperature == 0.0f) {
        ids[row] = first[0].id;
        return;
    }
    const double* const sums = piece_sums + row * n_pieces;
    int32_t kept = 0;  // of the largest, those with p > 0
    while (kept < n && q[kept] > 0.0) ++kept;
    const bool cut = d.top_k > 0 && kept > d.top_k;
    bool complete = cut || kept < n || n == cols;  // whether all that may be drawn are among them
    if (cut) kept = d.top_k;
    const bool sorted = cut || d.top_p < 1.0f;
    // Sorted by probability, or by id.
    for (int32_t i = 0; i < kept; ++i) {
        int32_t at = i;
        if (!sorted) {
            at = 0;
            for (int32_t j = 0; j < kept; ++j) at += first[j].id < first[i].id ? 1 : 0;
        }
        p[at] = q[i];
        id[at] = first[i].id;
    }
    if (d.top_p < 1.0f) {
        double total = 0.0;
        if (complete) {
            for (int32_t i = 0; i < kept; ++i) total += p[i];
        } else {
            for (int32_t i = 0; i < n_pieces; ++i) total += sums[i];
        }
        const double enough = static_cast<double>(d.top_p) * total;
        double sum = 0.0;
        int32_t in = 0;
        while (in < kept && sum < enough) sum += p[in++];
        complete = complete || sum >= enough;
        kept = in;
    }
    if (d.min_p > 0.0f) {
        const auto least = static_cast<double>(d.min_p);
        complete = complete || q[n - 1] < least;
        int32_t in = 0;
        for (int32_t i = 0; i < kept; ++i) {
            if (p[i] < least) continue;
            p[in] = p[i];
            id[in++] = id[i];
        }
        kept = in;
    }
    if (complete) {
        double left = 0.0;
        for (int32_t i = 0; i < kept; ++i) left += p[i];
        left *= d.uniform;
        int32_t chosen = id[kept - 1];
        for (int32_t i = 0; i < kept; ++i) {
            left -= p[i];
            if (left >= 0.0) continue;
            chosen = id[i];
            break;
        }
        ids[row] = chosen;
        return;
    }
    if (d.top_p < 1.0f || d.min_p > 0.0f || d.top_k > 0) {
        ids[row] = -1;
        return;
    }
    // All of the row: the piece, then the token in it.
    double left = 0.0;
    for (int32_t i = 0; i < n_pieces; ++i) left += sums[i];
    left *= d.uniform;
    int32_t piece = 0;
    while (piece + 1 < n_pieces && left >= sums[piece]) left -= sums[piece++];
    const int64_t begin = static_cast<int64_t>(piece) * kSumColumns;
    const int64_t end = min(begin + kSumColumns, cols);
    int64_t chosen = first[0].id;
    for (int64_t i = begin; i < end; ++i) {
        const double weight = exp((static_cast<double>(logits[row * cols + i]) - largest) / temperature);
        if (weight > 0.0) chosen = i;
        left -= weight;
        if (left < 0.0) break;
    }
    ids[row] = static_cast<int32_t>(chosen);
}

}  // namespace

void CudaBackend::pool(Tensor out, Tensor x, const Batch& batch, Pooling pooling) {
    REFRAG_DCHECK(out.rows == batch.n_seq && out.cols == x.cols);
    if (out.empty()) return;
    CUDA_CHECK(launch(pool_kernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream(),
                      out.f32(), x.f32(), batch.row_begin, x.cols, pooling == Pooling::mean));
}

void CudaBackend::nll(Tensor out, Tensor logits, const int32_t* target) {
    REFRAG_DCHECK(out.size() == logits.rows);
    if (logits.empty()) return;
    CUDA_CHECK(launch(nll_kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kThreads), 0, stream(),
                      out.f32(), logits.f32(), target, logits.cols));
}

void* CudaBackend::top_candidates(Tensor logits, int32_t n, size_t more_bytes) {
    const int64_t rows = logits.rows, n_pieces = ceil_div(logits.cols, kPieceColumns);
    const size_t of_firsts = static_cast<size_t>(rows * n) * sizeof(Candidate);
    auto* const firsts = static_cast<Candidate*>(
        scratch(ScratchUse::top,
                of_firsts + more_bytes + static_cast<size_t>(rows * n_pieces * n) * sizeof(Candidate)));
    auto* const pieces =
        reinterpret_cast<Candidate*>(reinterpret_cast<std::byte*>(firsts) + of_firsts + more_bytes);
    const float* const from = logits.f32();
    CUDA_CHECK(launch(top_kernel<true>, dim3(static_cast<unsigned>(n_pieces), static_cast<unsigned>(rows)),
                      dim3(kThreads), 0, stream(), pieces, from, nullptr, logits.cols, n));
    CUDA_CHECK(launch(top_kernel<false>, dim3(1, static_cast<unsigned>(rows)), dim3(kThreads), 0, stream(),
                      firsts, nullptr, static_cast<const Candidate*>(pieces), n_pieces * n, n));
    return firsts;
}

void CudaBackend::top_logits(Tensor values, int32_t* ids, Tensor logits) {
    const auto n = static_cast<int32_t>(values.cols);
    const int64_t rows = logits.rows;
    REFRAG_DCHECK(values.rows == rows && n >= 1 && n <= kMaxTopLogits && n <= logits.cols);
    if (rows == 0) return;
    const auto* const firsts = static_cast<const Candidate*>(top_candidates(logits, n, 0));
    CUDA_CHECK(launch(split_candidates_kernel, dim3(static_cast<unsigned>(ceil_div(rows * n, kThreads))),
                      dim3(kThreads), 0, stream(), values.f32(), ids, firsts, rows * n));
}

void CudaBackend::draw(int32_t* ids, Tensor logits, const TokenDraw* draws) {
    const int64_t rows = logits.rows, n_pieces = ceil_div(logits.cols, kSumColumns);
    if (rows == 0) return;
    const auto n = static_cast<int32_t>(std::min<int64_t>(kMaxTopLogits, logits.cols));
    // The candidates are 8 bytes each, so what follows them is aligned for double.
    void* const top = top_candidates(logits, n, static_cast<size_t>(rows * n_pieces) * sizeof(double));
    const auto* const firsts = static_cast<const Candidate*>(top);
    auto* const sums = reinterpret_cast<double*>(static_cast<Candidate*>(top) + rows * n);
    const float* const from = logits.f32();
    CUDA_CHECK(launch(piece_sums_kernel, dim3(static_cast<unsigned>(n_pieces), static_cast<unsigned>(rows)),
                      dim3(kThreads), 0, stream(), sums, from, firsts, n, draws, logits.cols));
    CUDA_CHECK(launch(draw_kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, stream(), ids,
                      firsts, n, static_cast<const double*>(sums), static_cast<int32_t>(n_pieces), from,
                      logits.cols, draws));
}

}  // namespace refrag::REFRAG_CUDA
