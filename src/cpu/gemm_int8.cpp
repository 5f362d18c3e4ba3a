// Matrix products on the CPU with weights of 8 bits: how such a matrix is packed, what one task of a product
// does, and the scalar loops. Products are cut into tasks in gemm_bf16.cpp; those with widened weights are
// gemm.cpp's.
//
// A matrix is kept as panels of 16 output columns, a panel as one stream of blocks of 32 k (Int8Block): 8.5
// bits a weight, scales included.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/backend_impl.h"

namespace refrag {
namespace {

// Of few rows, so many panels and k are widened to bf16 at a time: 16 KB, which the first cache level keeps
// until they are multiplied.
constexpr int64_t kFewRows = 32;
constexpr int64_t kFewRowsPanels = 2;
constexpr int64_t kFewRowsK = 256;

float widened(const Int8Block* blocks, int64_t k, int64_t column) {
    const Int8Block& block = blocks[k / kInt8Group];
    const int64_t at = k % kInt8Group;
    const int q = block.q[at / 4][column][at % 4] - kInt8Zero;
    return static_cast<float>(q) * f16_to_f32(block.scale[column]);
}

}  // namespace

// ---- scalar loops -------------------------------------------------------------------------------------

void scalar::widen_int8(float* out, const Int8Block* blocks, int64_t k) {
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t n = 0; n < kPanel; ++n) out[i * kPanel + n] = widened(blocks, i, n);
    }
}

void scalar::widen_int8_bf16(uint16_t* tiles, const Int8Block* blocks, int64_t n_blocks) {
    for (int64_t k = 0; k < n_blocks * kTileK; ++k) {
        for (int64_t n = 0; n < kPanel; ++n) {
            const auto bits = std::bit_cast<uint32_t>(widened(blocks, k, n));
            tiles[k / 2 * 2 * kPanel + n * 2 + k % 2] = static_cast<uint16_t>((bits + 0x8000) >> 16);
        }
    }
}

void scalar::quantize_groups(Int8Group* out, const float* x, int64_t n) {
    for (int64_t begin = 0; begin < n; begin += kInt8Group, ++out) {
        const int64_t size = std::min(kInt8Group, n - begin);
        // Magnitudes order as their bits do, NaN above all.
        uint32_t largest = 0;
        for (int64_t i = 0; i < size; ++i) {
            largest = std::max(largest, std::bit_cast<uint32_t>(x[begin + i]) & 0x7fffffffu);
        }
        const auto size_of_largest = std::bit_cast<float>(largest);
        const bool finite = largest < 0x7f800000u, zero = largest < std::bit_cast<uint32_t>(0x1p-100f);
        const float per_unit = finite && !zero ? 127.0f / size_of_largest : 0.0f;
        out->scale = !finite ? std::numeric_limits<float>::quiet_NaN()
                     : zero  ? 0.0f
                             : size_of_largest / 127.0f;
        int32_t sum = 0;
        for (int64_t i = 0; i < kInt8Group; ++i) {
            const bool counts = i < size && per_unit != 0.0f;
            const auto q = static_cast<int32_t>(counts ? std::nearbyint(x[begin + i] * per_unit) : 0.0f);
            out->q[i] = static_cast<int8_t>(q);
            sum += q;
        }
        out->start = -kInt8Zero * sum;
    }
}

void scalar::gemm_int8(const Int8Gemm& g) {
    for (int64_t r = 0; r < g.rows; ++r) {
        for (int64_t n = 0; n < g.n_cols; ++n) {
            float sum = g.accumulate ? g.c[r * g.ldc + n] : 0.0f;
            for (int64_t group = 0; group < g.n_groups; ++group) {
                const Int8Group& a = g.a[r * g.a_stride + group];
                const Int8Block& b = g.b[n / kPanel * g.b_stride + group];
                int32_t dot = a.start;
                for (int64_t i = 0; i < kInt8Group; ++i) dot += a.q[i] * b.q[i / 4][n % kPanel][i % 4];
                sum += static_cast<float>(dot) * (a.scale * f16_to_f32(b.scale[n % kPanel]));
            }
            g.c[r * g.ldc + n] = sum;
        }
    }
}

// ---- weights ------------------------------------------------------------------------------------------

Int8Matrix::Int8Matrix(MemorySource& source, int64_t out_dim, int64_t in_dim)
    : PackedMatrix(DType::i8, out_dim, in_dim),
      buffer_(source, static_cast<size_t>(n_panels() * n_groups()) * sizeof(Int8Block)) {
    // Columns beyond out_dim are read by vector loads, though they reach no result.
    if (buffer_.bytes() == 0 || out_dim % kPanel == 0) return;
    std::memset(static_cast<void*>(panel(n_panels() - 1)), 0,
                static_cast<size_t>(n_groups()) * sizeof(Int8Block));
}

void Int8Matrix::pack_row(int64_t n, const void* row) {
    const uint16_t* const scales = int8_row_scales(row);
    const int8_t* const values = int8_row_values(row, in_dim());
    Int8Block* block = panel(n / kPanel);
    const int64_t column = n % kPanel;
    for (int64_t begin = 0; begin < in_dim(); begin += kInt8Group, ++block) {
        block->scale[column] = scales[begin / kInt8Group];
        for (int64_t i = 0; i < kInt8Group; ++i) {
            const int q = begin + i < in_dim() ? values[begin + i] : 0;
            block->q[i / 4][column][i % 4] = static_cast<uint8_t>(q + kInt8Zero);
        }
    }
}

void Int8Matrix::copy_row_to(float* out, int64_t n) const {
    const Int8Block* const blocks = panel(n / kPanel);
    for (int64_t k = 0; k < in_dim(); ++k) out[k] = widened(blocks, k, n % kPanel);
}

void Int8Matrix::add_row_to(float* out, int64_t n) const {
    const Int8Block* const blocks = panel(n / kPanel);
    for (int64_t k = 0; k < in_dim(); ++k) out[k] += widened(blocks, k, n % kPanel);
}

// ---- products -----------------------------------------------------------------------------------------

// x as int8_groups(x.cols) groups a row, at left_.
void CpuBackend::pack_int8(Tensor x) {
    const int64_t groups = int8_groups(x.cols);
    const int64_t bytes = x.rows * groups * static_cast<int64_t>(sizeof(Int8Group));
    auto* const left = reinterpret_cast<Int8Group*>(left_.get((bytes + 3) / 4));
    const auto pack = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            kernels_.quantize_groups(left + r * groups, x.f32() + r * x.cols, x.cols);
        }
    };
    parallel(x.rows, static_cast<double>(x.cols), pack);
}

void CpuBackend::multiply_int8(const Product& product, const Part& part) {
    const auto& w = static_cast<const Int8Matrix&>(*product.w);  // NOLINT: as multiply_bf16's
    Int8Gemm g{};
    g.a_stride = g.b_stride = g.n_groups = w.n_groups();
    g.a = reinterpret_cast<const Int8Group*>(left_.get(0)) + part.row * g.a_stride;
    g.b = w.panel(part.column / kPanel);
    g.ldc = product.out.cols;
    g.c = product.out.f32() + part.row * g.ldc + part.column;
    g.rows = part.n_rows;
    g.n_cols = part.n_cols;
    kernels_.gemm_int8(g);
}

// Weights are widened into the thread's scratch piece by piece; then the product is gemm_bf16's.
void CpuBackend::multiply_int8_bf16(const Product& product, const Part& part, int thread) {
    const auto& w = static_cast<const Int8Matrix&>(*product.w);  // NOLINT: as multiply_bf16's
    const int64_t in_dim = w.in_dim(), left_stride = tile_k_ceil(in_dim) * kPanel;
    if (part.n_rows <= kInt8Bf16Rows && kernels_.gemm_int8_bf16 != nullptr) {
        Int8Bf16Gemm g{};
        g.a = reinterpret_cast<const uint16_t*>(left_.get(0)) + part.row / kPanel * left_stride;
        g.a_stride = left_stride;
        g.b = w.panel(part.column / kPanel);
        g.b_stride = g.k_tiles = w.n_groups();
        g.ldc = product.out.cols;
        g.c = product.out.f32() + part.row * g.ldc + part.column;
        g.rows = part.n_rows;
        g.n_cols = part.n_cols;
        return kernels_.gemm_int8_bf16(g);
    }
    const int64_t piece_panels = part.n_rows <= kFewRows ? kFewRowsPanels : kMaxTaskPanels;
    const int64_t piece_k = part.n_rows <= kFewRows ? kFewRowsK : kTaskK;
    auto* const tiles = reinterpret_cast<uint16_t*>(scratch_[static_cast<size_t>(thread)].get(0));
    const auto* const left = reinterpret_cast<const uint16_t*>(left_.get(0));
    const int64_t col_end = part.column + part.n_cols;
    for (int64_t column = part.column; column < col_end; column += piece_panels * kPanel) {
        Bf16Gemm g{};
        g.a_stride = left_stride;
        g.b = tiles;
        g.ldc = product.out.cols;
        g.c = product.out.f32() + part.row * g.ldc + column;
        g.rows = part.n_rows;
        g.n_cols = std::min(piece_panels * kPanel, col_end - column);
        int64_t k = 0;
        do {
            g.a = left + part.row / kPanel * left_stride + k * kPanel;
            g.k_tiles = tile_k_ceil(std::min(piece_k, in_dim - k)) / kTileK;
            g.b_stride = g.k_tiles * kTileElements;
            for (int64_t p = 0; p * kPanel < g.n_cols; ++p) {
                kernels_.widen_int8_bf16(tiles + p * g.b_stride, w.panel(column / kPanel + p, k), g.k_tiles);
            }
            g.start = k > 0 ? g.c : nullptr;
            kernels_.gemm_bf16(g);
            k += piece_k;
        } while (k < in_dim);
    }
}

}  // namespace refrag
