// Attention in fp32, for what tensor cores do not take: networks of F32 weights, and head_dims without a
// kernel of their own. With a cache (of any dtype) or without, prompts and chunks. Nothing is rounded to 16
// bits.
//
// Row i of a call of `rows` rows sees entries [0, length - rows + i] of the cache; without a cache all rows
// of its sequence. A page of 32 entries at a time comes through shared memory: for scores a lane has an
// entry, for values some elements of the output. Where a row does not see all of a page, the others' scores
// become -inf and their values are left out, for 0 * V would spread a NaN or an infinity to rows that do not
// see it.
//
// Pages count from entry 0, and one that a row does not see changes no bit of its sums. So does the place of
// the row in the block: the multiply-adds are written out, whether a page is seen as a whole or not. So
// prefill in one call and in several give the same bits.
#include <algorithm>
#include <type_traits>

#include "attention.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kMaxDim = 256;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kWarpRows = 4;
constexpr int kRows = kWarps * kWarpRows;  // of a block
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kNone = -INFINITY;

static_assert(kPageEntries == kWarp, "a lane has an entry of a page");
static_assert(kWarpRows == 4, "four powers in one read");

struct F32 {};

// Four neighbouring elements; aligned: to what four take.
template <typename T>
__device__ __forceinline__ float4 load_4(const void* from, int64_t at, int32_t n, bool aligned) {
    if constexpr (std::is_same_v<T, F32>) {
        const float* const x = static_cast<const float*>(from) + at;
        if (aligned) return *reinterpret_cast<const float4*>(x);
        return make_float4(x[0], n > 1 ? x[1] : 0.0f, n > 2 ? x[2] : 0.0f, n > 3 ? x[3] : 0.0f);
    } else {
        const uint16_t* const x = static_cast<const uint16_t*>(from) + at;
        if (aligned) {
            const uint2 pairs = *reinterpret_cast<const uint2*>(x);
            return make_float4(
                T::widen(static_cast<uint16_t>(pairs.x)), T::widen(static_cast<uint16_t>(pairs.x >> 16)),
                T::widen(static_cast<uint16_t>(pairs.y)), T::widen(static_cast<uint16_t>(pairs.y >> 16)));
        }
        return make_float4(T::widen(x[0]), n > 1 ? T::widen(x[1]) : 0.0f, n > 2 ? T::widen(x[2]) : 0.0f,
                           n > 3 ? T::widen(x[3]) : 0.0f);
    }
}

// A block's dynamic shared memory, in floats and in this order: its queries [16, padded], a page of K
// [32, k_stride], a page of V [32, padded], each warp's powers [32, 4]. K's rows take an odd number of
// 16-byte chunks, so that 32 lanes can each read a row of their own without bank conflicts.
struct Shared {
    int32_t padded;  // head_dim, up to a multiple of 4
    int32_t k_stride;
    int32_t k_at;
    int32_t v_at;
    int32_t powers_at;
    int32_t floats;
};

Shared shared_of(int32_t head_dim) {
    Shared s{};
    const int32_t chunks = (head_dim + 3) / 4;
    s.padded = chunks * 4;
    s.k_stride = (chunks | 1) * 4;
    s.k_at = kRows * s.padded;
    s.v_at = s.k_at + kPageEntries * s.k_stride;
    s.powers_at = s.v_at + kPageEntries * s.padded;
    s.floats = s.powers_at + kWarps * kPageEntries * kWarpRows;
    return s;
}

// acc[i][d] += the power of row i times V's element, over the page's first entries: of row i seen[i] of them
// but for the first hidden[i], or, where kWhole, all `most`.
template <bool kWhole, int kDims>
__device__ __forceinline__ void add_values(float (&acc)[kWarpRows][kDims], const float* powers,
                                           const float* v, int32_t v_stride, int32_t most,
                                           const int32_t (&seen)[kWarpRows],
                                           const int32_t (&hidden)[kWarpRows]) {
#if !defined(REFRAG_CUDA_ON_HOST)
#pragma unroll 4
#endif
    for (int32_t e = 0; e < most; ++e) {
        const float4 four = *reinterpret_cast<const float4*>(powers + e * kWarpRows);
        const float p[kWarpRows] = {four.x, four.y, four.z, four.w};
        float x[kDims];
        REFRAG_UNROLL
        for (int d = 0; d < kDims; d += 2) {
            const float2 two = *reinterpret_cast<const float2*>(v + e * v_stride + d);
            x[d] = two.x;
            x[d + 1] = two.y;
        }
        REFRAG_UNROLL
        for (int i = 0; i < kWarpRows; ++i) {
            if (!kWhole && (e >= seen[i] || e < hidden[i])) continue;
            REFRAG_UNROLL
            for (int d = 0; d < kDims; ++d) acc[i][d] = __fmaf_rn(p[i], x[d], acc[i][d]);
        }
    }
}

// Mapping: a block of 4 warps for 16 rows of one (sequence, query head), 4 rows to a warp; blockIdx.x counts
//   query heads, then sequences, then blocks of rows from the last to the first, as the last have most to do.
//   kDims: elements of the output to a lane.
// Reduction order: pages of 32 entries from entry 0. A score over head_dim in order; of a page and row the
//   maximum; powers in each lane, joined at the end of all pages; values over the entries in order.
// Shared memory bytes: see Shared; 43520 for head_dim 128.
// Alignment: pages 16 bytes; k, v of rows that divide by 4 elements 16.
// Bound by: fp32 multiply-adds and shared memory reads, 5 of 16 bytes for 16 multiply-adds of scores.
template <typename T, bool kCached, int kDims>
__global__ void __launch_bounds__(kThreads)
    fp32_kernel(AttentionArgs a, Shared layout, int32_t least_rows, int32_t n_blocks) {
    const auto item = static_cast<int32_t>(blockIdx.x);
    const int32_t first_row = (n_blocks - 1 - item / (a.n_seq * a.n_heads)) * kRows;
    const int32_t seq = item / a.n_heads % a.n_seq, query_head = item % a.n_heads;
    const int32_t begin = a.row_begin[seq], rows = a.row_begin[seq + 1] - begin, slot = a.slot[seq];
    if ((slot >= 0) != kCached || rows < least_rows || first_row >= rows) return;

    const int32_t dim = a.head_dim, kv_head = query_head / a.group();
    const int64_t head = kCached ? a.head(slot, kv_head) : 0;
    const int32_t start = kCached ? a.length[head] - rows : 0;  // entries before the call's
    const int32_t n_entries = kCached ? start + std::min(rows, first_row + kRows) : rows;
    const int32_t tid = static_cast<int32_t>(threadIdx.x), warp = tid / kWarp, lane = tid % kWarp;
    float* const shared = dynamic_shared<float>();
    float* const q = shared;
    float* const k = shared + layout.k_at;
    float* const v = shared + layout.v_at;
    float* const powers = shared + layout.powers_at + warp * kPageEntries * kWarpRows;

    // ---- queries, times scale * log2 e
    // ----------------------------------------------------------------------
    const float factor = a.scale * kLog2e;
    for (int32_t i = tid; i < kRows * layout.padded; i += kThreads) {
        const int32_t r = first_row + i / layout.padded, d = i % layout.padded;
        const bool valid = r < rows && d < dim;
        q[i] =
            valid ? a.q[(static_cast<int64_t>(begin + r) * a.n_heads + query_head) * dim + d] * factor : 0.0f;
    }
    const int32_t warp_row = first_row + warp * kWarpRows;
    // Entries that each of the warp's rows sees; rows beyond the last see what the last does, and are not
    // written.
    int32_t sees[kWarpRows];
    REFRAG_UNROLL
    for (int i = 0; i < kWarpRows; ++i) {
        const int32_t r = std::min(warp_row + i, rows - 1);
        sees[i] = kCached ? start + r + 1 : rows;
    }

    const int32_t chunks = layout.padded / 4, rows_on = kThreads / chunks, columns_on = kThreads % chunks;
    const bool aligned = dim % 4 == 0, has_elements = lane * kDims < layout.padded;
    float acc[kWarpRows][kDims] = {}, m[kWarpRows], l[kWarpRows] = {};
    REFRAG_UNROLL
    for (int i = 0; i < kWarpRows; ++i) m[i] = kNone;

    // Pages that no row of the block sees anything of change nothing.
    const int32_t first_seen = kCached ? a.first_seen(start + first_row) : 0;
    for (int32_t first = first_seen / kPageEntries * kPageEntries; first < n_entries; first += kPageEntries) {
        // ---- a page ---------------------------------------------------------------------------------------
        const int32_t n = std::min(n_entries - first, static_cast<int32_t>(kPageEntries));
        const int64_t page = kCached ? a.page_table[head * a.max_pages + first / kPageEntries] : 0;
        __syncthreads();  // all are done with the page before; the queries are there
        int32_t e = tid / chunks, column = tid % chunks;
        while (e < n) {
            const int64_t at =
                kCached
                    ? (page * 2 * kPageEntries + e) * dim + column * 4
                    : (static_cast<int64_t>(begin + first + e) * a.n_kv_heads + kv_head) * dim + column * 4;
            const void* const of_k = kCached ? a.pages : static_cast<const void*>(a.k);
            const void* const of_v = kCached ? a.pages : static_cast<const void*>(a.v);
            const int64_t v_at = kCached ? at + int64_t{kPageEntries} * dim : at;
            *reinterpret_cast<float4*>(k + e * layout.k_stride + column * 4) =
                load_4<T>(of_k, at, dim - column * 4, aligned);
            *reinterpret_cast<float4*>(v + e * layout.padded + column * 4) =
                load_4<T>(of_v, v_at, dim - column * 4, aligned);
            e += rows_on;
            column += columns_on;
            if (column >= chunks) {
                column -= chunks;
                ++e;
            }
        }
        __syncthreads();
        if (warp_row >= rows || first >= sees[kWarpRows - 1]) continue;

        // ---- scores ---------------------------------------------------------------------------------------
        float s[kWarpRows] = {};
        if (lane < n) {
            const float* const row = k + lane * layout.k_stride;
            const float* const own = q + warp * kWarpRows * layout.padded;
            for (int32_t d = 0; d < layout.padded; d += 4) {
                const float4 x = *reinterpret_cast<const float4*>(row + d);
                REFRAG_UNROLL
                for (int i = 0; i < kWarpRows; ++i) {
                    const float4 y = *reinterpret_cast<const float4*>(own + i * layout.padded + d);
                    s[i] = __fmaf_rn(x.x, y.x, s[i]);
                    s[i] = __fmaf_rn(x.y, y.y, s[i]);
                    s[i] = __fmaf_rn(x.z, y.z, s[i]);
                    s[i] = __fmaf_rn(x.w, y.w, s[i]);
                }
            }
        }

        // ---- softmax --------------------------------------------------------------------------------------
        int32_t seen[kWarpRows], hidden[kWarpRows];
        float p[kWarpRows];
        REFRAG_UNROLL
        for (int i = 0; i < kWarpRows; ++i) {
            seen[i] = std::min(n, sees[i] - first);
            hidden[i] = kCached ? a.first_seen(sees[i] - 1) - first : 0;
            const float score = lane < seen[i] && lane >= hidden[i] ? s[i] : kNone;
            // While all scores are -inf, subtracting their maximum would make NaN of what may still become
            // finite. (A NaN score is no maximum, but its power is NaN.)
            const float most = fmaxf(m[i], warp_max(score)), shift = most == kNone ? 0.0f : most;
            const float keep = exp2f(m[i] - shift);
            p[i] = exp2f(score - shift);
            m[i] = most;
            l[i] = __fmaf_rn(l[i], keep, p[i]);
            REFRAG_UNROLL
            for (int d = 0; d < kDims; ++d) acc[i][d] *= keep;
        }
        // The page before's powers have been read: the block has met since.
        *reinterpret_cast<float4*>(powers + lane * kWarpRows) = make_float4(p[0], p[1], p[2], p[3]);
        __syncwarp();

        // ---- values ---------------------------------------------------------------------------------------
        if (!has_elements) continue;
        // sees and hidden rise from row to row.
        if (seen[0] == n && hidden[kWarpRows - 1] <= 0)
            add_values<true>(acc, powers, v + lane * kDims, layout.padded, n, seen, hidden);
        else
            add_values<false>(acc, powers, v + lane * kDims, layout.padded, seen[kWarpRows - 1], seen,
                              hidden);
    }

    REFRAG_UNROLL
    for (int i = 0; i < kWarpRows; ++i) {
        const float sum = warp_sum(l[i]);
        if (warp_row + i >= rows) continue;
        float* const to = a.out +
                          (static_cast<int64_t>(begin + warp_row + i) * a.n_heads + query_head) * dim +
                          lane * kDims;
        REFRAG_UNROLL
        for (int d = 0; d < kDims; ++d) {
            if (lane * kDims + d < dim) to[d] = acc[i][d] / sum;
        }
    }
}

template <typename T, bool kCached>
void compute(const AttentionArgs& args, int32_t least_rows, cudaStream_t stream) {
    const int64_t n_blocks = ceil_div(args.max_rows, kRows), grid = n_blocks * args.n_seq * args.n_heads;
    if (grid == 0) return;
    REFRAG_CHECK(grid <= INT32_MAX, Status::runtime, "attention of ", args.n_seq, " sequences of up to ",
                 args.max_rows, " rows at once: too many for one launch");
    const Shared layout = shared_of(args.head_dim);
    const auto kernel = args.head_dim <= 2 * kWarp   ? fp32_kernel<T, kCached, 2>
                        : args.head_dim <= 4 * kWarp ? fp32_kernel<T, kCached, 4>
                                                     : fp32_kernel<T, kCached, 8>;
    CUDA_CHECK(launch(kernel, dim3{static_cast<unsigned>(grid)}, dim3{kThreads},
                      static_cast<size_t>(layout.floats) * sizeof(float), stream, args, layout, least_rows,
                      static_cast<int32_t>(n_blocks)));
}

}  // namespace

bool fp32_supports(int32_t head_dim) {
    return head_dim >= 1 && head_dim <= kMaxDim;
}

void attention_fp32(const AttentionArgs& args, DType kv, int32_t least_rows, cudaStream_t stream) {
    REFRAG_DCHECK(fp32_supports(args.head_dim));
    switch (kv) {
        case DType::f32:
            return compute<F32, true>(args, least_rows, stream);
        case DType::bf16:
            return compute<Bf16, true>(args, least_rows, stream);
        case DType::f16:
            return compute<F16, true>(args, least_rows, stream);
        default:
            fail(Status::runtime, "no attention kernel for a cache of ", dtype_name(kv));
    }
}

void attention_fp32_uncached(const AttentionArgs& args, cudaStream_t stream) {
    REFRAG_DCHECK(fp32_supports(args.head_dim));
    compute<F32, false>(args, 1, stream);
}

}  // namespace refrag::REFRAG_CUDA
