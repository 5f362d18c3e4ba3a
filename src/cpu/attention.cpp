// Attention on the CPU: tiles of query rows against blocks of 32 KV entries, with a running softmax.
//
// A tile is a block of rows of one sequence times all query heads of one KV head, so K and V are read once
// for the whole group. A tile's rows are its (row, head) pairs. For every block of entries, in order:
//   s = q K^T * scale;  m' = max(m, max s);  p = exp(s - m');  l = l exp(m - m') + sum p;
//   acc = acc exp(m - m') + p V;           and after the last block:  out = acc / l.
// Blocks are the cache's pages (or 32 rows from an encoder sequence's first), counted from entry 0. What a
// row computes thus depends on its entries alone: prefill in one call, in several, and decode give the same
// bits. A row never touches an entry that it does not see, so what is stored there (even NaN) cannot reach
// it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/backend_impl.h"
#include "cpu/scalar_math.h"

namespace refrag {
namespace {

// Rows of a tile (row, head pairs): enough to pay for transposing K, few enough to stay in L1 and L2.
constexpr int64_t kAttentionRows = 32 * kTileRows;
// Work (multiply-adds) of a task: many short encoder sequences share one.
constexpr double kTaskWork = 4e5;

struct Item {
    int32_t seq;
    int32_t kv_head;
    int32_t row;  // first row, within the sequence
    int32_t rows;
};

// Pages lie anywhere, so the processor does not foresee the next one. Asking for it a block ahead takes
// decode from a third of the memory's speed to nearly all of it.
void prefetch(const float* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i, 0, 2);
}

// Where the entries of one (sequence, KV head) lie, and which of them a row sees.
struct Entries {
    const float* k = nullptr;
    const float* v = nullptr;
    int64_t ld = 0;
};

}  // namespace

// ---- scalar loops -------------------------------------------------------------------------------------

void scalar::transpose_keys(float* kt, const float* k, int64_t ldk, int64_t n, int64_t dim) {
    for (int64_t e = 0; e < kPageEntries; ++e) {
        float* column = kt + e / kPanel * dim * kPanel + e % kPanel;
        for (int64_t d = 0; d < dim; ++d) column[d * kPanel] = e < n ? k[e * ldk + d] : 0.0f;
    }
}

void scalar::softmax_block(float* s, int64_t rows, const int32_t* visible, float scale, float* m, float* l,
                           float* acc, int64_t ld_acc, int64_t dim) {
    for (int64_t r = 0; r < rows; ++r, s += kPageEntries, acc += ld_acc) {
        float largest = m[r];
        for (int64_t e = 0; e < visible[r]; ++e) {
            s[e] *= scale;
            largest = s[e] > largest ? s[e] : largest;
        }
        // While all scores are -inf, subtracting their maximum would make NaN of what may still become
        // finite.
        const float shift = largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest;
        float sum = 0.0f;
        for (int64_t e = 0; e < kPageEntries; ++e) {
            s[e] = e < visible[r] ? math::exp(s[e] - shift) : 0.0f;
            sum += s[e];
        }
        const float keep = math::exp(m[r] - shift);
        l[r] = l[r] * keep + sum;
        m[r] = largest;
        if (keep == 1.0f) continue;
        for (int64_t d = 0; d < dim; ++d) acc[d] *= keep;
    }
}

// ---- the op -------------------------------------------------------------------------------------------

namespace {

// One tile. Everything it needs, so that the op below reads as cutting the work and nothing else.
class AttentionTile {
  public:
    AttentionTile(const CpuKernels& kernels, const AttentionShape& shape)
        : kernels_(kernels),
          group_(shape.n_heads / shape.n_kv_heads),
          dim_(shape.head_dim),
          ld_acc_(panel_ceil(shape.head_dim)),
          scale_(shape.scale) {}

    static int64_t scratch_floats(int64_t rows, int64_t dim) {
        const int64_t padded = panel_ceil(dim);
        return panel_ceil(rows * dim) + rows * padded + rows * kPageEntries + 3 * panel_ceil(rows) +
               kPageEntries * panel_ceil(dim) + kPageEntries * padded;
    }

    // Lays the tile's arrays out in `scratch` and reads the queries of rows [0, n_rows) at q, one row of the
    // tile for each (row, head).
    void begin(float* scratch, const float* q, int64_t ldq, int64_t n_rows) {
        rows_ = n_rows * group_;
        q_ = scratch;
        acc_ = q_ + panel_ceil(rows_ * dim_);
        s_ = acc_ + rows_ * ld_acc_;
        m_ = s_ + rows_ * kPageEntries;
        l_ = m_ + panel_ceil(rows_);
        visible_ = reinterpret_cast<int32_t*>(l_ + panel_ceil(rows_));
        kt_ = l_ + 2 * panel_ceil(rows_);
        v_ = kt_ + kPageEntries * panel_ceil(dim_);
        for (int64_t r = 0; r < n_rows; ++r) {
            std::copy_n(q + r * ldq, group_ * dim_, q_ + r * group_ * dim_);
        }
        std::fill_n(acc_, rows_ * ld_acc_, 0.0f);
        std::fill_n(m_, rows_, -std::numeric_limits<float>::infinity());
        std::fill_n(l_, rows_, 0.0f);
    }

    // One block of n entries, of which row i of the call's rows sees the first `seen + i` (or all, if
    // `causal` is false).
    void block(const Entries& entries, int64_t n, bool causal, int64_t seen) {
        int64_t first = 0;
        for (int64_t t = 0; t < rows_; ++t) {
            const int64_t sees = causal ? std::clamp<int64_t>(seen + t / group_, 0, n) : n;
            visible_[t] = static_cast<int32_t>(sees);
            if (sees == 0) first = t + 1;
        }
        if (first == rows_) return;

        kernels_.transpose_keys(kt_, entries.k, entries.ld, n, dim_);
        const int score_panels = n > kPanel ? 2 : 1;
        for (int64_t t = first; t < rows_; t += kTileRows) {
            GemmTile tile{};
            tile.a = q_ + t * dim_;
            tile.lda = dim_;
            tile.b = kt_;
            tile.ldb = kPanel;
            tile.panel_stride = dim_ * kPanel;
            tile.c = s_ + t * kPageEntries;
            tile.ldc = kPageEntries;
            tile.k = dim_;
            tile.n_cols = score_panels * kPanel;
            kernels_.gemm_tile(DType::f32, static_cast<int>(std::min<int64_t>(kTileRows, rows_ - t)),
                               score_panels, tile);
        }
        kernels_.softmax_block(s_ + first * kPageEntries, rows_ - first, visible_ + first, scale_, m_ + first,
                               l_ + first, acc_ + first * ld_acc_, ld_acc_, dim_);
        add_values(entries, n, first);
    }

    // Writes rows to out, as the queries came.
    void finish(float* out, int64_t ldo) {
        for (int64_t t = 0; t < rows_; ++t) {
            kernels_.scale(out + t / group_ * ldo + t % group_ * dim_, acc_ + t * ld_acc_, 1.0f / l_[t],
                           dim_);
        }
    }

  private:
    // acc += p V. Rows that see the same number of entries go together, and no others: a product of 0 with
    // an entry that a row does not see is no zero if that entry is NaN.
    void add_values(const Entries& entries, int64_t n, int64_t first) {
        const float* v = entries.v;
        int64_t ldv = entries.ld;
        if (dim_ != ld_acc_) {
            // Vector loads read whole panels; the last entry's would leave its row.
            for (int64_t e = 0; e < n; ++e) {
                std::copy_n(entries.v + e * entries.ld, dim_, v_ + e * ld_acc_);
                std::fill(v_ + e * ld_acc_ + dim_, v_ + (e + 1) * ld_acc_, 0.0f);
            }
            v = v_;
            ldv = ld_acc_;
        }
        for (int64_t t = first; t < rows_;) {
            int rows = 1;
            while (rows < kTileRows && t + rows < rows_ && visible_[t + rows] == visible_[t]) ++rows;
            for (int64_t p = 0; p < ld_acc_ / kPanel;) {
                const int64_t left = ld_acc_ / kPanel - p;
                const int panels = left >= kTilePanels ? kTilePanels : left >= 2 ? 2 : 1;
                GemmTile tile{};
                tile.a = s_ + t * kPageEntries;
                tile.lda = kPageEntries;
                tile.b = v + p * kPanel;
                tile.ldb = ldv;
                tile.panel_stride = kPanel;
                tile.c = acc_ + t * ld_acc_ + p * kPanel;
                tile.ldc = ld_acc_;
                tile.k = visible_[t];
                tile.n_cols = panels * kPanel;
                tile.accumulate = true;
                kernels_.gemm_tile(DType::f32, rows, panels, tile);
                p += panels;
            }
            t += rows;
        }
    }

    const CpuKernels& kernels_;
    const int64_t group_;   // query heads of one KV head
    const int64_t dim_;     // head_dim
    const int64_t ld_acc_;  // head_dim up to whole panels
    const float scale_;

    int64_t rows_ = 0;
    float* q_ = nullptr;          // [rows, dim]
    float* acc_ = nullptr;        // [rows, ld_acc]
    float* s_ = nullptr;          // [rows, 32] scores, then probabilities
    float* m_ = nullptr;          // [rows] running maximum
    float* l_ = nullptr;          // [rows] running sum
    int32_t* visible_ = nullptr;  // [rows] entries of the block that a row sees
    float* kt_ = nullptr;         // two panels [dim, 16]
    float* v_ = nullptr;          // [32, ld_acc], where head_dim is no multiple of 16
};

}  // namespace

void CpuBackend::attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape,
                           const KvView* kv, int32_t layer, const Batch& batch) {
    REFRAG_DCHECK(shape.n_heads % shape.n_kv_heads == 0);
    REFRAG_DCHECK(q.cols == static_cast<int64_t>(shape.n_heads) * shape.head_dim && out.cols == q.cols);
    REFRAG_DCHECK(k.cols == static_cast<int64_t>(shape.n_kv_heads) * shape.head_dim && v.cols == k.cols);
    REFRAG_DCHECK(q.rows == batch.n_rows && out.rows == q.rows && k.rows == q.rows && v.rows == q.rows);
    REFRAG_DCHECK(kv == nullptr || (kv->dtype == DType::f32 && kv->head_dim == shape.head_dim));
    const int32_t group = shape.n_heads / shape.n_kv_heads;
    const int64_t dim = shape.head_dim;
    const auto tile_rows = static_cast<int32_t>(std::max<int64_t>(1, kAttentionRows / group));

    // The items, a sequence's last rows first: they see the most, and the longest work should start early.
    std::vector<Item> items;
    std::vector<int64_t> task_begin;
    double work = kTaskWork;
    for (int32_t s = 0; s < batch.n_seq; ++s) {
        REFRAG_DCHECK(batch.slot[s] < 0 || kv != nullptr);
        const int32_t rows = batch.row_begin[s + 1] - batch.row_begin[s];
        const int32_t tiles = (rows + tile_rows - 1) / tile_rows;
        for (int32_t i = tiles - 1; i >= 0; --i) {
            const int32_t row = i * tile_rows;
            const int32_t n = std::min(tile_rows, rows - row);
            for (int32_t h = 0; h < shape.n_kv_heads; ++h) {
                if (work >= kTaskWork) {
                    task_begin.push_back(static_cast<int64_t>(items.size()));
                    work = 0.0;
                }
                const int32_t entries =
                    batch.slot[s] < 0 ? rows
                                      : kv->length[kv->head_index(batch.slot[s], layer, h)] - rows + row + n;
                items.push_back({s, h, row, n});
                // Reading and transposing K and V costs about as much as 8 more rows.
                work += 2.0 * static_cast<double>(dim) * entries * (static_cast<double>(n) * group + 8.0);
            }
        }
    }
    if (items.empty()) return;
    task_begin.push_back(static_cast<int64_t>(items.size()));

    const std::lock_guard<std::mutex> lock(scratch_mutex_);
    const int64_t floats =
        AttentionTile::scratch_floats(int64_t{std::min(tile_rows, batch.n_rows)} * group, dim);
    for (Scratch& s : scratch_) s.get(floats);

    const auto run_item = [&](const Item& item, AttentionTile& tile, float* scratch) {
        const int64_t row_begin = batch.row_begin[item.seq];
        const int64_t rows = batch.row_begin[item.seq + 1] - row_begin;
        const bool cached = batch.slot[item.seq] >= 0;
        const int64_t head_at = static_cast<int64_t>(item.kv_head) * dim;
        const int64_t q_at = (row_begin + item.row) * q.cols + head_at * group;
        const int64_t head = cached ? kv->head_index(batch.slot[item.seq], layer, item.kv_head) : 0;
        // Entries before the sequence's own rows. Lengths count per head, so this holds for pruned heads.
        const int64_t start = cached ? kv->length[head] - rows : 0;
        const int64_t n_entries = cached ? start + item.row + item.rows : rows;

        const auto page_of = [&](int64_t e) {
            const int64_t page = kv->page_table[head * kv->max_pages + e / kPageEntries];
            return static_cast<const float*>(kv->pages) + page * 2 * kPageEntries * dim;
        };
        tile.begin(scratch, q.f32() + q_at, q.cols, item.rows);
        for (int64_t e = 0; e < n_entries; e += kPageEntries) {
            Entries entries;
            if (cached) {
                entries.k = page_of(e);
                entries.v = entries.k + kPageEntries * dim;
                entries.ld = dim;
                if (e + kPageEntries < n_entries) prefetch(page_of(e + kPageEntries), 2 * kPageEntries * dim);
            } else {
                entries.k = k.f32() + (row_begin + e) * k.cols + head_at;
                entries.v = v.f32() + (row_begin + e) * v.cols + head_at;
                entries.ld = k.cols;
            }
            tile.block(entries, std::min<int64_t>(kPageEntries, n_entries - e), cached,
                       start + item.row + 1 - e);
        }
        tile.finish(out.f32() + q_at, out.cols);
    };
    const auto task = [&](int64_t index, int thread) {
        AttentionTile tile(kernels_, shape);
        float* scratch = scratch_[static_cast<size_t>(thread)].get(floats);
        for (int64_t i = task_begin[static_cast<size_t>(index)];
             i < task_begin[static_cast<size_t>(index) + 1]; ++i) {
            run_item(items[static_cast<size_t>(i)], tile, scratch);
        }
    };
    threads_.run_on(static_cast<int64_t>(task_begin.size()) - 1, task);
}

}  // namespace refrag
