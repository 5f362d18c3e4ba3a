// Attention of the sequences without a cache: every row sees all rows of its sequence. Made for thousands of
// sequences of 16 to 64 rows in one launch. It is right for any length, but slow for long ones: warps do not
// share K and V in shared memory.
//
// A warp is on its own. It takes 16 query rows of a head and reads K and V, 16 entries at a time, straight
// into mma's fragments, 16 bytes a read. For that, column i of a fragment does not hold element i of a row.
// A product does not mind in which place an element is summed, as long as both operands agree. And the store
// knows which element of the output stands in which column.
//
// q * scale * log2 e, k, v and the softmax's powers are rounded to 16 bits before they are multiplied, sums
// are fp32. K and V of rows beyond the sequence's end are not read: they are 0.
#include "attention.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 16;     // of a warp
constexpr int kEntries = 16;  // of a step
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kNone = -INFINITY;

// n floats, as 8- or 16-byte reads or writes.
template <int n>
struct Vector;
template <>
struct Vector<2> {
    float x[2];
    __device__ __forceinline__ void read(const float* from) {
        const float2 v = *reinterpret_cast<const float2*>(from);
        x[0] = v.x;
        x[1] = v.y;
    }
};
template <>
struct Vector<4> {
    float x[4];
    __device__ __forceinline__ void read(const float* from) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        x[0] = v.x;
        x[1] = v.y;
        x[2] = v.z;
        x[3] = v.w;
    }
};

// Mapping: a warp for 16 rows of one (sequence, query head); warps count blocks of 16 rows, then query heads,
//   then sequences, so that those of a sequence share K and V in L1. 4 warps to a block, which know nothing
//   of each other.
// Reduction order: steps of 16 entries from the sequence's first. Of a step and row: the maximum; p's sum in
//   each of the 4 lanes that hold the row, joined at the end of all steps; P V over the step as mma sums.
// Shared memory bytes: 0.
// Alignment: q, k, v and out 16 bytes.
// Bound by: memory, for sequences of up to about 64 rows; reads of K and V from L1 and L2 for longer ones.
template <typename T, int kDim>
__global__ void __launch_bounds__(kWarps* kWarp) encoder_kernel(AttentionArgs a, int32_t n_tiles) {
    const auto warp = static_cast<int32_t>(blockIdx.x) * kWarps + static_cast<int32_t>(threadIdx.x) / kWarp;
    const int32_t first_row = warp % n_tiles * kRows, query_head = warp / n_tiles % a.n_heads;
    const int32_t seq = warp / n_tiles / a.n_heads;
    if (seq >= a.n_seq || a.slot[seq] >= 0) return;
    const int32_t begin = a.row_begin[seq], rows = a.row_begin[seq + 1] - begin;
    if (first_row >= rows) return;

    // A lane holds, of every 16 x 8 tile, the columns 2 pair and 2 pair + 1 of the rows `row` and `row` + 8.
    const int lane = static_cast<int>(threadIdx.x) % kWarp, pair = lane % 4 * 2, column = lane / 4;
    const int32_t row = first_row + lane / 4;
    const int64_t q_stride = static_cast<int64_t>(a.n_heads) * kDim;
    const int64_t k_stride = static_cast<int64_t>(a.n_kv_heads) * kDim;
    const float* const k = a.k + begin * k_stride + query_head / a.group() * kDim;
    const float* const v = a.v + begin * k_stride + query_head / a.group() * kDim;

    // In the product of q and k, the 16 elements of a step over head_dim are summed in this order: the lanes
    // of pair 0, 2, 4, 6 have four each, one behind the other in memory.
    uint32_t q[kDim / 16][4];
    const float factor = a.scale * kLog2e;
    REFRAG_UNROLL
    for (int i = 0; i < 2; ++i) {
        const bool valid = row + 8 * i < rows;
        const float* const from =
            a.q + (begin + (valid ? row + 8 * i : first_row)) * q_stride + query_head * kDim + pair * 2;
        REFRAG_UNROLL
        for (int d = 0; d < kDim / 16; ++d) {
            Vector<4> x{};
            if (valid) x.read(from + d * 16);
            q[d][i] = T::pack(x.x[0] * factor, x.x[1] * factor);
            q[d][i + 2] = T::pack(x.x[2] * factor, x.x[3] * factor);
        }
    }

    // Of V and the output, kWide tiles of 8 columns go together: column c of the j-th is element
    // c * kWide + j of 8 * kWide.
    constexpr int kWide = kDim % 32 == 0 ? 4 : 2;
    static_assert(kDim % (8 * kWide) == 0);
    float acc[kDim / 8][4] = {}, m[2] = {kNone, kNone}, l[2] = {};
    for (int32_t first = 0; first < rows; first += kEntries) {
        // V is asked for before K is used.
        Vector<4> keys[2][kDim / 16];
        REFRAG_UNROLL
        for (int n = 0; n < 2; ++n) {
            const int32_t e = first + n * 8 + column;
            REFRAG_UNROLL
            for (int d = 0; d < kDim / 16; ++d) {
                keys[n][d] = {};
                if (e < rows) keys[n][d].read(k + e * k_stride + d * 16 + pair * 2);
            }
        }
        Vector<kWide> values[4][kDim / (8 * kWide)];
        REFRAG_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int32_t e = first + i / 2 * 8 + pair + i % 2;
            REFRAG_UNROLL
            for (int d = 0; d < kDim / (8 * kWide); ++d) {
                values[i][d] = {};
                if (e < rows) values[i][d].read(v + e * k_stride + d * 8 * kWide + column * kWide);
            }
        }

        float s[2][4] = {};
        REFRAG_UNROLL
        for (int d = 0; d < kDim / 16; ++d) {
            REFRAG_UNROLL
            for (int n = 0; n < 2; ++n) {
                const float(&x)[4] = keys[n][d].x;
                const uint32_t b[2] = {T::pack(x[0], x[1]), T::pack(x[2], x[3])};
                T::mma(s[n], q[d], b);
            }
        }
        if (first + kEntries > rows) {
            REFRAG_UNROLL
            for (int n = 0; n < 2; ++n) {
                REFRAG_UNROLL
                for (int i = 0; i < 4; ++i) {
                    if (first + n * 8 + pair + i % 2 >= rows) s[n][i] = kNone;
                }
            }
        }

        REFRAG_UNROLL
        for (int i = 0; i < 2; ++i) {
            float most = fmaxf(fmaxf(s[0][2 * i], s[0][2 * i + 1]), fmaxf(s[1][2 * i], s[1][2 * i + 1]));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
            most = fmaxf(most, m[i]);
            // While all scores are -inf, subtracting their maximum would make NaN of what may still become
            // finite. (A NaN score is no maximum, but its power is NaN.)
            const float shift = most == kNone ? 0.0f : most, keep = power_of_2(m[i] - shift);
            m[i] = most;
            float sum = 0.0f;
            REFRAG_UNROLL
            for (int n = 0; n < 2; ++n) {
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

        const uint32_t p[4] = {T::pack(s[0][0], s[0][1]), T::pack(s[0][2], s[0][3]),
                               T::pack(s[1][0], s[1][1]), T::pack(s[1][2], s[1][3])};
        REFRAG_UNROLL
        for (int d = 0; d < kDim / (8 * kWide); ++d) {
            REFRAG_UNROLL
            for (int j = 0; j < kWide; ++j) {
                const uint32_t b[2] = {T::pack(values[0][d].x[j], values[1][d].x[j]),
                                       T::pack(values[2][d].x[j], values[3][d].x[j])};
                T::mma(acc[d * kWide + j], p, b);
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
        float* const to = a.out + (begin + row + 8 * i) * q_stride + query_head * kDim + pair * kWide;
        REFRAG_UNROLL
        for (int d = 0; d < kDim / (8 * kWide); ++d) {
            float x[2 * kWide];
            REFRAG_UNROLL
            for (int j = 0; j < 2 * kWide; ++j)
                x[j] = acc[d * kWide + j % kWide][2 * i + j / kWide] * inverse;
            REFRAG_UNROLL
            for (int j = 0; j < 2 * kWide; j += 4) {
                *reinterpret_cast<float4*>(to + d * 8 * kWide + j) =
                    make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
            }
        }
    }
}

template <typename T, int kDim>
void encode(const AttentionArgs& args, cudaStream_t stream) {
    const int64_t n_tiles = ceil_div(args.max_rows, kRows), warps = n_tiles * args.n_seq * args.n_heads;
    if (warps == 0) return;
    REFRAG_CHECK(warps <= INT32_MAX - kWarps, Status::runtime, "attention of ", args.n_seq,
                 " sequences of up to ", args.max_rows, " rows at once: too many for one launch");
    CUDA_CHECK(launch(encoder_kernel<T, kDim>, dim3{static_cast<unsigned>(ceil_div(warps, kWarps))},
                      dim3{kWarps * kWarp}, 0, stream, args, static_cast<int32_t>(n_tiles)));
}

template <typename T>
void encode(const AttentionArgs& args, cudaStream_t stream) {
    switch (args.head_dim) {
        case 32:
            return encode<T, 32>(args, stream);
        case 64:
            return encode<T, 64>(args, stream);
        case 80:
            return encode<T, 80>(args, stream);
        case 96:
            return encode<T, 96>(args, stream);
        case 128:
            return encode<T, 128>(args, stream);
        default:
            fail(Status::runtime, "no encoder kernel for head_dim ", args.head_dim);
    }
}

}  // namespace

bool encoder_supports(int32_t head_dim) {
    return head_dim == 32 || head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128;
}

void attention_encoder(const AttentionArgs& args, DType rounding, cudaStream_t stream) {
    REFRAG_DCHECK(rounding == DType::bf16 || rounding == DType::f16);
    if (rounding == DType::bf16)
        encode<Bf16>(args, stream);
    else
        encode<F16>(args, stream);
}

}  // namespace refrag::REFRAG_CUDA
