// Attention on the CPU's bf16 products: a block of query rows against the entries of its sequence, 256 at a
// time, with a running softmax in base 2. The scalar loops are here, the fast ones in
// simd_attention_bf16.cpp and simd_attention_amx.cpp.
//
// Q is multiplied by scale * log2(e) and rounded to bf16, so that scores S = Q K^T are exponents of 2. For
// every step, in order, each row does
//   m' = max(m, max S rounded up to a whole number);  P = 2^(S - m');  l = l 2^(m - m') + sum P;
//   acc = acc 2^(m - m') + bf16(P) V.
// m is whole, so the powers 2^(m - m') are exact, and once m covers what is to come nothing is rescaled.
//
// Every 1024 entries begin a split with its own m, l and acc. Splits are joined in order, so threads may
// share the entries of a decode step, and a row has the same bits however they do. Steps and splits count
// from entry 0: prefill in one call, in several, and decode give the same bits.
//
// Products with P = 0 would spread a NaN in V to rows that do not see its entry. So what lies behind a
// sequence's end is replaced by 0. Where an entry that only some of the rows see has a V that is not finite,
// each row goes alone, with a copy of V that ends at the last entry it sees.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/dtype.h"
#include "cpu/attention.h"
#include "cpu/scalar_math.h"

namespace refrag {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

int64_t block_ceil(int64_t rows) {
    return (rows + kPanel - 1) / kPanel * kPanel;
}

// Element of a page for (entry, d): K's, and V's counted from V's begin.
int64_t key_at(int64_t e, int64_t d, int64_t dim) {
    return e / kPanel * dim * kPanel + d / 2 * 2 * kPanel + e % kPanel * 2 + d % 2;
}
int64_t value_at(int64_t e, int64_t d) {
    return d / kPanel * kTileElements + e / 2 * 2 * kPanel + d % kPanel * 2 + e % 2;
}

// V of a page with zeros from entry n on.
void copy_values(uint16_t* to, const uint16_t* v, int64_t n, int64_t dim) {
    const int64_t pairs = n / 2 * 2 * kPanel;  // elements of a tile before the pair in which it ends
    for (int64_t d = 0; d < dim; d += kPanel, to += kTileElements, v += kTileElements) {
        std::copy_n(v, pairs, to);
        std::fill(to + pairs, to + kTileElements, uint16_t{0});
        if (n % 2 == 0) continue;
        for (int64_t i = 0; i < kPanel; ++i) to[pairs + 2 * i] = v[pairs + 2 * i];
    }
}

// Zeros in place of the first n entries of a page's V.
void clear_values(uint16_t* v, int64_t n, int64_t dim) {
    for (int64_t e = 0; e < n; ++e)
        for (int64_t d = 0; d < dim; ++d) v[value_at(e, d)] = 0;
}

// n a multiple of a tile's elements.
bool all_finite(const uint16_t* x, int64_t n) {
    constexpr uint16_t exponent = 0x7f80;
    for (const uint16_t* const end = x + n; x < end; x += kTileElements) {
        // No early end, so that the compiler makes vectors of it.
        uint16_t found = 0;
        for (int64_t i = 0; i < kTileElements; ++i) {
            found = static_cast<uint16_t>(found | static_cast<uint16_t>((x[i] & exponent) == exponent));
        }
        if (found != 0) return false;
    }
    return true;
}

}  // namespace

// ---- scalar loops -------------------------------------------------------------------------------------

void scalar::pack_kv(uint16_t* page, int64_t first, int64_t n, const float* k, int64_t ldk, const float* v,
                     int64_t ldv, int64_t dim) {
    uint16_t* const values = page + kPageEntries * dim;
    for (int64_t i = 0; i < n; ++i, k += ldk, v += ldv) {
        for (int64_t d = 0; d < dim; ++d) {
            page[key_at(first + i, d, dim)] = f32_to_bf16(k[d]);
            values[value_at(first + i, d)] = f32_to_bf16(v[d]);
        }
    }
}

void scalar::attend_bf16(const Bf16Attend& a) {
    for (int64_t r = 0; r < a.rows; ++r) {
        const uint16_t* q = a.q + r / kPanel * kPanel * a.dim + r % kPanel * kTileK;
        float* const s = a.s + r * kAttendEntries;
        float* const acc = a.acc + r * a.dim;
        float largest = a.m[r];
        const int64_t hidden = a.hidden != nullptr ? a.hidden[r] : 0;
        for (int64_t e = hidden; e < a.visible[r]; ++e) {
            s[e] = 0.0f;
            for (int64_t d = 0; d < a.dim; ++d) {
                s[e] += bf16_to_f32(q[d / kTileK * kTileElements + d % kTileK]) *
                        bf16_to_f32(a.k[e / kPageEntries][key_at(e % kPageEntries, d, a.dim)]);
            }
            largest = s[e] > largest ? s[e] : largest;
        }
        const float m = std::ceil(largest);
        // While all scores are -inf, subtracting their maximum would make NaN of what may still become
        // finite.
        const float shift = m == kNone ? 0.0f : m;
        const float keep = std::exp2(a.m[r] - shift);
        float sum = 0.0f;
        for (int64_t d = 0; d < a.dim; ++d) acc[d] *= keep;
        for (int64_t e = hidden; e < a.visible[r]; ++e) {
            const float p = std::exp2(s[e] - shift);
            const float rounded = bf16_to_f32(f32_to_bf16(p));
            sum += p;
            for (int64_t d = 0; d < a.dim; ++d) {
                acc[d] += rounded * bf16_to_f32(a.v[e / kPageEntries][value_at(e % kPageEntries, d)]);
            }
        }
        a.l[r] = a.l[r] * keep + sum;
        a.m[r] = m;
    }
}

// ---- sums ---------------------------------------------------------------------------------------------

namespace {

// m, l and acc of a block's rows, one array behind the other.
struct Sums {
    int64_t rows;  // whole blocks of 16
    int64_t dim;
    float* m;
    float* l;
    float* acc;

    static int64_t floats(int64_t rows, int64_t dim) { return block_ceil(rows) * (dim + 2); }
    Sums(float* at, int64_t n_rows, int64_t n_dim)
        : rows(block_ceil(n_rows)), dim(n_dim), m(at), l(at + rows), acc(at + 2 * rows) {}

    void begin() const {
        std::fill_n(m, rows, kNone);
        std::fill_n(l, rows * (dim + 1), 0.0f);
    }
    // What the first n rows of another split add. A row that saw nothing of the split is left alone, as it is
    // where a call ends before the split begins. x is used up.
    void join(const CpuKernels& kernels, const Sums& x, int64_t n) const {
        for (int64_t r = 0; r < n; ++r) {
            if (x.m[r] == kNone && x.l[r] == 0.0f) continue;
            const float most = std::max(m[r], x.m[r]);
            const float shift = most == kNone ? 0.0f : most;
            const float keep = std::exp2(m[r] - shift), add = std::exp2(x.m[r] - shift);
            l[r] = l[r] * keep + x.l[r] * add;
            m[r] = most;
            float* const to = acc + r * dim;
            float* const from = x.acc + r * dim;
            if (keep != 1.0f) kernels.scale(to, to, keep, dim);
            if (add != 1.0f) kernels.scale(from, from, add, dim);
            kernels.add(to, from, dim);
        }
    }
};

void finish(const CpuKernels& kernels, const AttentionCall& call, const AttentionItem& item, int32_t kv_head,
            const Sums& sums) {
    const int32_t group = call.group();
    float* const out = call.out.f32() + call.query_at(item.seq, kv_head, item.row);
    for (int64_t t = 0; t < int64_t{item.rows} * group; ++t) {
        kernels.scale(out + t / group * call.out.cols + t % group * sums.dim, sums.acc + t * sums.dim,
                      1.0f / sums.l[t], sums.dim);
    }
}

// ---- a block of rows ----------------------------------------------------------------------------------

// One block of rows of one KV head, and its scratch.
class Block {
  public:
    static int64_t floats(int64_t rows, int64_t dim) {
        const int64_t padded = block_ceil(rows);
        return 2 * Sums::floats(rows, dim) + padded * dim / 2 + 2 * panel_ceil(padded) + score_floats(dim) +
               kAttendRows * kAttendEntries / 2 + 2 * kAttendEntries * dim + kPageEntries * dim +
               Sums::floats(kAttendRows, dim);
    }

    Block(const CpuKernels& kernels, const AttentionCall& call, const AttentionItem& item, int32_t kv_head,
          float* scratch)
        : kernels_(kernels),
          call_(call),
          item_(item),
          kv_head_(kv_head),
          group_(call.group()),
          dim_(call.shape.head_dim),
          rows_(int64_t{item.rows} * group_),
          cached_(call.cached(item.seq)),
          start_(cached_ ? call.start(item.seq, kv_head) : 0),
          sums_(scratch, rows_, dim_),
          total_(scratch + Sums::floats(rows_, dim_), rows_, dim_),
          alone_(scratch + 2 * Sums::floats(rows_, dim_), kAttendRows, dim_) {
        float* at = scratch + 2 * Sums::floats(rows_, dim_) + Sums::floats(kAttendRows, dim_);
        s_ = at;
        at += score_floats(dim_);
        visible_ = reinterpret_cast<int32_t*>(at);
        hidden_ = visible_ + block_ceil(rows_);
        auto* bf16 = reinterpret_cast<uint16_t*>(at + 2 * block_ceil(rows_));
        p_ = bf16;
        bf16 += kAttendRows * kAttendEntries;
        q_ = bf16;
        bf16 += block_ceil(rows_) * dim_;
        pages_ = bf16;
        bf16 += 2 * kAttendEntries * dim_;
        values_ = bf16;
        bf16 += kAttendEntries * dim_;
        last_ = bf16;
        pack_queries();
    }

    // Entries that the block's last row sees.
    int64_t n_entries() const {
        return cached_ ? int64_t{start_} + item_.row + item_.rows : call_.rows(item_.seq);
    }

    // The sums of one split.
    const Sums& split(int32_t index) {
        sums_.begin();
        const int64_t end = std::min(n_entries(), (int64_t{index} + 1) * kSplitEntries);
        const int64_t last = std::min(n_entries(), int64_t{item_.split_end} * kSplitEntries);
        const int64_t first = int64_t{index} * kSplitEntries;
        if (index == item_.split_begin && cached_) ask_for(first, std::min(end, first + kAttendEntries));
        // Steps that no row of the block sees anything of change nothing.
        const int64_t seen = cached_ ? call_.first_seen(int64_t{start_} + item_.row) : 0;
        for (int64_t e = first; e < end; e += kAttendEntries) {
            if (e + kAttendEntries <= seen) continue;
            step(e, std::min(kAttendEntries, end - e), last);
        }
        return sums_;
    }
    const Sums& total() const { return total_; }

  private:
    // Scores of a call, or at first 16 rows of queries.
    static int64_t score_floats(int64_t dim) { return std::max(kAttendRows * kAttendEntries, kPanel * dim); }

    void pack_queries() {
        const float factor = call_.shape.scale * math::kLog2e;
        const float* q = call_.q.f32() + call_.query_at(item_.seq, kv_head_, item_.row);
        for (int64_t t = 0; t < rows_; t += kPanel) {
            const int64_t n = std::min(kPanel, rows_ - t);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t row = (t + i) / group_, head = (t + i) % group_;
                kernels_.scale(s_ + i * dim_, q + row * call_.q.cols + head * dim_, factor, dim_);
            }
            kernels_.pack_bf16(q_ + t * dim_, s_, dim_, n, dim_);
        }
    }

    // Entries [e, e + n), n <= kAttendEntries; more follow, in this split or the next, up to `end`.
    void step(int64_t e, int64_t n, int64_t end) {
        const int64_t n_pages = (n + kPageEntries - 1) / kPageEntries;
        const uint16_t* k[kAttendPages];
        const uint16_t* v[kAttendPages];
        const uint16_t* next[kAttendPages];
        if (!cached_) pack_pages(e, n);
        for (int64_t i = 0; i < n_pages; ++i) {
            k[i] = cached_ ? page(e + i * kPageEntries) : pages_ + i * 2 * kPageEntries * dim_;
            v[i] = k[i] + kPageEntries * dim_;
        }
        if (n % kPageEntries != 0) {
            copy_values(last_, v[n_pages - 1], n % kPageEntries, dim_);
            v[n_pages - 1] = last_;
        }
        int64_t n_next = 0;
        for (int64_t at = e + kAttendEntries; cached_ && at < end && n_next < kAttendPages;
             at += kPageEntries) {
            next[n_next++] = page(at);
        }

        for (int64_t t = 0; t < rows_; ++t) {
            const int64_t sees = start_ + item_.row + t / group_ + 1 - e;
            visible_[t] = static_cast<int32_t>(cached_ ? std::clamp<int64_t>(sees, 0, n) : n);
            const int64_t hides = cached_ ? call_.first_seen(e + sees - 1) - e : 0;
            hidden_[t] = static_cast<int32_t>(std::clamp<int64_t>(hides, 0, n));
        }
        const int64_t most_hidden = hidden_[rows_ - 1];
        // The pages that some row sees and another does not.
        bool clean = true;
        for (int64_t i = visible_[0] / kPageEntries; visible_[0] < n && i < n_pages; ++i) {
            clean = clean && all_finite(v[i], kPageEntries * dim_);
        }
        for (int64_t i = 0; i < n_pages && i * kPageEntries < most_hidden; ++i) {
            clean = clean && all_finite(v[i], kPageEntries * dim_);
        }
        for (int64_t t = 0; t < rows_; t += kAttendRows) {
            Bf16Attend a{};
            a.q = q_ + t * dim_;
            a.rows = std::min(kAttendRows, rows_ - t);
            a.dim = dim_;
            a.k = k;
            a.v = v;
            a.visible = visible_ + t;
            a.hidden = most_hidden > 0 ? hidden_ + t : nullptr;
            a.n_pages = (a.visible[a.rows - 1] + kPageEntries - 1) / kPageEntries;
            if (a.n_pages == 0) continue;
            a.m = sums_.m + t;
            a.l = sums_.l + t;
            a.acc = sums_.acc + t * dim_;
            a.s = s_;
            a.p = p_;
            a.next = next;
            a.n_next = n_next;
            n_next = 0;
            if (clean)
                kernels_.attend_bf16(a);
            else
                attend_alone(a);
        }
    }

    // Rows that see the same entries at a time, each such set with V of its own entries and no others.
    void attend_alone(Bf16Attend a) {
        const Sums in(alone_.m, kAttendRows, dim_);
        const Bf16Attend whole = a;
        const uint16_t* v[kAttendPages];
        for (int64_t r = 0; r < a.rows;) {
            int64_t end = r + 1;
            const int64_t hidden = a.hidden != nullptr ? a.hidden[r] : 0;
            while (end < a.rows && a.visible[end] == a.visible[r] &&
                   (a.hidden == nullptr || a.hidden[end] == hidden))
                ++end;
            for (int64_t i = 0; i < a.n_pages; ++i) {
                const int64_t sees = std::clamp<int64_t>(a.visible[r] - i * kPageEntries, 0, kPageEntries);
                copy_values(values_ + i * kPageEntries * dim_, whole.v[i], sees, dim_);
                clear_values(values_ + i * kPageEntries * dim_,
                             std::clamp<int64_t>(hidden - i * kPageEntries, 0, kPageEntries), dim_);
                v[i] = values_ + i * kPageEntries * dim_;
            }
            const int64_t blocks = block_ceil(a.rows);
            std::copy_n(whole.m, blocks, in.m);
            std::copy_n(whole.l, blocks, in.l);
            std::copy_n(whole.acc, blocks * dim_, in.acc);
            a.v = v;
            a.m = in.m;
            a.l = in.l;
            a.acc = in.acc;
            kernels_.attend_bf16(a);
            std::copy_n(in.m + r, end - r, whole.m + r);
            std::copy_n(in.l + r, end - r, whole.l + r);
            std::copy_n(in.acc + r * dim_, (end - r) * dim_, whole.acc + r * dim_);
            r = end;
        }
    }

    // Nothing came before them during which they could have been brought.
    void ask_for(int64_t begin, int64_t end) const {
        for (int64_t e = begin; e < end; e += kPageEntries) {
            const uint16_t* const at = page(e);
            for (int64_t i = 0; i < 2 * kPageEntries * dim_; i += 32) __builtin_prefetch(at + i, 0, 2);
        }
    }

    const uint16_t* page(int64_t e) const {
        const KvView& kv = *call_.kv;
        const int64_t row = call_.head(item_.seq, kv_head_) * kv.max_pages;
        return static_cast<const uint16_t*>(kv.pages) +
               int64_t{kv.page_table[row + e / kPageEntries]} * 2 * kPageEntries * dim_;
    }

    // A sequence without a cache: pages made of its own K and V.
    void pack_pages(int64_t e, int64_t n) {
        const int64_t at = call_.key_at(item_.seq, kv_head_) + e * call_.k.cols;
        for (int64_t i = 0; i < n; i += kPageEntries) {
            kernels_.pack_kv(pages_ + i * 2 * dim_, 0, std::min<int64_t>(kPageEntries, n - i),
                             call_.k.f32() + at + i * call_.k.cols, call_.k.cols,
                             call_.v.f32() + at + i * call_.v.cols, call_.v.cols, dim_);
        }
    }

    const CpuKernels& kernels_;
    const AttentionCall& call_;
    const AttentionItem& item_;
    const int32_t kv_head_;
    const int32_t group_;
    const int64_t dim_;
    const int64_t rows_;  // (row, head) pairs
    const bool cached_;
    const int32_t start_;
    const Sums sums_;   // of a split
    const Sums total_;  // of the splits so far
    const Sums alone_;
    float* s_ = nullptr;
    uint16_t* p_ = nullptr;
    int32_t* visible_ = nullptr;  // [rows] entries of the step that a row sees,
    int32_t* hidden_ = nullptr;   // [rows] but for the first so many
    uint16_t* q_ = nullptr;       // [rows, dim] left operand
    uint16_t* pages_ = nullptr;   // of a step, for a sequence without a cache
    uint16_t* values_ = nullptr;  // V of a step, for attend_alone
    uint16_t* last_ = nullptr;    // V of a page that ends early
};

}  // namespace

int64_t attend_bf16_floats(int64_t rows, int64_t dim) {
    return Block::floats(rows, dim);
}

int64_t attend_partial_floats(int64_t rows, int64_t dim) {
    return Sums::floats(rows, dim);
}

void attend_bf16(const CpuKernels& kernels, const AttentionCall& call, const AttentionItem& item,
                 float* scratch, float* partial) {
    const int64_t rows = int64_t{item.rows} * call.group();
    for (int32_t kv_head = item.kv_head_begin; kv_head < item.kv_head_end; ++kv_head) {
        Block block(kernels, call, item, kv_head, scratch);
        if (item.partial < 0) block.total().begin();
        for (int32_t s = item.split_begin; s < item.split_end; ++s) {
            const Sums& sums = block.split(s);
            if (item.partial < 0) {
                block.total().join(kernels, sums, rows);
            } else {
                const int64_t floats = Sums::floats(rows, sums.dim);
                std::copy_n(sums.m, floats, partial + item.partial + s * floats);
            }
        }
        if (item.partial < 0) finish(kernels, call, item, kv_head, block.total());
    }
}

void join_bf16(const CpuKernels& kernels, const AttentionCall& call, const AttentionItem& item,
               float* partial, float* scratch) {
    const int64_t rows = int64_t{item.rows} * call.group(), dim = call.shape.head_dim;
    const Sums total(scratch, rows, dim);
    total.begin();
    for (int32_t s = item.split_begin; s < item.split_end; ++s) {
        const Sums sums(partial + item.partial + s * Sums::floats(rows, dim), rows, dim);
        total.join(kernels, sums, rows);
    }
    finish(kernels, call, item, item.kv_head_begin, total);
}

}  // namespace refrag
