// Products whose rows do not depend on each other, bit for bit (CudaOptions::deterministic), on tensor cores:
// mma.sync with fp32 sums, activations rounded to 16 bits. I8 weights are exact: whole numbers in bf16, the
// sum of each 32 multiplied by their scale in fp32.
//
// Two kernels, one order. k is cut into 8 slices, which depend on in_dim alone. The sum over a slice goes
// through one function, slice_sum, in steps of 32; the slices' sums are added in order. Where there are few
// rows, which is when reading the weights is all there is to do, a warp has a slice; else it has all of them
// one after the other, of 64 rows. What else is in the tile does not matter: mma's rows and columns are apart
// from each other.
//
// Fragments are read straight from memory, 16 bytes a lane. For that, column i of a fragment does not hold
// element i of a row: a product does not mind, as long as both operands agree.
#include <type_traits>

#include "gemm.cuh"

#include "base/int8.h"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kSlices = 8;
constexpr int kTileRows = 16;     // mma's
constexpr int kTileColumns = 16;  // of a warp: two of mma's 8
constexpr int kManyTiles = 4;     // 64 rows
constexpr int kManyWarps = 4;     // which share the rows; 64 columns

struct I8 {};

// Of 64 rows, on an SM: as registers allow without spilling.
template <typename Type, int kProducts>
[[maybe_unused]] constexpr int kBlocks = kProducts == 1 && !std::is_same_v<Type, I8> ? 3 : 2;

// Two 16-bit floats of a pair of int8, exactly.
__device__ __forceinline__ uint32_t widen_int8_pair(uint32_t bytes, int first) {
    return pack_bf16(static_cast<float>(static_cast<int8_t>(bytes >> 8 * first)),
                     static_cast<float>(static_cast<int8_t>(bytes >> 8 * (first + 1))));
}

// 8 neighbouring weights of row n from k on as four pairs, 0 beyond in_dim. k is a multiple of 8.
template <typename Type>
__device__ __forceinline__ void load_weights(uint32_t (&b)[4], const TileProducts::Part& part, int64_t n,
                                             int64_t k, int64_t in_dim) {
    if constexpr (std::is_same_v<Type, I8>) {
        // The row's padding is zeros.
        const uint2 bits =
            *reinterpret_cast<const uint2*>(static_cast<const int8_t*>(part.w) + n * part.stride + k);
        b[0] = widen_int8_pair(bits.x, 0);
        b[1] = widen_int8_pair(bits.x, 2);
        b[2] = widen_int8_pair(bits.y, 0);
        b[3] = widen_int8_pair(bits.y, 2);
    } else {
        const uint16_t* const from = static_cast<const uint16_t*>(part.w) + n * part.stride + k;
        if (part.stride % 8 == 0) {
            const uint4 bits = k < in_dim ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
            b[0] = bits.x;
            b[1] = bits.y;
            b[2] = bits.z;
            b[3] = bits.w;
            return;
        }
        REFRAG_UNROLL
        for (int i = 0; i < 4; ++i) {
            const uint32_t low = k + 2 * i < in_dim ? from[2 * i] : 0u;
            const uint32_t high = k + 2 * i + 1 < in_dim ? from[2 * i + 1] : 0u;
            b[i] = high << 16 | low;
        }
    }
}

template <typename Type>
using Multiplied = std::conditional_t<std::is_same_v<Type, I8>, Bf16, Type>;

// acc = the sums over slice `slice` of kTiles * 16 rows from `row` and 16 columns from `column`, as mma lays
// them out: of tile t and half h, element i is row t * 16 + lane / 4 + i / 2 * 8, column
// h * 8 + lane % 4 * 2 + i % 2. Rows and columns beyond the last are computed as the last.
template <typename Type, int kTiles>
__device__ __forceinline__ void slice_sum(float (&acc)[kTiles][2][4], const TileProducts& a,
                                          const TileProducts::Part& part, int64_t row, int64_t column,
                                          int slice, int lane) {
    REFRAG_UNROLL
    for (int t = 0; t < kTiles; ++t) {
        REFRAG_UNROLL
        for (int h = 0; h < 2; ++h) {
            REFRAG_UNROLL
            for (int i = 0; i < 4; ++i) acc[t][h][i] = 0.0f;
        }
    }
    const int64_t steps = a.x_stride / kTileDepth, of_slice = (steps + kSlices - 1) / kSlices;
    const int64_t first = slice * of_slice, last = min(first + of_slice, steps);
    const int64_t own_k = lane % 4 * 8;
    const uint16_t* x[kTiles][2];
    REFRAG_UNROLL
    for (int t = 0; t < kTiles; ++t) {
        REFRAG_UNROLL
        for (int i = 0; i < 2; ++i) {
            x[t][i] = a.x + min(row + t * kTileRows + lane / 4 + i * 8, a.rows - 1) * a.x_stride + own_k;
        }
    }
    const int64_t columns[2] = {min(column + lane / 4, part.out_dim - 1),
                                min(column + 8 + lane / 4, part.out_dim - 1)};
    [[maybe_unused]] constexpr int kTurns = kTiles == 1 ? 4 : 2;  // more would spill
    REFRAG_UNROLL_TURNS
    for (int64_t step = first; step < last; ++step) {
        const int64_t k = step * kTileDepth;
        uint32_t b[2][4];
        REFRAG_UNROLL
        for (int h = 0; h < 2; ++h) load_weights<Type>(b[h], part, columns[h], k + own_k, a.in_dim);
        uint4 rows[kTiles][2];
        REFRAG_UNROLL
        for (int t = 0; t < kTiles; ++t) {
            REFRAG_UNROLL
            for (int i = 0; i < 2; ++i) rows[t][i] = *reinterpret_cast<const uint4*>(x[t][i] + k);
        }
        [[maybe_unused]] float scale[2][2];
        if constexpr (std::is_same_v<Type, I8>) {
            REFRAG_UNROLL
            for (int h = 0; h < 2; ++h) {
                REFRAG_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int64_t n = min(column + h * 8 + lane % 4 * 2 + i, part.out_dim - 1);
                    scale[h][i] = widen_f16(part.scales[n * (part.stride / kInt8Group) + step]);
                }
            }
        }
        REFRAG_UNROLL
        for (int t = 0; t < kTiles; ++t) {
            const uint32_t low[4] = {rows[t][0].x, rows[t][1].x, rows[t][0].y, rows[t][1].y};
            const uint32_t high[4] = {rows[t][0].z, rows[t][1].z, rows[t][0].w, rows[t][1].w};
            REFRAG_UNROLL
            for (int h = 0; h < 2; ++h) {
                const uint32_t b_low[2] = {b[h][0], b[h][1]}, b_high[2] = {b[h][2], b[h][3]};
                if constexpr (std::is_same_v<Type, I8>) {
                    float sum[4] = {};
                    Bf16::mma(sum, low, b_low);
                    Bf16::mma(sum, high, b_high);
                    REFRAG_UNROLL
                    for (int i = 0; i < 4; ++i)
                        acc[t][h][i] = __fmaf_rn(sum[i], scale[h][i % 2], acc[t][h][i]);
                } else {
                    Multiplied<Type>::mma(acc[t][h], low, b_low);
                    Multiplied<Type>::mma(acc[t][h], high, b_high);
                }
            }
        }
    }
}
static_assert(kTileDepth == kInt8Group, "a step has one scale");

// s and, of silu_mul, the second product's become the output's element.
__device__ __forceinline__ void finish(const TileProducts& a, const TileProducts::Part& part, int64_t row,
                                       int64_t n, float s, float second) {
    float* const out = part.out + row * part.out_dim + n;
    if (part.bias != nullptr) s += part.bias[n];
    if (a.epilogue == Epilogue::silu_mul) {
        if (a.parts[1].bias != nullptr) second += a.parts[1].bias[n];
        *out = s / (1.0f + expf(-s)) * second;
    } else {
        *out = a.epilogue == Epilogue::add ? *out + s : s;
    }
}

__device__ __forceinline__ int part_of_block(const TileProducts& a) {
    int p = 0;
    while (a.epilogue != Epilogue::silu_mul && p + 1 < a.n_parts && blockIdx.x >= a.parts[p + 1].first_block)
        ++p;
    return p;
}

// Mapping: a block for up to 16 rows and 16 columns of a part, a warp for a slice of k; then a thread for an
//   element. blockIdx.x: a part's blocks behind the other's (silu_mul: both parts in each block).
// Reduction order: slice_sum's; then the slices in order.
// Shared memory bytes: 8192.
// Alignment: x 16 bytes, weights too where the row's length allows.
// Bound by: reading the weights, once for 16 rows.
template <typename Type>
__global__ void __launch_bounds__(kSlices* kWarp) few_rows_kernel(TileProducts a) {
    constexpr int kElements = kTileRows * kTileColumns;
    static_assert(kElements == kSlices * kWarp, "an element for each thread");
    const int tid = static_cast<int>(threadIdx.x), slice = tid / kWarp, lane = tid % kWarp;
    const int p = part_of_block(a);
    const TileProducts::Part& part = a.parts[p];
    const int64_t column = static_cast<int64_t>(blockIdx.x - part.first_block) * kTileColumns;
    REFRAG_SHARED(float, of_slice, kSlices* kElements);
    float sums[2] = {};
    const int n_products = a.epilogue == Epilogue::silu_mul ? 2 : 1;
    REFRAG_UNROLL
    for (int product = 0; product < 2; ++product) {
        if (product >= n_products) break;
        float acc[1][2][4];
        slice_sum<Type, 1>(acc, a, a.parts[p + product], 0, column, slice, lane);
        __syncthreads();  // the sums of the product before have been read
        REFRAG_UNROLL
        for (int h = 0; h < 2; ++h) {
            REFRAG_UNROLL
            for (int i = 0; i < 4; ++i) {
                of_slice[slice * kElements + (lane / 4 + i / 2 * 8) * kTileColumns + h * 8 + lane % 4 * 2 +
                         i % 2] = acc[0][h][i];
            }
        }
        __syncthreads();
        REFRAG_UNROLL
        for (int s = 0; s < kSlices; ++s) sums[product] += of_slice[s * kElements + tid];
    }
    const int64_t row = tid / kTileColumns, n = column + tid % kTileColumns;
    if (row < a.rows && n < part.out_dim) finish(a, part, row, n, sums[0], sums[1]);
}

// Mapping: a block of 4 warps for 64 rows (blockIdx.y) and 64 columns of a part (blockIdx.x, as above), 16
//   columns to a warp.
// Reduction order: slice_sum's; then the slices in order.
// Shared memory bytes: 0: the warps' common rows come from L1.
// Alignment: as above.
// Bound by: L1 and L2: 10 reads of 16 bytes a lane for 16 products of mma. The weights are read again for
// every
//   64 rows.
template <typename Type, int kProducts>
__global__ void __launch_bounds__(kManyWarps* kWarp, kBlocks<Type, kProducts>)
    many_rows_kernel(TileProducts a) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int p = part_of_block(a);
    const TileProducts::Part& part = a.parts[p];
    const int64_t row = static_cast<int64_t>(blockIdx.y) * kManyTiles * kTileRows;
    const int64_t column =
        static_cast<int64_t>(blockIdx.x - part.first_block) * kManyWarps * kTileColumns + warp * kTileColumns;
    if (column >= part.out_dim) return;
    float sums[kProducts][kManyTiles][2][4] = {};
    REFRAG_UNROLL
    for (int product = 0; product < kProducts; ++product) {
        REFRAG_LOOP
        for (int slice = 0; slice < kSlices; ++slice) {
            float acc[kManyTiles][2][4];
            slice_sum<Type, kManyTiles>(acc, a, a.parts[p + product], row, column, slice, lane);
            REFRAG_UNROLL
            for (int t = 0; t < kManyTiles; ++t) {
                REFRAG_UNROLL
                for (int h = 0; h < 2; ++h) {
                    REFRAG_UNROLL
                    for (int i = 0; i < 4; ++i) sums[product][t][h][i] += acc[t][h][i];
                }
            }
        }
    }
    REFRAG_UNROLL
    for (int t = 0; t < kManyTiles; ++t) {
        REFRAG_UNROLL
        for (int h = 0; h < 2; ++h) {
            REFRAG_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int64_t r = row + t * kTileRows + lane / 4 + i / 2 * 8;
                const int64_t n = column + h * 8 + lane % 4 * 2 + i % 2;
                if (r < a.rows && n < part.out_dim)
                    finish(a, part, r, n, sums[0][t][h][i], sums[kProducts - 1][t][h][i]);
            }
        }
    }
}

template <typename Type>
void multiply_as(const TileProducts& products, cudaStream_t stream) {
    TileProducts a = products;
    const bool few = a.rows <= kTileRows;
    const int64_t columns = few ? kTileColumns : kManyWarps * kTileColumns;
    unsigned blocks = 0;
    for (int p = 0; p < a.n_parts; ++p) {
        a.parts[p].first_block = a.epilogue == Epilogue::silu_mul ? 0 : blocks;
        if (a.epilogue == Epilogue::silu_mul && p > 0) break;
        blocks += static_cast<unsigned>(ceil_div(a.parts[p].out_dim, columns));
    }
    if (blocks == 0) return;
    if (few) {
        CUDA_CHECK(launch(few_rows_kernel<Type>, dim3{blocks}, dim3{kSlices * kWarp}, 0, stream, a));
        return;
    }
    const auto kernel =
        a.epilogue == Epilogue::silu_mul ? many_rows_kernel<Type, 2> : many_rows_kernel<Type, 1>;
    // A grid has at most 65535 rows of blocks.
    constexpr int64_t kMostRows = int64_t{65535} * kManyTiles * kTileRows;
    for (int64_t left = a.rows; left > 0; left -= kMostRows) {
        a.rows = left < kMostRows ? left : kMostRows;
        const auto row_blocks = static_cast<unsigned>(ceil_div(a.rows, kManyTiles * kTileRows));
        CUDA_CHECK(launch(kernel, dim3{blocks, row_blocks}, dim3{kManyWarps * kWarp}, 0, stream, a));
        a.x += kMostRows * a.x_stride;
        for (int p = 0; p < a.n_parts; ++p) a.parts[p].out += kMostRows * a.parts[p].out_dim;
    }
}

}  // namespace

void multiply_in_tiles(const TileProducts& products, DType weights, cudaStream_t stream) {
    switch (weights) {
        case DType::bf16:
            return multiply_as<Bf16>(products, stream);
        case DType::f16:
            return multiply_as<F16>(products, stream);
        case DType::i8:
            return multiply_as<I8>(products, stream);
        default:
            fail(Status::runtime, "no product in tiles for weights of ", dtype_name(weights));
    }
}

}  // namespace refrag::REFRAG_CUDA
