// How attention's work is cut, and the two ways of doing a piece of it: in fp32 (attention_f32.cpp) and in
// bf16 where the CPU multiplies bf16 (attention_bf16.cpp). The op itself is in attention.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "ops/backend.h"

namespace refrag {

// The op's arguments.
struct AttentionCall {
    Tensor out;
    Tensor q;
    Tensor k;
    Tensor v;
    const AttentionShape& shape;
    const KvView* kv;
    int32_t layer;
    const Batch& batch;

    int32_t group() const { return shape.n_heads / shape.n_kv_heads; }
    bool cached(int32_t seq) const { return batch.slot[seq] >= 0; }
    int32_t rows(int32_t seq) const { return batch.row_begin[seq + 1] - batch.row_begin[seq]; }
    // Of (slot, layer, KV head), for KvView's arrays.
    int64_t head(int32_t seq, int32_t kv_head) const {
        return kv->head_index(batch.slot[seq], layer, kv_head);
    }
    // Entries before a cached sequence's own rows. Lengths count per head, so this holds for pruned heads.
    int32_t start(int32_t seq, int32_t kv_head) const { return kv->length[head(seq, kv_head)] - rows(seq); }
    // The first entry that a row sees which sees itself as entry `own`.
    int64_t first_seen(int64_t own) const {
        return shape.window == 0 ? 0 : std::max<int64_t>(0, own + 1 - shape.window);
    }
    // First element of the queries and results of a sequence's row, for the first query head of a KV head.
    int64_t query_at(int32_t seq, int32_t kv_head, int32_t row) const {
        const int64_t column = static_cast<int64_t>(kv_head) * group() * shape.head_dim;
        return (static_cast<int64_t>(batch.row_begin[seq]) + row) * q.cols + column;
    }
    // First element of a sequence's own K and V of a KV head.
    int64_t key_at(int32_t seq, int32_t kv_head) const {
        return static_cast<int64_t>(batch.row_begin[seq]) * k.cols +
               static_cast<int64_t>(kv_head) * shape.head_dim;
    }
};

// A block of rows of one sequence, with all query heads of some KV heads.
struct AttentionItem {
    int32_t seq;
    bool bf16;
    int32_t kv_head_begin;
    int32_t kv_head_end;
    int32_t row;  // first row, within the sequence
    int32_t rows;
    int32_t split_begin;  // bf16: splits of the entries
    int32_t split_end;
    int64_t partial;  // bf16: floats into the partial sums, where the sums of its splits go; -1: to `out`
    double work;      // multiply-adds, for order and balance
};

struct AttentionPlan {
    std::vector<AttentionItem> items;
    std::vector<int64_t> task_begin;   // items of a task; one more at the end
    std::vector<AttentionItem> joins;  // items whose splits other items compute
    int64_t f32_floats = 0;            // scratch of a thread
    int64_t bf16_floats = 0;
    int64_t partial_floats = 0;
};

// Floats of scratch for `rows` rows of a block (row, head pairs).
int64_t attend_f32_floats(int64_t rows, int64_t dim);
int64_t attend_bf16_floats(int64_t rows, int64_t dim);

void attend_f32(const CpuKernels& kernels, const AttentionCall& call, const AttentionItem& item,
                float* scratch);

// Entries of a split: sums are taken over the entries of each split and then joined, in order.
inline constexpr int32_t kSplitEntries = 1024;
// Floats of the sums of one split.
int64_t attend_partial_floats(int64_t rows, int64_t dim);
void attend_bf16(const CpuKernels& kernels, const AttentionCall& call, const AttentionItem& item,
                 float* scratch, float* partial);
// Joins the sums of an item's splits, and writes its rows.
void join_bf16(const CpuKernels& kernels, const AttentionCall& call, const AttentionItem& item,
               float* partial, float* scratch);

}  // namespace refrag
