// Matrix products on the CPU's bf16 instructions: how x is rounded and packed, how products of one x are cut
// into tasks, and the scalar loops. Weights are packed in gemm.cpp, the loops are in simd_amx.cpp and
// simd_avx512_bf16.cpp.
//
// Every row goes through the same instructions, one row as well as thousands, so that a row's result does not
// depend on the batch it is in.
#include <algorithm>
#include <cmath>

#include "cpu/backend_impl.h"

namespace refrag {
namespace {

// A task's rows: 512 KB of x at kTaskK, which stay in the second cache level while the task's panels pass.
constexpr int64_t kTaskRows = 256;
// Multiply-adds below which waking other threads costs more than it saves.
constexpr double kMinParallelWork = 2.5e5;

}  // namespace

// ---- scalar loops -------------------------------------------------------------------------------------

void scalar::pack_bf16(uint16_t* block, const float* x, int64_t ldx, int64_t rows, int64_t k) {
    for (int64_t r = 0; r < kPanel; ++r) {
        for (int64_t i = 0; i < tile_k_ceil(k); ++i) {
            float value = r < rows && i < k ? x[r * ldx + i] : 0.0f;
            if (std::fpclassify(value) == FP_SUBNORMAL) value = std::copysign(0.0f, value);
            block[i / kTileK * kTileElements + r * kTileK + i % kTileK] = f32_to_bf16(value);
        }
    }
}

void scalar::gemm_bf16(const Bf16Gemm& g) {
    for (int64_t r = 0; r < g.rows; ++r) {
        for (int64_t n = 0; n < g.n_cols; ++n) {
            const uint16_t* a = g.a + r / kPanel * g.a_stride + r % kPanel * kTileK;
            const uint16_t* b = g.b + n / kPanel * g.b_stride + n % kPanel * 2;
            float sum = g.start != nullptr ? g.start[r * g.ldc + n] : 0.0f;
            for (int64_t tile = 0; tile < g.k_tiles; ++tile, a += kTileElements, b += kTileElements) {
                for (int64_t k = 0; k < kTileK; ++k) {
                    sum += bf16_to_f32(a[k]) * bf16_to_f32(b[k / 2 * 2 * kPanel + k % 2]);
                }
            }
            g.c[r * g.ldc + n] = sum;
        }
    }
}

// ---- products -----------------------------------------------------------------------------------------

CpuBackend::Left CpuBackend::left_for(const Matrix& w) const {
    if (w.in_dim() == 0) return Left::as_is;  // the kernels expect something to add up
    if (w.dtype() == DType::bf16 && kernels_.gemm_bf16 != nullptr) return Left::bf16;
    if (w.dtype() != DType::i8 || device_.int8() == CpuInt8::widen) return Left::as_is;
    return device_.int8() == CpuInt8::bf16 ? Left::bf16 : Left::int8;
}

void CpuBackend::linears(Tensor x, std::span<const Product> products) {
    const Left left = products.empty() ? Left::as_is : left_for(*products[0].w);
    const bool all = std::all_of(products.begin(), products.end(),
                                 [&](const Product& p) { return left_for(*p.w) == left; });
    if (!all || left == Left::as_is) return Backend::linears(x, products);
    products_packed(x, left, products, Epilogue::store);
}

void CpuBackend::linear_silu_mul(Tensor x, const Product& gate, const Product& up) {
    const Left left = left_for(*gate.w);
    if (left == Left::as_is || left_for(*up.w) != left) return Backend::linear_silu_mul(x, gate, up);
    const Product both[] = {gate, up};
    products_packed(x, left, both, Epilogue::silu_mul);
}

void CpuBackend::linear_add(Tensor residual, Tensor x, const Product& y) {
    const Left left = left_for(*y.w);
    if (left == Left::as_is) return Backend::linear_add(residual, x, y);
    products_packed(x, left, {&y, 1}, Epilogue::add, residual);
}

void CpuBackend::linears_rope_kv_append(const KvView& kv, int32_t layer, Tensor x,
                                        std::span<const Product, 3> qkv, Tensor cos_sin, const Batch& batch) {
    const Left left = left_for(*qkv[0].w);
    const bool all = left == left_for(*qkv[1].w) && left == left_for(*qkv[2].w);
    // Blocks of columns are whole heads only where heads are whole panels.
    const bool whole_heads = kv.head_dim % (2 * kPanel) == 0 && kv.head_dim <= kMaxTaskPanels * kPanel;
    if (!all || left == Left::as_is || !whole_heads) {
        return Backend::linears_rope_kv_append(kv, layer, x, qkv, cos_sin, batch);
    }
    products_packed(x, left, qkv, Epilogue::rope, cos_sin);
    kv_append(kv, layer, qkv[1].out, qkv[2].out, batch);
}

// x in blocks of 16 rows, each tile_k_ceil(x.cols) / 32 tiles, at left_.
void CpuBackend::pack_bf16(Tensor x) {
    const int64_t stride = tile_k_ceil(x.cols) * kPanel;
    const int64_t n_blocks = (x.rows + kPanel - 1) / kPanel;
    auto* const left = reinterpret_cast<uint16_t*>(left_.get(n_blocks * stride / 2));
    const auto pack = [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            kernels_.pack_bf16(left + b * stride, x.f32() + b * kPanel * x.cols, x.cols,
                               std::min(kPanel, x.rows - b * kPanel), x.cols);
        }
    };
    parallel(n_blocks, static_cast<double>(kPanel * x.cols), pack);
}

// `epilogue`, to be done where the kernel does it with the last of k: with `up`, the second product, for
// silu_mul; with `residual`, where the part's result goes, for add.
void CpuBackend::multiply_bf16(const Product& product, const Part& part, Epilogue epilogue, const Product* up,
                               Tensor residual) {
    const auto& w = static_cast<const CpuMatrix&>(*product.w);  // NOLINT: made by make_matrix, as linear's
    const int64_t in_dim = w.in_dim(), left_stride = tile_k_ceil(in_dim) * kPanel;
    const auto* const left = reinterpret_cast<const uint16_t*>(left_.get(0));
    Bf16Gemm g{};
    g.a_stride = left_stride;
    g.b_stride = w.panel_stride();
    g.ldc = product.out.cols;
    const int64_t at = part.row * g.ldc + part.column;
    g.c = product.out.f32() + at;
    g.rows = part.n_rows;
    g.n_cols = part.n_cols;
    const auto run = [&](Bf16Gemm call, const CpuMatrix& matrix, int64_t k) {
        call.b = reinterpret_cast<const uint16_t*>(matrix.panel(part.column / kPanel, k));
        kernels_.gemm_bf16(call);
    };
    int64_t k = 0;
    do {
        g.a = left + part.row / kPanel * left_stride + k * kPanel;
        g.k_tiles = tile_k_ceil(std::min(kTaskK, in_dim - k)) / kTileK;
        g.start = k > 0 ? g.c : nullptr;
        const bool last = k + kTaskK >= in_dim;
        if (up != nullptr) {
            const auto& up_w = static_cast<const CpuMatrix&>(*up->w);  // NOLINT: as w
            g.up_start = k > 0 ? up->out.f32() + at : nullptr;
            g.up_b = reinterpret_cast<const uint16_t*>(up_w.panel(part.column / kPanel, k));
            if (!last) {
                Bf16Gemm of_up = g;
                of_up.c = up->out.f32() + at;
                of_up.start = g.up_start;
                run(of_up, up_w, k);
            }
        }
        if (last) {
            g.epilogue = epilogue;
            if (epilogue == Epilogue::add) g.c = residual.f32() + at;
        }
        run(g, w, k);
        k += kTaskK;
    } while (k < in_dim);
}

// A task is a block of rows times a group of panels of one product; with Epilogue::silu_mul, of both.
struct CpuBackend::PackedPlan {
    Tensor x;
    Left left;
    std::span<const Product> products;
    Epilogue epilogue;
    Tensor other;
    bool paired;       // silu_mul: two products of the same shape, a task computes both parts of a block
    bool kernel_ends;  // the kernel does the epilogue, where a task has rows enough
    int64_t n_panels;  // of all products
    int64_t group_cols;
    int64_t n_groups;  // of the products that tasks count
    int64_t n_tasks;

    int64_t groups_of(const Product& p) const { return (p.out.cols + group_cols - 1) / group_cols; }
};

CpuBackend::PackedPlan CpuBackend::plan_packed(Tensor x, Left left, std::span<const Product> products,
                                               Epilogue epilogue, Tensor other) const {
    const bool paired = epilogue == Epilogue::silu_mul;
    REFRAG_DCHECK(!paired || (products.size() == 2 && products[0].w->out_dim() == products[1].w->out_dim()));
    PackedPlan plan{x, left, products, epilogue, other, paired, false, 0, 0, 0, 0};
    plan.kernel_ends = left == Left::bf16 && kernels_.gemm_bf16_epilogue;
    for (const Product& p : products) {
        REFRAG_DCHECK(p.w->in_dim() == x.cols && p.out.cols == p.w->out_dim() && p.out.rows == x.rows);
        REFRAG_DCHECK(p.bias.empty() || p.bias.size() == p.w->out_dim());
        plan.n_panels += (p.w->out_dim() + kPanel - 1) / kPanel;
        plan.kernel_ends = plan.kernel_ends && p.w->dtype() == DType::bf16 && p.bias.empty();
    }
    // Some tasks for each thread even out their speeds; whole tasks are best for the caches.
    const int64_t n_blocks = (x.rows + kTaskRows - 1) / kTaskRows;
    const int64_t wanted = std::max<int64_t>(1, plan.n_panels * n_blocks / (int64_t{6} * threads_.size()));
    const int64_t head_panels = epilogue == Epilogue::rope ? other.cols / kPanel : 2;
    const int64_t group = std::min(kMaxTaskPanels, wanted + head_panels - 1) / head_panels * head_panels;
    plan.group_cols = group * kPanel;
    for (const Product& p : products.first(paired ? 1 : products.size())) plan.n_groups += plan.groups_of(p);
    plan.n_tasks = n_blocks * plan.n_groups;
    return plan;
}

void CpuBackend::pack_left(const PackedPlan& plan) {
    if (plan.left == Left::int8) return pack_int8(plan.x);
    pack_bf16(plan.x);
    const bool widens = std::any_of(plan.products.begin(), plan.products.end(),
                                    [](const Product& p) { return p.w->dtype() == DType::i8; });
    for (Scratch& s : scratch_) s.get(widens ? kMaxTaskPanels * kTaskK * kPanel / 2 : 0);
}

// A part's sums, and the bias.
void CpuBackend::sum_packed(const PackedPlan& plan, const Product& p, const Part& part, int thread) {
    if (plan.left == Left::int8) {
        multiply_int8(p, part);
    } else if (p.w->dtype() == DType::i8) {
        multiply_int8_bf16(p, part, thread);
    } else {
        multiply_bf16(p, part, Epilogue::store, nullptr, Tensor{});
    }
    if (p.bias.empty()) return;
    for (int64_t r = part.row; r < part.row + part.n_rows; ++r) {
        kernels_.add(p.out.f32() + r * p.out.cols + part.column, p.bias.f32() + part.column, part.n_cols);
    }
}

// The epilogue, over sums that are in the cache.
void CpuBackend::end_packed(const PackedPlan& plan, const Product& p, const Part& part) {
    if (plan.epilogue == Epilogue::store) return;
    for (int64_t r = part.row; r < part.row + part.n_rows; ++r) {
        const int64_t at = r * p.out.cols + part.column;
        float* const out = p.out.f32() + at;
        if (plan.epilogue == Epilogue::silu_mul) {
            kernels_.silu_mul(out, plan.products[1].out.f32() + at, part.n_cols);
        }
        if (plan.epilogue == Epilogue::gelu) kernels_.gelu(out, part.n_cols);
        if (plan.epilogue == Epilogue::add) kernels_.add(plan.other.f32() + at, out, part.n_cols);
        if (plan.epilogue == Epilogue::rope && &p != &plan.products.back()) {
            const int64_t dim = plan.other.cols;
            for (int64_t h = 0; h < part.n_cols; h += dim) {
                kernels_.rope(out + h, plan.other.f32() + r * dim, dim / 2);
            }
        }
    }
}

void CpuBackend::run_packed(const PackedPlan& plan, int64_t task, int thread) {
    const int64_t row = task / plan.n_groups * kTaskRows;
    const int64_t n_rows = std::min(kTaskRows, plan.x.rows - row);
    int64_t column_group = task % plan.n_groups;
    const Product* p = plan.products.data();
    while (column_group >= plan.groups_of(*p)) column_group -= plan.groups_of(*p++);
    const int64_t column = column_group * plan.group_cols;
    const Part part{row, n_rows, column, std::min(plan.group_cols, p->out.cols - column)};
    if (plan.kernel_ends && n_rows >= kEpilogueRows && plan.paired) {
        return multiply_bf16(*p, part, Epilogue::silu_mul, &plan.products[1], Tensor{});
    }
    if (plan.kernel_ends && n_rows >= kEpilogueRows && plan.epilogue == Epilogue::add) {
        return multiply_bf16(*p, part, Epilogue::add, nullptr, plan.other);
    }
    sum_packed(plan, *p, part, thread);
    if (plan.paired) sum_packed(plan, plan.products[1], part, thread);
    end_packed(plan, *p, part);
}

void CpuBackend::products_packed(Tensor x, Left left, std::span<const Product> products, Epilogue epilogue,
                                 Tensor other) {
    const PackedPlan plan = plan_packed(x, left, products, epilogue, other);
    if (x.rows == 0 || plan.n_panels == 0) return;
    pack_left(plan);
    const double work = static_cast<double>(x.rows) * static_cast<double>(x.cols * plan.n_panels * kPanel);
    if (work < kMinParallelWork) {
        for (int64_t i = 0; i < plan.n_tasks; ++i) run_packed(plan, i, 0);
    } else {
        threads_.run_on(plan.n_tasks, [&](int64_t i, int thread) { run_packed(plan, i, thread); });
    }
}

}  // namespace refrag
