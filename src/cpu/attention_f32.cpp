// Attention in fp32 on the CPU: tiles of query rows against blocks of 32 KV entries, with a running softmax.
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

#include "cpu/attention.h"
#include "cpu/scalar_math.h"

namespace refrag {
namespace {

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

namespace {

// One tile. Everything it needs, so that what is below reads as finding entries and nothing else.
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
        return panel_ceil(rows * dim) + rows * padded + rows * kPageEntries + 4 * panel_ceil(rows) +
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
        hidden_ = visible_ + panel_ceil(rows_);
        kt_ = l_ + 3 * panel_ceil(rows_);
        v_ = kt_ + kPageEntries * panel_ceil(dim_);
        for (int64_t r = 0; r < n_rows; ++r) {
            std::copy_n(q + r * ldq, group_ * dim_, q_ + r * group_ * dim_);
        }
        std::fill_n(acc_, rows_ * ld_acc_, 0.0f);
        std::fill_n(m_, rows_, -std::numeric_limits<float>::infinity());
        std::fill_n(l_, rows_, 0.0f);
    }

    // One block of n entries, of which row i of the call's rows sees the first `seen + i` (or all, if
    // `causal` is false), but none more than `window` back, where that is not 0.
    void block(const Entries& entries, int64_t n, bool causal, int64_t seen, int64_t window) {
        int64_t first = 0;
        for (int64_t t = 0; t < rows_; ++t) {
            const int64_t sees = causal ? std::clamp<int64_t>(seen + t / group_, 0, n) : n;
            visible_[t] = static_cast<int32_t>(sees);
            const int64_t hides = causal && window > 0 ? seen + t / group_ - window : 0;
            hidden_[t] = static_cast<int32_t>(std::clamp<int64_t>(hides, 0, sees));
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
        for (int64_t t = first; t < rows_; ++t)
            std::fill_n(s_ + t * kPageEntries, hidden_[t], -std::numeric_limits<float>::infinity());
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
            while (rows < kTileRows && t + rows < rows_ && visible_[t + rows] == visible_[t] &&
                   hidden_[t + rows] == hidden_[t])
                ++rows;
            for (int64_t p = 0; p < ld_acc_ / kPanel;) {
                const int64_t left = ld_acc_ / kPanel - p;
                const int panels = left >= kTilePanels ? kTilePanels : left >= 2 ? 2 : 1;
                GemmTile tile{};
                tile.a = s_ + t * kPageEntries + hidden_[t];
                tile.lda = kPageEntries;
                tile.b = v + p * kPanel + hidden_[t] * ldv;
                tile.ldb = ldv;
                tile.panel_stride = kPanel;
                tile.c = acc_ + t * ld_acc_ + p * kPanel;
                tile.ldc = ld_acc_;
                tile.k = visible_[t] - hidden_[t];
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
    int32_t* visible_ = nullptr;  // [rows] entries of the block that a row sees,
    int32_t* hidden_ = nullptr;   // [rows] but for the first so many
    float* kt_ = nullptr;         // two panels [dim, 16]
    float* v_ = nullptr;          // [32, ld_acc], where head_dim is no multiple of 16
};

}  // namespace

int64_t attend_f32_floats(int64_t rows, int64_t dim) {
    return AttentionTile::scratch_floats(rows, dim);
}

void attend_f32(const CpuKernels& kernels, const AttentionCall& call, const AttentionItem& item,
                float* scratch) {
    const int64_t dim = call.shape.head_dim;
    const bool cached = call.cached(item.seq);
    const int32_t rows = call.rows(item.seq);
    AttentionTile tile(kernels, call.shape);
    for (int32_t kv_head = item.kv_head_begin; kv_head < item.kv_head_end; ++kv_head) {
        const int64_t q_at = call.query_at(item.seq, kv_head, item.row);
        const int64_t start = cached ? call.start(item.seq, kv_head) : 0;
        const int64_t n_entries = cached ? start + item.row + item.rows : rows;
        const auto page_of = [&](int64_t e) {
            const KvView& kv = *call.kv;
            const int64_t page =
                kv.page_table[call.head(item.seq, kv_head) * kv.max_pages + e / kPageEntries];
            return static_cast<const float*>(kv.pages) + page * 2 * kPageEntries * dim;
        };
        tile.begin(scratch, call.q.f32() + q_at, call.q.cols, item.rows);
        // Blocks that no row sees anything of change nothing.
        const int64_t first_seen = cached ? call.first_seen(start + item.row) : 0;
        for (int64_t e = first_seen / kPageEntries * kPageEntries; e < n_entries; e += kPageEntries) {
            Entries entries;
            if (cached) {
                entries.k = page_of(e);
                entries.v = entries.k + kPageEntries * dim;
                entries.ld = dim;
                if (e + kPageEntries < n_entries) prefetch(page_of(e + kPageEntries), 2 * kPageEntries * dim);
            } else {
                const int64_t at = call.key_at(item.seq, kv_head) + e * call.k.cols;
                entries.k = call.k.f32() + at;
                entries.v = call.v.f32() + at;
                entries.ld = call.k.cols;
            }
            tile.block(entries, std::min<int64_t>(kPageEntries, n_entries - e), cached,
                       start + item.row + 1 - e, call.shape.window);
        }
        tile.finish(call.out.f32() + q_at, call.out.cols);
    }
}

}  // namespace refrag
