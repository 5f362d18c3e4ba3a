// Attention of the sequences of several rows over the KV cache, on tensor cores: scores, a running softmax
// and the sum over values in one pass over the entries. No wgmma: mma.sync runs on every GPU since sm_80.
//
// q * scale * log2 e is rounded to 16 bits, so that scores are exponents of 2; so are the powers before they
// multiply V. All sums are fp32. In F16 the product with q fits wherever q does, as scale * log2 e < 1.
//
// Row i of a call of `rows` rows sees entries [0, length - rows + i], or of those the last `window`. A step
// of 64 entries in which all rows of a block see everything needs no mask. In the other steps, at most two at
// each end of what a block sees, the scores of entries that a row does not see become -inf and their powers
// 0.
//
// A power of 0 is not enough: 0 * V would spread a NaN or an infinity of V to rows that do not see it. So in
// those steps each thread looks through what it copied of V. Where any of it is not finite, all warps of the
// block leave such elements out of the product, and add p * v for each row that sees them. Entries beyond the
// last one that the block sees are never read: their K and V are 0.
//
// The call's own rows are read from the pages too, not from the fp32 k and v they came in. In the pages they
// are rounded already and take half the bytes; and there is one path.
//
// Steps count from entry 0, and a step that a row does not see changes no bit of its sums. So prefill in one
// call and in several give the same bits.
#include <algorithm>
#include <type_traits>

#include "attention.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kWarpRows = 16;
constexpr int kRows = kWarps * kWarpRows;   // of a block
constexpr int kEntries = 2 * kPageEntries;  // of a step
constexpr int kScoreTiles = kEntries / 8;   // mma's columns
// On an SM, as shared memory allows for head_dim 128.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
[[maybe_unused]] constexpr int kBlocks = 2;
#else
[[maybe_unused]] constexpr int kBlocks = 3;
#endif
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kNone = -INFINITY;

// Of two 16-bit floats: the sign bit of each that is infinite or NaN.
template <typename T>
__device__ __forceinline__ uint32_t not_finite(uint32_t pair) {
    constexpr uint32_t unit = std::is_same_v<T, Bf16> ? 0x00800080 : 0x04000400;  // of the exponents
    return ((pair & (0x80008000 - unit)) + unit) & 0x80008000;
}
// The pair with 0 in place of those.
template <typename T>
__device__ __forceinline__ uint32_t finite_part(uint32_t pair) {
    return pair & ~((not_finite<T>(pair) >> 15) * 0xffff);
}

template <int kDim>
struct Tile {
    static constexpr int kChunks = kDim / 8;  // of 16 bytes, to a row
    // Of a row in shared memory, in elements. An odd number of chunks, so that the eight rows of an 8 x 8
    // matrix lie in different banks; and a constant, so that ldmatrix takes its offsets as immediates.
    static constexpr int kStride = kDim + 8;
    static constexpr int kElements = kEntries * kStride;
    static constexpr size_t kSharedBytes = 2 * 2 * kElements * sizeof(uint16_t);
    static_assert(kDim % 16 == 0 && (kStride / 8) % 2 == 1);
    static_assert(kEntries * kChunks % kThreads == 0);
    static constexpr int kCopies = kEntries * kChunks / kThreads;  // of K, and of V, to a thread and step
};

// Adds p[r][e] * V[e][d] for those V of 16 entries that are not finite, to the rows that see them. p: mma's
// left operand; v: the first of the entries; sees, hides: the last entry that each of the lane's two rows
// sees and the first, counted from it.
template <typename T, int kDim>
__device__ __forceinline__ void add_not_finite(float (&acc)[kDim / 8][4], const uint32_t (&p)[4],
                                               const uint16_t* v, const int32_t (&sees)[2],
                                               const int32_t (&hides)[2], int lane) {
    const int column = lane % 4 * 2;
    REFRAG_LOOP
    for (int e = 0; e < 16; ++e) {
        const int holder = (lane & ~3) | e % 8 / 2;
        float weight[2];
        REFRAG_UNROLL
        for (int i = 0; i < 2; ++i) {
            const uint32_t pair = __shfl_sync(kAllLanes, e < 8 ? p[i] : p[2 + i], holder);
            weight[i] = T::widen(static_cast<uint16_t>(pair >> e % 2 * 16));
        }
        REFRAG_UNROLL
        for (int n = 0; n < kDim / 8; ++n) {
            const uint32_t pair =
                *reinterpret_cast<const uint32_t*>(v + e * Tile<kDim>::kStride + n * 8 + column);
            const uint32_t which = not_finite<T>(pair);
            REFRAG_UNROLL
            for (int i = 0; i < 4; ++i) {
                if ((which >> (i % 2 * 16) & 0x8000) == 0 || e > sees[i / 2] || e < hides[i / 2]) continue;
                acc[n][i] += weight[i / 2] * T::widen(static_cast<uint16_t>(pair >> i % 2 * 16));
            }
        }
    }
}

// Mapping: a block of 4 warps for 64 rows of one (sequence, query head), 16 rows to a warp; blockIdx.x counts
//   query heads, then sequences, then blocks of rows from the last to the first, as the last have most to do.
// Reduction order: steps of 64 entries from entry 0. Of a step and row: the maximum; p's sum in each of the 4
//   lanes that hold the row, joined at the end of all steps; P V over 16 entries at a time, as mma sums.
// Shared memory bytes: two steps of K and V with rows of head_dim + 8: 64 * 4 * 2 * (head_dim + 8)
//   (69632 for head_dim 128, so three blocks on an SM of sm_90).
// Alignment: pages 16 bytes, q and out 8.
// Bound by: shared memory reads: a warp's 16 rows use each fragment of K and V once, which allows about half
//   of mma's rate.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kBlocks)
    prefill_kernel(AttentionArgs a, int32_t least_rows, int32_t n_blocks) {
    using Of = Tile<kDim>;
    const auto item = static_cast<int32_t>(blockIdx.x);
    const int32_t first_row = (n_blocks - 1 - item / (a.n_seq * a.n_heads)) * kRows;
    const int32_t seq = item / a.n_heads % a.n_seq, query_head = item % a.n_heads;
    const int32_t begin = a.row_begin[seq], rows = a.row_begin[seq + 1] - begin, slot = a.slot[seq];
    if (slot < 0 || rows < least_rows || first_row >= rows) return;

    const int64_t head = a.head(slot, query_head / a.group());
    const int32_t start = a.length[head] - rows;                          // entries before the call's
    const int32_t n_entries = start + std::min(rows, first_row + kRows);  // that the block's last row sees
    const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarp, lane = tid % kWarp;
    uint16_t* const shared = dynamic_shared<uint16_t>();
    // By the step's parity, so that a warp may set the next step's while another reads this one's.
    REFRAG_SHARED(int32_t, dirty, 2);
    if (tid < 2) dirty[tid] = 0;

    // ---- copies -------------------------------------------------------------------------------------
    const auto* const pages = static_cast<const uint16_t*>(a.pages);
    const int32_t* const table = a.page_table + head * a.max_pages;
    int32_t page[2];  // of the step that is brought next, looked up early
    const auto look_up = [&](int32_t step) {
        REFRAG_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int32_t e = step * kEntries + i * kPageEntries;
            page[i] = e < n_entries ? table[e / kPageEntries] : 0;
        }
    };
    const auto bring = [&](int32_t step) {
        constexpr int64_t half_page = kPageEntries * kDim;
        uint16_t* const k = shared + step % 2 * 2 * Of::kElements;
        const int64_t from[2] = {page[0] * 2 * half_page, page[1] * 2 * half_page - half_page};
        const int32_t n_valid = n_entries - step * kEntries;
        REFRAG_LOOP
        for (int i = 0; i < Of::kCopies; ++i) {
            const int chunk = i * kThreads + tid, e = chunk / Of::kChunks;
            const bool valid = e < n_valid;
            const uint16_t* const at =
                pages + (valid ? (e < kPageEntries ? from[0] : from[1]) + chunk * 8 : 0);
            copy_async_16(k + (chunk + e) * 8, at, valid);
            copy_async_16(k + Of::kElements + (chunk + e) * 8, at + (valid ? half_page : 0), valid);
        }
        copy_async_commit();
    };
    // Steps that no row of the block sees anything of change nothing.
    const int32_t first_step = a.first_seen(start + first_row) / kEntries;
    look_up(first_step);
    bring(first_step);
    look_up(first_step + 1);

    // ---- the warp's rows ------------------------------------------------------------------------------
    // A lane holds, of every 16 x 8 tile, two columns of the rows `row` and `row` + 8.
    const int32_t warp_row = first_row + warp * kWarpRows, row = warp_row + lane / 4;
    const int32_t warp_sees = warp_row < rows ? start + std::min(rows, warp_row + kWarpRows) - 1 : -1;
    uint32_t q[kDim / 16][4];
    const float factor = a.scale * kLog2e;
    REFRAG_UNROLL
    for (int i = 0; i < 2; ++i) {
        const bool valid = row + 8 * i < rows;
        const float* const from =
            a.q + (static_cast<int64_t>(begin + (valid ? row + 8 * i : 0)) * a.n_heads + query_head) * kDim +
            lane % 4 * 2;
        REFRAG_UNROLL
        for (int d = 0; d < kDim / 16; ++d) {
            REFRAG_UNROLL
            for (int j = 0; j < 2; ++j) {
                const float2 x =
                    valid ? *reinterpret_cast<const float2*>(from + d * 16 + j * 8) : make_float2(0.0f, 0.0f);
                q[d][i + 2 * j] = T::pack(x.x * factor, x.y * factor);
            }
        }
    }
    float acc[kDim / 8][4] = {}, m[2] = {kNone, kNone}, l[2] = {};
    // What load_matrix_x4 wants of a lane: of K, two tiles of 8 entries; of V, two of 8 elements.
    const int k_at = (lane / 16 * 8 + lane % 8) * Of::kStride + lane / 8 % 2 * 8;
    const int v_at = (lane / 8 % 2 * 8 + lane % 8) * Of::kStride + lane / 16 * 8;

    __syncthreads();
    for (int32_t step = first_step; step * kEntries < n_entries; ++step) {
        const int32_t first = step * kEntries;
        const uint16_t* const k = shared + step % 2 * 2 * Of::kElements;
        const uint16_t* const v = k + Of::kElements;
        copy_async_wait<0>();
        if (first + kEntries - 1 > start + first_row || first < a.first_seen(n_entries - 1)) {
            uint32_t found = 0;
            REFRAG_LOOP
            for (int i = 0; i < Of::kCopies; ++i) {
                const int chunk = i * kThreads + tid;
                const uint4 x = *reinterpret_cast<const uint4*>(v + (chunk + chunk / Of::kChunks) * 8);
                found |= not_finite<T>(x.x) | not_finite<T>(x.y) | not_finite<T>(x.z) | not_finite<T>(x.w);
            }
            if (found != 0) dirty[step % 2] = 1;
        }
        // The step is there; and all warps are done with the one before, whose place the next one takes.
        __syncthreads();
        if (first + kEntries < n_entries) {
            bring(step + 1);
            look_up(step + 2);
        }
        if (first > warp_sees || first + kEntries <= a.first_seen(start + warp_row)) continue;

        // ---- scores -----------------------------------------------------------------------------------
        float s[kScoreTiles][4] = {};
        REFRAG_UNROLL
        for (int d = 0; d < kDim / 16; ++d) {
            REFRAG_UNROLL
            for (int n = 0; n < kScoreTiles; n += 2) {
                uint32_t b[4];
                load_matrix_x4(b, k + k_at + n * 8 * Of::kStride + d * 16);
                const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                T::mma(s[n], q[d], left);
                T::mma(s[n + 1], q[d], right);
            }
        }
        const int32_t sees[2] = {start + row - first, start + row + 8 - first};
        if (first + kEntries - 1 > start + warp_row) {
            REFRAG_UNROLL
            for (int n = 0; n < kScoreTiles; ++n) {
                REFRAG_UNROLL
                for (int i = 0; i < 4; ++i) {
                    if (n * 8 + lane % 4 * 2 + i % 2 > sees[i / 2]) s[n][i] = kNone;
                }
            }
        }
        const int32_t hides[2] = {a.first_seen(start + row) - first, a.first_seen(start + row + 8) - first};
        if (first < a.first_seen(start + warp_row + kWarpRows - 1)) {
            REFRAG_UNROLL
            for (int n = 0; n < kScoreTiles; ++n) {
                REFRAG_UNROLL
                for (int i = 0; i < 4; ++i) {
                    if (n * 8 + lane % 4 * 2 + i % 2 < hides[i / 2]) s[n][i] = kNone;
                }
            }
        }

        // ---- softmax ----------------------------------------------------------------------------------
        REFRAG_UNROLL
        for (int i = 0; i < 2; ++i) {
            float most = m[i];
            REFRAG_UNROLL
            for (int n = 0; n < kScoreTiles; ++n) most = fmaxf(most, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
            // While all scores are -inf, subtracting their maximum would make NaN of what may still become
            // finite. (A NaN score is no maximum, but its power is NaN.)
            const float shift = most == kNone ? 0.0f : most, keep = power_of_2(m[i] - shift);
            m[i] = most;
            float sum = 0.0f;
            REFRAG_UNROLL
            for (int n = 0; n < kScoreTiles; ++n) {
                REFRAG_UNROLL
                for (int j = 2 * i; j < 2 * i + 2; ++j) {
                    s[n][j] = power_of_2(s[n][j] - shift);
                    sum += s[n][j];
                }
            }
            l[i] = l[i] * keep + sum;
            REFRAG_UNROLL
            for (int n = 0; n < kDim / 8; ++n) {
                acc[n][2 * i] *= keep;
                acc[n][2 * i + 1] *= keep;
            }
        }

        // ---- values -----------------------------------------------------------------------------------
        const bool clean = dirty[step % 2] == 0;
        REFRAG_UNROLL
        for (int e = 0; e < kEntries / 16; ++e) {
            const uint32_t p[4] = {T::pack(s[2 * e][0], s[2 * e][1]), T::pack(s[2 * e][2], s[2 * e][3]),
                                   T::pack(s[2 * e + 1][0], s[2 * e + 1][1]),
                                   T::pack(s[2 * e + 1][2], s[2 * e + 1][3])};
            REFRAG_UNROLL
            for (int n = 0; n < kDim / 8; n += 2) {
                uint32_t b[4];
                load_matrix_x4_trans(b, v + v_at + e * 16 * Of::kStride + n * 8);
                if (!clean) {
                    REFRAG_UNROLL
                    for (uint32_t& pair : b) pair = finite_part<T>(pair);
                }
                const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                T::mma(acc[n], p, left);
                T::mma(acc[n + 1], p, right);
            }
            if (!clean) {
                const int32_t sees_of_these[2] = {sees[0] - e * 16, sees[1] - e * 16};
                const int32_t hides_of_these[2] = {hides[0] - e * 16, hides[1] - e * 16};
                add_not_finite<T, kDim>(acc, p, v + e * 16 * Of::kStride, sees_of_these, hides_of_these,
                                        lane);
            }
        }
    }

    REFRAG_UNROLL
    for (int i = 0; i < 2; ++i) {
        float sum = l[i];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (row + 8 * i >= rows) continue;
        const float inverse = 1.0f / sum;
        float* const to = a.out +
                          (static_cast<int64_t>(begin + row + 8 * i) * a.n_heads + query_head) * kDim +
                          lane % 4 * 2;
        REFRAG_UNROLL
        for (int n = 0; n < kDim / 8; ++n) {
            *reinterpret_cast<float2*>(to + n * 8) =
                make_float2(acc[n][2 * i] * inverse, acc[n][2 * i + 1] * inverse);
        }
    }
}

template <typename T, int kDim>
void prefill(const AttentionArgs& args, int32_t least_rows, cudaStream_t stream) {
    const int64_t n_blocks = ceil_div(args.max_rows, kRows), grid = n_blocks * args.n_seq * args.n_heads;
    if (grid == 0) return;
    REFRAG_CHECK(grid <= INT32_MAX, Status::runtime, "attention of ", args.n_seq, " sequences of up to ",
                 args.max_rows, " rows at once: too many for one launch");
    CUDA_CHECK(launch(prefill_kernel<T, kDim>, dim3{static_cast<unsigned>(grid)}, dim3{kThreads},
                      Tile<kDim>::kSharedBytes, stream, args, least_rows, static_cast<int32_t>(n_blocks)));
}

template <typename T>
void prefill(const AttentionArgs& args, int32_t least_rows, cudaStream_t stream) {
    switch (args.head_dim) {
        case 64:
            return prefill<T, 64>(args, least_rows, stream);
        case 80:
            return prefill<T, 80>(args, least_rows, stream);
        case 96:
            return prefill<T, 96>(args, least_rows, stream);
        case 128:
            return prefill<T, 128>(args, least_rows, stream);
        default:
            fail(Status::runtime, "no prefill kernel for head_dim ", args.head_dim);
    }
}

}  // namespace

bool prefill_supports(int32_t head_dim) {
    return head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128;
}

void attention_prefill(const AttentionArgs& args, DType kv, int32_t least_rows, cudaStream_t stream) {
    REFRAG_DCHECK(kv == DType::bf16 || kv == DType::f16);
    if (kv == DType::bf16)
        prefill<Bf16>(args, least_rows, stream);
    else
        prefill<F16>(args, least_rows, stream);
}

}  // namespace refrag::REFRAG_CUDA
