// Attention on the CPU: how a ragged batch is cut into items and tasks, and the op itself.
//
// An item is a block of rows of one sequence with all query heads of a KV head, so that K and V are read once
// for the whole group. What a row computes depends on its own entries alone (see attention_f32.cpp and
// attention_bf16.cpp), so the cutting is free to follow the number of threads.
#include <algorithm>

#include "cpu/backend_impl.h"

namespace refrag {
namespace {

// Rows of a block (row, head pairs). fp32: enough to pay for transposing K, few enough to stay in L1 and L2.
constexpr int32_t kF32Rows = 32 * kTileRows;
// bf16: K and V of a step pass from the second cache level, the block's sums wait there.
constexpr int32_t kBf16Rows = 256;
constexpr int32_t kFewBf16Rows = 64;
// Work (multiply-adds) of a task: many short encoder sequences share one.
constexpr double kF32TaskWork = 4e5;
constexpr double kBf16TaskWork = 4e6;
// Items for each thread, below which rows and entries are cut finer.
constexpr int64_t kItemsPerThread = 4;

// bf16 is for both, or for a cache's sequences, or for those without.
bool in_bf16(const CpuKernels& kernels, const AttentionCall& call, int32_t seq) {
    if (call.cached(seq)) return call.kv->dtype == DType::bf16;
    return kernels.attend_bf16 != nullptr && call.shape.weights == DType::bf16 &&
           call.shape.head_dim % kTileK == 0;
}

int32_t splits_of(int64_t entries) {
    return static_cast<int32_t>((entries + kSplitEntries - 1) / kSplitEntries);
}

}  // namespace

DType CpuDevice::kv_dtype(DType weights, int32_t head_dim) const {
    const bool bf16 =
        kernels_.attend_bf16 != nullptr && rounding_of(weights) == DType::bf16 && head_dim % kTileK == 0;
    return bf16 ? DType::bf16 : DType::f32;
}

// Fills plan_. Allocates nothing once it has seen a batch as large.
void CpuBackend::plan_attention(const AttentionCall& call) {
    const int32_t group = call.group();
    const int32_t n_kv_heads = call.shape.n_kv_heads;
    const double dim = call.shape.head_dim;
    plan_.items.clear();
    plan_.joins.clear();
    plan_.task_begin.clear();
    plan_.f32_floats = plan_.bf16_floats = plan_.partial_floats = 0;

    // Smaller blocks of rows where there would not be enough of them for all threads.
    const int64_t wanted = threads_.size() == 1 ? 1 : kItemsPerThread * threads_.size();
    const auto items_of = [&](int32_t block_rows) {
        int64_t n = 0;
        for (int32_t s = 0; s < call.batch.n_seq; ++s) {
            n += int64_t{n_kv_heads} * ((call.rows(s) * group + block_rows - 1) / block_rows);
        }
        return n;
    };
    int32_t bf16_rows = kBf16Rows;
    while (bf16_rows > kFewBf16Rows && items_of(bf16_rows) < wanted) bf16_rows /= 2;
    const int64_t n_items = items_of(bf16_rows);

    for (int32_t s = 0; s < call.batch.n_seq; ++s) {
        REFRAG_DCHECK(!call.cached(s) || call.kv != nullptr);
        const int32_t rows = call.rows(s);
        const bool bf16 = in_bf16(kernels_, call, s);
        const int32_t block = std::max(1, (bf16 ? bf16_rows : kF32Rows) / group);
        const double task_work = bf16 ? kBf16TaskWork : kF32TaskWork;
        // The last rows first: they see the most, and the longest work should start early.
        for (int32_t i = (rows + block - 1) / block - 1; i >= 0; --i) {
            const int32_t row = i * block;
            const int32_t n = std::min(block, rows - row);
            const int64_t tile_rows = int64_t{n} * group;
            int64_t& floats = bf16 ? plan_.bf16_floats : plan_.f32_floats;
            floats = std::max(floats, bf16 ? attend_bf16_floats(tile_rows, call.shape.head_dim)
                                           : attend_f32_floats(tile_rows, call.shape.head_dim));
            for (int32_t h = 0; h < n_kv_heads;) {
                const int32_t entries = call.cached(s) ? call.start(s, h) + row + n : rows;
                const int64_t seen = entries - (call.cached(s) ? call.first_seen(entries - n) : 0);
                // Bringing K and V costs about as much as 8 more rows, from a cache in memory as 64.
                const double brought = call.cached(s) ? 64.0 : 8.0;
                const double work =
                    2.0 * dim * static_cast<double>(seen) * (static_cast<double>(tile_rows) + brought);
                int32_t heads = 1;
                if (!call.cached(s)) {
                    heads = static_cast<int32_t>(std::clamp(task_work / work, 1.0, 1.0 * n_kv_heads));
                    heads = std::min(heads, n_kv_heads - h);
                }
                const int32_t splits = bf16 ? splits_of(entries) : 1;
                AttentionItem item{s, bf16, h, h + heads, row, n, 0, splits, -1, work * heads};
                h += heads;
                // A decode step has a few rows against all that came before: its entries are shared out.
                const auto pieces = static_cast<int32_t>(
                    std::min<int64_t>(splits, (wanted + n_items - 1) / std::max<int64_t>(n_items, 1)));
                if (!bf16 || pieces <= 1) {
                    plan_.items.push_back(item);
                    continue;
                }
                item.partial = plan_.partial_floats;
                plan_.joins.push_back(item);
                const int64_t each = attend_partial_floats(tile_rows, call.shape.head_dim);
                plan_.partial_floats += splits * each;
                item.work /= pieces;
                for (int32_t p = 0; p < pieces; ++p) {
                    item.split_begin = splits * p / pieces;
                    item.split_end = splits * (p + 1) / pieces;
                    plan_.items.push_back(item);
                }
            }
        }
    }
    const auto longer = [](const AttentionItem& a, const AttentionItem& b) { return a.work > b.work; };
    if (!std::is_sorted(plan_.items.begin(), plan_.items.end(), longer)) {
        std::sort(plan_.items.begin(), plan_.items.end(), longer);
    }
    plan_.task_begin.reserve(plan_.items.size() +
                             1);  // as many as there can be, so that later steps take no more
    double left = 0.0;
    for (size_t i = 0; i < plan_.items.size(); ++i) {
        if (left <= 0.0) {
            plan_.task_begin.push_back(static_cast<int64_t>(i));
            left = plan_.items[i].bf16 ? kBf16TaskWork : kF32TaskWork;
        }
        left -= plan_.items[i].work;
    }
    plan_.task_begin.push_back(static_cast<int64_t>(plan_.items.size()));
}

void CpuBackend::attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape,
                           const KvView* kv, int32_t layer, const Batch& batch) {
    REFRAG_DCHECK(shape.n_heads % shape.n_kv_heads == 0);
    REFRAG_DCHECK(q.cols == static_cast<int64_t>(shape.n_heads) * shape.head_dim && out.cols == q.cols);
    REFRAG_DCHECK(k.cols == static_cast<int64_t>(shape.n_kv_heads) * shape.head_dim && v.cols == k.cols);
    REFRAG_DCHECK(q.rows == batch.n_rows && out.rows == q.rows && k.rows == q.rows && v.rows == q.rows);
    REFRAG_DCHECK(kv == nullptr ||
                  (kv->head_dim == shape.head_dim &&
                   (kv->dtype == DType::f32 || kv->dtype == device_.kv_dtype(kv->dtype, kv->head_dim))));
    if (batch.n_rows == 0) return;
    AttentionShape as_rounded = shape;
    as_rounded.weights = device_.rounding_of(shape.weights);
    const AttentionCall call{out, q, k, v, as_rounded, kv, layer, batch};

    plan_attention(call);
    const int64_t floats = std::max(plan_.f32_floats, plan_.bf16_floats);
    for (Scratch& s : scratch_) s.get(floats);
    float* const partial = partial_.get(plan_.partial_floats);

    const auto task = [&](int64_t index, int thread) {
        float* const scratch = scratch_[static_cast<size_t>(thread)].get(floats);
        for (int64_t i = plan_.task_begin[static_cast<size_t>(index)];
             i < plan_.task_begin[static_cast<size_t>(index) + 1]; ++i) {
            const AttentionItem& item = plan_.items[static_cast<size_t>(i)];
            if (item.bf16)
                attend_bf16(kernels_, call, item, scratch, partial);
            else
                attend_f32(kernels_, call, item, scratch);
        }
    };
    threads_.run_on(static_cast<int64_t>(plan_.task_begin.size()) - 1, task);
    const auto join = [&](int64_t index, int thread) {
        join_bf16(kernels_, call, plan_.joins[static_cast<size_t>(index)], partial,
                  scratch_[static_cast<size_t>(thread)].get(floats));
    };
    threads_.run_on(static_cast<int64_t>(plan_.joins.size()), join);
}

}  // namespace refrag
