// Matrix products on the CPU: how weights are packed, how a product is cut into blocks, and the scalar tile.
//
// A weight matrix W [out_dim, in_dim] is kept once, in the file's dtype, as panels of 16 output columns;
// within a panel the 16 values of one k lie together (for BF16, of two k: see GemmTile). So a tile reads its
// weights as one forward stream, whatever its shape, and decode is bound by that stream alone.
// An output element is one chain of multiply-adds over ascending k, whatever the number of rows: a row's
// result does not depend on the batch it is in. Blocks over k hand the chain on through `out`.
#include <algorithm>
#include <cstring>

#include "cpu/backend_impl.h"

namespace refrag {
namespace {

// Inner-dimension block: 4 panels of it are 256 KiB of fp32, which stays in L2 while all row tiles pass.
// Smaller blocks would fit L1, but cost more in passing the sums on through `out` (0.88 of peak at 256, 0.95
// at 1024).
constexpr int64_t kBlockK = 1024;
// Rows of one task, a multiple of kTileRows: x is read again for every group of panels, so it should fit L2.
constexpr int64_t kBlockRows = 192;
// From this many rows on, widening 2-byte weights once into scratch beats widening them in every tile.
constexpr int64_t kWidenRows = 4 * kTileRows;
// Inner-dimension block of I8 weights for few rows: 4 panels of it, widened, are 16 KiB.
constexpr int64_t kFewRowsInt8K = 64;
constexpr size_t kReadBlockBytes = size_t{4} << 20;

// The place of element (k, column) within a panel.
int64_t panel_offset(DType dtype, int64_t k, int64_t column) {
    if (dtype == DType::bf16) return k / 2 * 2 * kPanel + column * 2 + k % 2;
    return k * kPanel + column;
}

float widened(DType dtype, const void* data, int64_t i) {
    switch (dtype) {
        case DType::f32:
            return static_cast<const float*>(data)[i];
        case DType::bf16:
            return bf16_to_f32(static_cast<const uint16_t*>(data)[i]);
        case DType::f16:
            return f16_to_f32(static_cast<const uint16_t*>(data)[i]);
        case DType::i32:
        case DType::i8:
            break;
    }
    return 0.0f;
}

template <typename T>
void pack(T* panel, const T* row, DType dtype, int64_t in_dim, int64_t column) {
    for (int64_t k = 0; k < in_dim; ++k) panel[panel_offset(dtype, k, column)] = row[k];
}

}  // namespace

// ---- scalar loops -------------------------------------------------------------------------------------

namespace {

template <DType kWeights>
void tile(int rows, int panels, const GemmTile& t) {
    // The two k of a BF16 pair lie side by side.
    constexpr int64_t kStep = kWeights == DType::bf16 ? 2 : 1;
    for (int p = 0; p < panels; ++p) {
        const int64_t n_cols = std::min(kPanel, t.n_cols - p * kPanel);
        for (int r = 0; r < rows; ++r) {
            const float* a = t.a + r * t.lda;
            float* c = t.c + r * t.ldc + p * kPanel;
            float sum[kPanel] = {};
            if (t.accumulate) std::copy(c, c + n_cols, sum);
            for (int64_t k = 0; k < t.k; ++k) {
                const int64_t at = p * t.panel_stride + k / kStep * kStep * t.ldb + k % kStep;
                for (int64_t n = 0; n < kPanel; ++n) sum[n] += a[k] * widened(kWeights, t.b, at + n * kStep);
            }
            for (int64_t n = 0; n < n_cols; ++n) c[n] = t.bias ? sum[n] + t.bias[p * kPanel + n] : sum[n];
        }
    }
}

}  // namespace

void scalar::gemm_tile(DType weights, int rows, int panels, const GemmTile& t) {
    switch (weights) {
        case DType::f32:
            return tile<DType::f32>(rows, panels, t);
        case DType::f16:
            return tile<DType::f16>(rows, panels, t);
        case DType::bf16:
            return tile<DType::bf16>(rows, panels, t);
        case DType::i32:
        case DType::i8:
            break;
    }
}

void scalar::widen_panel(float* out, const void* panel, DType weights, int64_t k) {
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t n = 0; n < kPanel; ++n) {
            out[i * kPanel + n] = widened(weights, panel, panel_offset(weights, i, n));
        }
    }
}

// ---- weights ------------------------------------------------------------------------------------------

CpuMatrix::CpuMatrix(MemorySource& source, DType dtype, int64_t out_dim, int64_t in_dim, int64_t k_multiple)
    : PackedMatrix(dtype, out_dim, in_dim),
      panel_stride_((in_dim + k_multiple - 1) / k_multiple * k_multiple * kPanel),
      buffer_(source, static_cast<size_t>(n_panels() * panel_stride_) * dtype_bytes(dtype)) {
    // Columns beyond out_dim and k beyond in_dim are read by vector loads, though they reach no result.
    if (buffer_.bytes() == 0) return;
    const size_t panel_bytes = static_cast<size_t>(panel_stride_) * dtype_bytes(dtype);
    if (in_dim % k_multiple != 0) {
        std::memset(buffer_.data(), 0, buffer_.bytes());
    } else if (out_dim % kPanel != 0) {
        std::memset(panel(n_panels() - 1), 0, panel_bytes);
    }
}

std::byte* CpuMatrix::panel(int64_t index, int64_t k) const {
    return static_cast<std::byte*>(buffer_.data()) +
           static_cast<size_t>(index * panel_stride_ + k * kPanel) * dtype_bytes(dtype());
}

void CpuMatrix::pack_row(int64_t n, const void* row) {
    void* to = panel(n / kPanel);
    if (dtype_bytes(dtype()) == 4) {
        pack(static_cast<uint32_t*>(to), static_cast<const uint32_t*>(row), dtype(), in_dim(), n % kPanel);
    } else {
        pack(static_cast<uint16_t*>(to), static_cast<const uint16_t*>(row), dtype(), in_dim(), n % kPanel);
    }
}

void CpuMatrix::copy_row_to(float* out, int64_t n) const {
    const void* from = panel(n / kPanel);
    for (int64_t k = 0; k < in_dim(); ++k) {
        out[k] = widened(dtype(), from, panel_offset(dtype(), k, n % kPanel));
    }
}

void CpuMatrix::add_row_to(float* out, int64_t n) const {
    const void* from = panel(n / kPanel);
    for (int64_t k = 0; k < in_dim(); ++k) {
        out[k] += widened(dtype(), from, panel_offset(dtype(), k, n % kPanel));
    }
}

std::unique_ptr<Matrix> CpuDevice::make_matrix(DType dtype, int64_t out_dim, int64_t in_dim,
                                               const RowReader& read) {
    REFRAG_CHECK(dtype != DType::i32, Status::runtime, "a weight matrix cannot have dtype I32");
    REFRAG_CHECK(out_dim >= 0 && in_dim >= 0, Status::runtime, "a weight matrix cannot be [", out_dim, ", ",
                 in_dim, "]");
    const bool tiles = kernels_.gemm_bf16 != nullptr && dtype == DType::bf16;
    std::unique_ptr<PackedMatrix> matrix;
    if (dtype == DType::i8) {
        matrix = std::make_unique<Int8Matrix>(*this, out_dim, in_dim);
    } else {
        matrix = std::make_unique<CpuMatrix>(*this, dtype, out_dim, in_dim, tiles ? kTileK : 2);
    }
    if (out_dim == 0 || in_dim == 0) return matrix;

    // Rows come in blocks of whole panels, a few megabytes at a time.
    const size_t row_bytes =
        dtype == DType::i8 ? int8_row_bytes(in_dim) : static_cast<size_t>(in_dim) * dtype_bytes(dtype);
    const int64_t block_panels =
        std::max<int64_t>(1, static_cast<int64_t>(kReadBlockBytes / row_bytes) / kPanel);
    const int64_t block_rows = std::min(block_panels * kPanel, out_dim);
    const Buffer rows(*this, static_cast<size_t>(block_rows) * row_bytes);
    for (int64_t begin = 0; begin < out_dim; begin += block_rows) {
        const int64_t n = std::min(block_rows, out_dim - begin);
        read(begin, n, rows.data());
        const auto* data = static_cast<const std::byte*>(rows.data());
        threads_.run((n + kPanel - 1) / kPanel, [&](int64_t p) {
            for (int64_t i = p * kPanel; i < std::min(n, (p + 1) * kPanel); ++i) {
                matrix->pack_row(begin + i, data + static_cast<size_t>(i) * row_bytes);
            }
        });
    }
    return matrix;
}

// ---- products -----------------------------------------------------------------------------------------

void CpuBackend::linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) {
    const Left left = left_for(w);
    if (left == Left::as_is) return linear_as_is(out, x, w, bias, Epilogue::store);
    const Product product{out, &w, bias};
    products_packed(x, left, {&product, 1}, Epilogue::store);
}

void CpuBackend::linear_gelu(Tensor out, Tensor x, const Matrix& w, Tensor bias) {
    const Left left = left_for(w);
    if (left == Left::as_is) return linear_as_is(out, x, w, bias, Epilogue::gelu);
    const Product product{out, &w, bias};
    products_packed(x, left, {&product, 1}, Epilogue::gelu);
}

// A task is a block of rows times a group of 4 panels. The weights' block [kBlockK x 64] stays in the first
// cache levels while the rows pass; bf16 and f16 weights are widened into scratch first when many rows
// follow, I8 weights always: by pieces that stay in the first cache level when the rows are few.
struct CpuBackend::LinearPlan {
    const PackedMatrix& w;
    const CpuMatrix* stored;  // w as what it is; the other is null
    const Int8Matrix* int8;
    const float* x;  // [rows, in_dim]
    float* out;      // [rows, out_dim]
    const float* bias;
    int64_t rows, in_dim, out_dim;
    Epilogue epilogue;  // store or gelu
    bool widens;
    int64_t block_k;   // k of a piece
    int64_t n_groups;  // of panels
    int64_t n_tasks;
};

CpuBackend::LinearPlan CpuBackend::plan_linear(Tensor out, Tensor x, const Matrix& w, Tensor bias,
                                               Epilogue epilogue) const {
    const auto& matrix = dynamic_cast<const PackedMatrix&>(w);
    const auto* const int8 = dynamic_cast<const Int8Matrix*>(&w);
    const int64_t rows = x.rows, in_dim = w.in_dim();
    REFRAG_DCHECK(x.cols == in_dim && out.cols == w.out_dim() && out.rows == rows);
    REFRAG_DCHECK(bias.empty() || bias.size() == w.out_dim());
    const int64_t block_k = rows > kTileRows  ? kBlockK
                            : int8 != nullptr ? kFewRowsInt8K
                                              : std::max<int64_t>(in_dim, 1);
    const int64_t n_groups = (matrix.n_panels() + kTilePanels - 1) / kTilePanels;
    return {matrix,
            dynamic_cast<const CpuMatrix*>(&w),
            int8,
            x.f32(),
            out.f32(),
            bias.empty() ? nullptr : bias.f32(),
            rows,
            in_dim,
            w.out_dim(),
            epilogue,
            int8 != nullptr || (w.dtype() != DType::f32 && rows >= kWidenRows),
            block_k,
            n_groups,
            n_groups * ((rows + kBlockRows - 1) / kBlockRows)};
}

// n_panels panels from `panel` on, entries [k_begin, k_begin + k), block_k entries from one to the next.
void CpuBackend::widen_panels(const LinearPlan& plan, int64_t panel, int64_t n_panels, int64_t k_begin,
                              int64_t k, float* wide) const {
    for (int64_t p = 0; p < n_panels; ++p, wide += plan.block_k * kPanel) {
        if (plan.int8 != nullptr) {
            kernels_.widen_int8(wide, plan.int8->panel(panel + p, k_begin), k);
        } else {
            kernels_.widen_panel(wide, plan.stored->panel(panel + p, k_begin), plan.w.dtype(), k);
        }
    }
}

void CpuBackend::run_linear(const LinearPlan& plan, int64_t task, int thread) {
    const int64_t row_begin = task / plan.n_groups * kBlockRows;
    const int64_t row_end = std::min(plan.rows, row_begin + kBlockRows);
    const int64_t panel_begin = task % plan.n_groups * kTilePanels;
    const int64_t panel_end = std::min(plan.w.n_panels(), panel_begin + kTilePanels);
    const int64_t col_end = std::min(plan.out_dim, panel_end * kPanel);

    int64_t k_begin = 0;
    do {
        const int64_t k = std::min(plan.block_k, plan.in_dim - k_begin);
        const bool last = k_begin + k >= plan.in_dim;
        float* wide = nullptr;
        if (plan.widens) {
            wide = scratch_[static_cast<size_t>(thread)].get(kTilePanels * kBlockK * kPanel);
            widen_panels(plan, panel_begin, panel_end - panel_begin, k_begin, k, wide);
        }
        for (int64_t r = row_begin; r < row_end; r += kTileRows) {
            const int tile_rows = static_cast<int>(std::min<int64_t>(kTileRows, row_end - r));
            for (int64_t p = panel_begin; p < panel_end;) {
                const int64_t left = panel_end - p;
                const int panels = left >= kTilePanels ? kTilePanels : left >= 2 ? 2 : 1;
                GemmTile t{};
                t.a = plan.x + r * plan.in_dim + k_begin;
                t.lda = plan.in_dim;
                t.ldb = kPanel;
                t.b = wide != nullptr
                          ? static_cast<const void*>(wide + (p - panel_begin) * plan.block_k * kPanel)
                          : plan.stored->panel(p, k_begin);
                t.panel_stride = wide != nullptr ? plan.block_k * kPanel : plan.stored->panel_stride();
                t.c = plan.out + r * plan.out_dim + p * kPanel;
                t.ldc = plan.out_dim;
                t.k = k;
                t.n_cols = std::min(panels * kPanel, col_end - p * kPanel);
                t.accumulate = k_begin > 0;
                t.bias = last && plan.bias != nullptr ? plan.bias + p * kPanel : nullptr;
                kernels_.gemm_tile(wide != nullptr ? DType::f32 : plan.w.dtype(), tile_rows, panels, t);
                p += panels;
            }
        }
        k_begin += k;
    } while (k_begin < plan.in_dim);

    for (int64_t r = row_begin; r < row_end && plan.epilogue == Epilogue::gelu; ++r) {
        kernels_.gelu(plan.out + r * plan.out_dim + panel_begin * kPanel, col_end - panel_begin * kPanel);
    }
}

void CpuBackend::linear_as_is(Tensor out, Tensor x, const Matrix& w, Tensor bias, Epilogue epilogue) {
    if (x.rows == 0 || w.out_dim() == 0) return;
    const LinearPlan plan = plan_linear(out, x, w, bias, epilogue);
    if (plan.widens) {
        for (Scratch& s : scratch_) s.get(kTilePanels * kBlockK * kPanel);
    }
    const double work =
        static_cast<double>(plan.rows) * static_cast<double>(plan.in_dim) * static_cast<double>(plan.out_dim);
    if (work < 1e5) {
        for (int64_t i = 0; i < plan.n_tasks; ++i) run_linear(plan, i, 0);
    } else {
        threads_.run_on(plan.n_tasks, [&](int64_t i, int thread) { run_linear(plan, i, thread); });
    }
}

}  // namespace refrag
