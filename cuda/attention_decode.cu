// Attention of the sequences of one row over the KV cache: reading K and V is all the work there is. The
// entries are split, 256 to a block, and the splits' sums joined by log-sum-exp. Splits count from entry 0,
// so a row's result depends neither on the other sequences nor on how many splits the launch provides for.
//
// q * scale * log2 e stays fp32, K and V are widened, softmax and all sums are fp32: there is no gain in
// rounding what never goes through tensor cores. A query group of 8 takes about as long to compute as its K
// and V to read; larger ones go to several blocks, which share K and V in L2.
//
// Lengths are read on the device. The launch depends on the arguments alone, so it may be captured with a
// max_entries beyond the lengths: blocks beyond them return at once.
//
// Entries beyond the length are not read, and no query of a group sees fewer than another: so nothing that a
// row does not see comes near it.
#include <algorithm>
#include <type_traits>

#include "attention.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kMaxDim = 256;
constexpr int kSplitPages = 8;
constexpr int kSplitEntries = kSplitPages * kPageEntries;
constexpr int kMaxWarps = 4;
constexpr int kMaxGroup = 8;  // of one block
// So that three blocks fit on an SM of sm_90, and two on one of sm_80.
constexpr int64_t kSharedBytes = 74 << 10;
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kNone = -INFINITY;

static_assert(kPageEntries == kWarp, "a lane has an entry of a page");

struct F32 {};

template <typename T>
inline constexpr int kBytes = 2;
template <>
inline constexpr int kBytes<F32> = 4;

// n elements of shared memory in one read, widened; 16 bytes of F32 at most.
template <typename T, int n>
__device__ __forceinline__ void read(float (&x)[n], const void* from) {
    static_assert(n * kBytes<T> <= 16);
    if constexpr (std::is_same_v<T, F32>) {
        if constexpr (n == 2) {
            const float2 v = *static_cast<const float2*>(from);
            x[0] = v.x;
            x[1] = v.y;
        } else {
            const float4 v = *static_cast<const float4*>(from);
            x[0] = v.x;
            x[1] = v.y;
            x[2] = v.z;
            x[3] = v.w;
        }
    } else {
        uint32_t pair[n / 2];
        if constexpr (n == 2) {
            pair[0] = *static_cast<const uint32_t*>(from);
        } else if constexpr (n == 4) {
            const uint2 v = *static_cast<const uint2*>(from);
            pair[0] = v.x;
            pair[1] = v.y;
        } else {
            const uint4 v = *static_cast<const uint4*>(from);
            pair[0] = v.x;
            pair[1] = v.y;
            pair[2] = v.z;
            pair[3] = v.w;
        }
        REFRAG_UNROLL
        for (int i = 0; i < n; ++i) x[i] = T::widen(static_cast<uint16_t>(pair[i / 2] >> i % 2 * 16));
    }
}

// A block's dynamic shared memory, in this order: its queries, fp32 [group, head_dim]; for each warp its
// powers, fp32 [32, group]; for each warp a page of K, then a page of V. K's rows take an odd number of
// 16-byte chunks, so that 32 lanes can each read a row of their own without bank conflicts. V's lie as they
// are. At the end a warp's page gives way to its sums.
struct Shared {
    int32_t row_bytes;  // of K and V in memory
    int32_t k_stride;   // bytes
    int32_t page_bytes;
    int32_t powers_at;  // byte offsets
    int32_t pages_at;
    int32_t n_warps;
    int32_t bytes;
};

Shared shared_of(int32_t head_dim, int32_t element_bytes, int32_t group) {
    Shared s{};
    s.row_bytes = head_dim * element_bytes;
    s.k_stride = (s.row_bytes / 16 | 1) * 16;
    s.page_bytes = kPageEntries * (s.k_stride + s.row_bytes);
    s.powers_at = group * head_dim * 4;
    for (s.n_warps = kMaxWarps;; s.n_warps /= 2) {
        s.pages_at = s.powers_at + s.n_warps * kWarp * group * 4;
        s.bytes = s.pages_at + s.n_warps * s.page_bytes;
        if (s.bytes <= kSharedBytes || s.n_warps == 1) return s;
    }
}

int64_t n_splits_of(const AttentionArgs& a) {
    return ceil_div(a.max_entries, kSplitEntries);
}

// Where the sums of (sequence, query head, split) are: acc [head_dim], m, l.
__device__ __forceinline__ float* partial_at(const AttentionArgs& a, float* scratch, int32_t seq,
                                             int32_t query_head, int32_t n_splits, int32_t split) {
    return scratch +
           ((static_cast<int64_t>(seq) * a.n_heads + query_head) * n_splits + split) * (a.head_dim + 2);
}

// While all scores are -inf, subtracting their maximum would make NaN of what may still become finite.
__device__ __forceinline__ float shift_of(float most) {
    return most == kNone ? 0.0f : most;
}

// Mapping: a block of 1, 2 or 4 warps for 256 entries of one (sequence, KV head) and kGroup of its queries;
//   blockIdx.x counts such parts of a group, then splits, then KV heads, then sequences. Warp w takes pages
//   w, w + n_warps, ...: for scores a lane has an entry, for values kDims elements of the output.
// Reduction order: a score over head_dim in order; powers of a page in each lane, joined at the end; values
//   over a warp's entries in order; then over the warps.
// Shared memory bytes: see Shared; 68608 for head_dim 128 in BF16 and a group of 1, 75776 for one of 8.
// Alignment: pages 16 bytes.
// Bound by: memory. A warp asks for its first page of K and V at once. Then it asks for the next K while it
//   computes with V, and for the next V while it computes with K. Three blocks of a group of 1 fit on an SM
//   of sm_90.
template <typename T, int kGroup, int kDims>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kGroup == kMaxGroup ? 2 : 3)
    decode_kernel(AttentionArgs a, Shared layout, float* scratch, int32_t n_splits) {
    auto item = static_cast<int32_t>(blockIdx.x);
    const int32_t n_parts = (a.group() + kGroup - 1) / kGroup;
    const int32_t part = item % n_parts;
    item /= n_parts;
    const int32_t split = item % n_splits;
    item /= n_splits;
    const int32_t kv_head = item % a.n_kv_heads, seq = item / a.n_kv_heads;
    const int32_t begin = a.row_begin[seq], slot = a.slot[seq];
    if (slot < 0 || a.row_begin[seq + 1] - begin != 1) return;

    const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarp, lane = tid % kWarp;
    const int64_t head = a.head(slot, kv_head);
    // Page numbers come along with the length, not after it; those beyond it mean nothing, and are not used.
    const int32_t first_page = split * kSplitPages;
    const int32_t page_number = lane < kSplitPages && first_page + lane < a.max_pages
                                    ? a.page_table[head * a.max_pages + first_page + lane]
                                    : 0;
    const int32_t length = a.length[head], n_entries = length - split * kSplitEntries;
    if (n_entries <= 0) return;
    // Entries of the split that the row does not see; a split without any other is not read.
    const int32_t hidden = a.first_seen(length - 1) - split * kSplitEntries;
    if (hidden >= kSplitEntries) return;

    // ---- copies ---------------------------------------------------------------------------------------
    auto* const shared = dynamic_shared<unsigned char>();
    auto* const query = reinterpret_cast<float*>(shared);
    auto* const powers = reinterpret_cast<float*>(shared + layout.powers_at) + warp * kWarp * kGroup;
    unsigned char* const k = shared + layout.pages_at + warp * layout.page_bytes;
    unsigned char* const v = k + kPageEntries * layout.k_stride;
    const int32_t chunks = layout.row_bytes / 16;
    // Entries of page `index` of the split.
    const auto entries_of = [&](int32_t index) {
        const int32_t n = n_entries - index * kPageEntries;
        return n < kPageEntries ? n : kPageEntries;
    };
    const auto page_at = [&](int32_t index) {
        const int64_t number = __shfl_sync(kAllLanes, page_number, index);
        return static_cast<const unsigned char*>(a.pages) + number * 2 * kPageEntries * layout.row_bytes;
    };
    const auto has = [&](int32_t index) { return index < kSplitPages && entries_of(index) > 0; };
    const auto bring_k = [&](int32_t index) {
        if (has(index)) {
            const unsigned char* const from = page_at(index);
            const int32_t n = entries_of(index) * chunks;
            const int32_t rows_on = kWarp / chunks, columns_on = kWarp % chunks;
            int32_t row = lane / chunks, column = lane % chunks;
            for (int32_t chunk = lane; chunk < n; chunk += kWarp) {
                copy_async_16(k + row * layout.k_stride + column * 16, from + chunk * 16);
                row += rows_on;
                column += columns_on;
                if (column >= chunks) {
                    column -= chunks;
                    ++row;
                }
            }
        }
        copy_async_commit();
    };
    const auto bring_v = [&](int32_t index) {
        if (has(index)) {
            const unsigned char* const from = page_at(index) + kPageEntries * layout.row_bytes;
            const int32_t n = entries_of(index) * chunks;
            for (int32_t chunk = lane; chunk < n; chunk += kWarp) {
                copy_async_16(v + chunk * 16, from + chunk * 16);
            }
        }
        copy_async_commit();
    };
    bring_k(warp);
    bring_v(warp);

    // ---- queries --------------------------------------------------------------------------------------
    const int32_t query_head = kv_head * a.group() + part * kGroup;
    const int32_t left = a.group() - part * kGroup, n_queries = left < kGroup ? left : kGroup;
    const float factor = a.scale * kLog2e;
    const float* const q = a.q + (static_cast<int64_t>(begin) * a.n_heads + query_head) * a.head_dim;
    for (int32_t i = tid; i < kGroup * a.head_dim; i += static_cast<int32_t>(blockDim.x)) {
        query[i] = i < n_queries * a.head_dim ? q[i] * factor : 0.0f;
    }
    __syncthreads();

    // ---- pages ----------------------------------------------------------------------------------------
    constexpr int kChunk = 16 / kBytes<T>;                                // elements
    constexpr int kPiece = kDims * kBytes < T >> 16 ? kDims / 2 : kDims;  // of V, in one read
    const bool has_elements = lane * kDims < a.head_dim;
    float acc[kGroup][kDims] = {}, m[kGroup], l[kGroup] = {};
    REFRAG_UNROLL
    for (int g = 0; g < kGroup; ++g) m[g] = kNone;
    for (int32_t index = warp; has(index); index += layout.n_warps) {
        const int32_t n = entries_of(index);
        copy_async_wait<1>();
        __syncwarp();
        float s[kGroup] = {};
        if (lane < n) {
            const unsigned char* const row = k + lane * layout.k_stride;
            for (int32_t chunk = 0; chunk < chunks; ++chunk) {
                float x[kChunk];
                read<T>(x, row + chunk * 16);
                REFRAG_UNROLL
                for (int g = 0; g < kGroup; ++g) {
                    REFRAG_UNROLL
                    for (int i = 0; i < kChunk; i += 4) {
                        float y[4];
                        read<F32>(y, query + g * a.head_dim + chunk * kChunk + i);
                        REFRAG_UNROLL
                        for (int j = 0; j < 4; ++j) s[g] += x[i + j] * y[j];
                    }
                }
            }
        }
        REFRAG_UNROLL
        for (int g = 0; g < kGroup; ++g) {
            const bool sees = lane < n && index * kPageEntries + lane >= hidden;
            const float score = sees ? s[g] : kNone;
            const float most = fmaxf(m[g], warp_max(score)), shift = shift_of(most);
            const float keep = exp2f(m[g] - shift), p = exp2f(score - shift);
            m[g] = most;
            l[g] = l[g] * keep + p;
            powers[lane * kGroup + g] = p;
            REFRAG_UNROLL
            for (int i = 0; i < kDims; ++i) acc[g][i] *= keep;
        }
        __syncwarp();
        bring_k(index + layout.n_warps);

        copy_async_wait<1>();
        __syncwarp();
        if (has_elements) {
#if !defined(REFRAG_CUDA_ON_HOST)
#pragma unroll 4
#endif
            for (int32_t e = std::max(hidden - index * kPageEntries, 0); e < n; ++e) {
                float p[kGroup];
                if constexpr (kGroup == 1) {
                    p[0] = powers[e];
                } else if constexpr (kGroup == 2) {
                    read<F32>(p, powers + e * kGroup);
                } else {
                    REFRAG_UNROLL
                    for (int g = 0; g < kGroup; g += 4) {
                        float x[4];
                        read<F32>(x, powers + e * kGroup + g);
                        REFRAG_UNROLL
                        for (int i = 0; i < 4; ++i) p[g + i] = x[i];
                    }
                }
                const unsigned char* const row = v + e * layout.row_bytes + lane * kDims * kBytes<T>;
                REFRAG_UNROLL
                for (int d = 0; d < kDims; d += kPiece) {
                    float x[kPiece];
                    read<T>(x, row + d * kBytes<T>);
                    REFRAG_UNROLL
                    for (int g = 0; g < kGroup; ++g) {
                        REFRAG_UNROLL
                        for (int i = 0; i < kPiece; ++i) acc[g][d + i] += p[g] * x[i];
                    }
                }
            }
        }
        __syncwarp();
        bring_v(index + layout.n_warps);
    }
    copy_async_wait<0>();

    // ---- the warps' sums ------------------------------------------------------------------------------
    // A warp's are [group, head_dim + 2] where its page was: acc, m, l. A warp that had no page has m = -inf
    // and zeros, which add nothing.
    const int32_t sum_floats = a.head_dim + 2;
    auto* const sums = reinterpret_cast<float*>(k);
    REFRAG_UNROLL
    for (int g = 0; g < kGroup; ++g) {
        const float total = warp_sum(l[g]);
        if (has_elements) {
            REFRAG_UNROLL
            for (int i = 0; i < kDims; ++i) sums[g * sum_floats + lane * kDims + i] = acc[g][i];
        }
        if (lane == 0) {
            sums[g * sum_floats + a.head_dim] = m[g];
            sums[g * sum_floats + a.head_dim + 1] = total;
        }
    }
    __syncthreads();
    const auto* const all = reinterpret_cast<const float*>(shared + layout.pages_at);
    const int32_t warp_floats = layout.page_bytes / 4;
    for (int32_t i = tid; i < n_queries * a.head_dim; i += static_cast<int32_t>(blockDim.x)) {
        const int32_t g = i / a.head_dim, d = i % a.head_dim;
        const float* const from = all + g * sum_floats;
        float most = kNone, sum = 0.0f, total = 0.0f;
        for (int32_t w = 0; w < layout.n_warps; ++w) most = fmaxf(most, from[w * warp_floats + a.head_dim]);
        const float shift = shift_of(most);
        for (int32_t w = 0; w < layout.n_warps; ++w) {
            const float* const of = from + w * warp_floats;
            const float weight = exp2f(of[a.head_dim] - shift);
            sum += weight * of[d];
            total += weight * of[a.head_dim + 1];
        }
        if (length <= kSplitEntries) {
            a.out[(static_cast<int64_t>(begin) * a.n_heads + query_head + g) * a.head_dim + d] = sum / total;
            continue;
        }
        float* const to = partial_at(a, scratch, seq, query_head + g, n_splits, split);
        to[d] = sum;
        if (d == 0) {
            to[a.head_dim] = most;
            to[a.head_dim + 1] = total;
        }
    }
}

// Mapping: a block for one (sequence, query head), a thread for an element; blockIdx.x counts heads, then
//   sequences. Rows of one split have been written already.
// Reduction order: over the splits, in order.
// Shared memory bytes: 0.
// Alignment: 4 bytes.
// Bound by: latency.
__global__ void __launch_bounds__(kMaxDim) combine_kernel(AttentionArgs a, float* scratch, int32_t n_splits) {
    const auto item = static_cast<int32_t>(blockIdx.x);
    const int32_t query_head = item % a.n_heads, seq = item / a.n_heads;
    const int32_t begin = a.row_begin[seq], slot = a.slot[seq];
    if (slot < 0 || a.row_begin[seq + 1] - begin != 1) return;
    const int32_t length = a.length[a.head(slot, query_head / a.group())];
    if (length <= kSplitEntries) return;

    const auto d = static_cast<int32_t>(threadIdx.x), stride = a.head_dim + 2;
    const auto used = static_cast<int32_t>(ceil_div(length, kSplitEntries));
    const int32_t first = a.first_seen(length - 1) / kSplitEntries;
    const float* const from = partial_at(a, scratch, seq, query_head, n_splits, 0);
    float most = kNone;
    for (int32_t s = first + d % kWarp; s < used; s += kWarp)
        most = fmaxf(most, from[s * stride + a.head_dim]);
    most = warp_max(most);
    if (d >= a.head_dim) return;
    const float shift = shift_of(most);
    float sum = 0.0f, total = 0.0f;
#if !defined(REFRAG_CUDA_ON_HOST)
#pragma unroll 8
#endif
    for (int32_t s = first; s < used; ++s) {
        const float weight = exp2f(from[s * stride + a.head_dim] - shift);
        sum += weight * from[s * stride + d];
        total += weight * from[s * stride + a.head_dim + 1];
    }
    a.out[(static_cast<int64_t>(begin) * a.n_heads + query_head) * a.head_dim + d] = sum / total;
}

template <typename T, int kGroup, int kDims>
void decode(const AttentionArgs& args, float* scratch, cudaStream_t stream) {
    const int64_t n_splits = n_splits_of(args), n_parts = ceil_div(args.group(), kGroup);
    const int64_t grid = n_splits * n_parts * args.n_kv_heads * args.n_seq;
    if (grid == 0) return;
    REFRAG_CHECK(grid <= INT32_MAX, Status::runtime, "attention of ", args.n_seq, " sequences over up to ",
                 args.max_entries, " entries: too many for one launch");
    const Shared layout = shared_of(args.head_dim, kBytes<T>, kGroup);
    CUDA_CHECK(launch(decode_kernel<T, kGroup, kDims>, dim3{static_cast<unsigned>(grid)},
                      dim3{static_cast<unsigned>(layout.n_warps * kWarp)}, static_cast<size_t>(layout.bytes),
                      stream, args, layout, scratch, static_cast<int32_t>(n_splits)));
    if (n_splits == 1) return;
    const auto threads = static_cast<unsigned>(ceil_div(args.head_dim, kWarp) * kWarp);
    CUDA_CHECK(launch(combine_kernel, dim3{static_cast<unsigned>(args.n_seq * args.n_heads)}, dim3{threads},
                      0, stream, args, scratch, static_cast<int32_t>(n_splits)));
}

template <typename T, int kGroup>
void decode(const AttentionArgs& args, float* scratch, cudaStream_t stream) {
    if (args.head_dim <= 2 * kWarp)
        decode<T, kGroup, 2>(args, scratch, stream);
    else if (args.head_dim <= 4 * kWarp)
        decode<T, kGroup, 4>(args, scratch, stream);
    else
        decode<T, kGroup, 8>(args, scratch, stream);
}

template <typename T>
void decode(const AttentionArgs& args, float* scratch, cudaStream_t stream) {
    const int32_t group = args.group();
    if (group == 1)
        decode<T, 1>(args, scratch, stream);
    else if (group == 2)
        decode<T, 2>(args, scratch, stream);
    else if (group <= 4)
        decode<T, 4>(args, scratch, stream);
    else
        decode<T, kMaxGroup>(args, scratch, stream);
}

}  // namespace

bool decode_supports(int32_t head_dim, int32_t group) {
    return head_dim >= 8 && head_dim <= kMaxDim && head_dim % 8 == 0 && group >= 1;
}

int64_t decode_scratch_floats(const AttentionArgs& args) {
    const int64_t n_splits = n_splits_of(args);
    return n_splits <= 1 ? 0 : n_splits * args.n_seq * args.n_heads * (args.head_dim + 2);
}

void attention_decode(const AttentionArgs& args, DType kv, float* scratch, cudaStream_t stream) {
    REFRAG_DCHECK(decode_supports(args.head_dim, args.group()));
    switch (kv) {
        case DType::f32:
            return decode<F32>(args, scratch, stream);
        case DType::bf16:
            return decode<Bf16>(args, scratch, stream);
        case DType::f16:
            return decode<F16>(args, scratch, stream);
        default:
            fail(Status::runtime, "no decode kernel for a cache of ", dtype_name(kv));
    }
}

}  // namespace refrag::REFRAG_CUDA
