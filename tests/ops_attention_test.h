// What the tests of attention share: a paged cache in host memory, one call of kv_append and attention, and a
// softmax in double to compare with.
//
// Bound. A score is dim products and sums and one product with scale: |ds| <= gamma(dim + 2) scale sum |q k|.
// exp(s - m) then has relative error ds + eps |s - m| + 4 eps. With each of the nb blocks the sums so far are
// multiplied by exp(m - m'): 4 eps + eps |m - m'| and one rounding, and the |m - m'| add up to at most the
// scores' range. The sums themselves give gamma(entries + nb), the last division and product 3 eps. Weights
// appear above and below the line, so everything counts twice: with E the largest of the first three,
// |error| <= (2 E + 2 gamma(entries + 8 nb + 16)) * sum_j w_j |v_j|, and 1% for second order.
//
// Bound in bf16, for q * scale * log2(e), k and v that are rounded already: scores are in units of log2, and
// are right to gamma(dim + 2) sum |q k|; their difference to the whole number that is subtracted has one
// rounding, 2^x is right to 7.6e-5, and multiplying by powers of two is exact. Above the line each weight is
// rounded once more, to 8 bits: 2^-8. So |error| <= (2 E + 2^-8 + 2 gamma(entries + 64)) * sum_j w_j |v_j|.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>

#include "ops_test.h"

namespace refrag_test::ops_attention {

using refrag::AttentionShape;
using refrag::Batch;
using refrag::kPageEntries;
using refrag::KvView;

struct Shape {
    int32_t heads;
    int32_t kv_heads;
    int32_t dim;
    DType weights = DType::f32;  // of the network that the call is made for
    int32_t window = 0;          // entries that a cached row sees; 0: all

    bool bf16() const { return weights == DType::bf16 && dim % 32 == 0; }
    float scale() const { return 1.0f / std::sqrt(static_cast<float>(dim)); }
};

// A network's shape as an instruction set would have it: with BF16 weights where it multiplies bf16.
template <typename T>
Shape on(Shape shape) {
    const bool bf16 = T::isa == CpuIsa::avx512_bf16 || T::isa == CpuIsa::amx;
    shape.weights = bf16 ? DType::bf16 : DType::f32;
    return shape;
}

// One sequence's queries, keys and values, all rows that it will ever have.
struct Sequence {
    int64_t rows;
    Floats q, k, v;
};

inline Sequence make_sequence(const Shape& shape, int64_t rows, uint32_t seed) {
    return {rows, random_floats(rows * shape.heads * shape.dim, seed, 2.0f),
            random_floats(rows * shape.kv_heads * shape.dim, seed + 1, 2.0f),
            random_floats(rows * shape.kv_heads * shape.dim, seed + 2)};
}

inline float rounded(float x) {
    return refrag::bf16_to_f32(refrag::f32_to_bf16(x));
}

// What attention multiplies: the sequence itself, or its values rounded to bf16 with q in units of log2.
inline Sequence as_multiplied(const Shape& shape, Sequence x) {
    if (!shape.bf16()) return x;
    const float factor = shape.scale() * 0x1.715476p+0f;
    for (float& q : x.q) q = rounded(q * factor);
    for (float& k : x.k) k = rounded(k);
    for (float& v : x.v) v = rounded(v);
    return x;
}

// A paged cache in host memory. Pages lie in a shuffled order, and hold NaN until written.
class Cache {
  public:
    Cache(const Shape& shape, int32_t n_slots, int64_t max_entries) {
        view_.n_layers = 2;
        view_.n_kv_heads = shape.kv_heads;
        view_.head_dim = shape.dim;
        view_.dtype = shape.bf16() ? DType::bf16 : DType::f32;
        view_.max_pages = static_cast<int32_t>((max_entries + kPageEntries - 1) / kPageEntries);
        const auto heads = static_cast<size_t>(n_slots * view_.n_layers * view_.n_kv_heads);
        length_.assign(heads, 0);
        table_.resize(heads * static_cast<size_t>(view_.max_pages));
        std::iota(table_.begin(), table_.end(), 0);
        std::shuffle(table_.begin(), table_.end(), std::mt19937(1));
        // All bits: NaN in every type.
        pages_.resize(table_.size() * 2 * kPageEntries * static_cast<size_t>(shape.dim));
        std::memset(pages_.data(), 0xff, pages_.size() * 4);
        view_.pages = pages_.data();
        view_.length = length_.data();
        view_.page_table = table_.data();
    }
    Cache(const Cache&) = delete;
    Cache& operator=(const Cache&) = delete;

    const KvView& view() const { return view_; }
    // Element d of K (part 0) or V (part 1) of an entry.
    float at(int32_t slot, int32_t layer, int32_t head, int64_t entry, int part, int32_t d) const {
        const int64_t index = view_.head_index(slot, layer, head);
        const int64_t page = table_[static_cast<size_t>(index * view_.max_pages + entry / kPageEntries)];
        return pages_[static_cast<size_t>(
            ((page * 2 + part) * kPageEntries + entry % kPageEntries) * view_.head_dim + d)];
    }
    int32_t length(int32_t slot, int32_t layer, int32_t head) const {
        return length_[static_cast<size_t>(view_.head_index(slot, layer, head))];
    }
    // Keeps the first n entries of a slot; what is behind them stays where it is.
    void truncate(int32_t slot, int32_t n) {
        for (int32_t layer = 0; layer < view_.n_layers; ++layer) {
            for (int32_t h = 0; h < view_.n_kv_heads; ++h) {
                int32_t& length = length_[static_cast<size_t>(view_.head_index(slot, layer, h))];
                length = std::min(length, n);
            }
        }
    }
    const Floats& pages() const { return pages_; }
    int64_t written() const {
        return std::count_if(pages_.begin(), pages_.end(), [](float x) { return !std::isnan(x); });
    }

  private:
    KvView view_;
    std::vector<int32_t> length_, table_;
    Floats pages_;
};

// Rows [begin, begin + n) of a sequence that go into one call.
struct Part {
    const Sequence* sequence;
    int64_t begin;
    int64_t n;
    int32_t slot;  // -1: encoder
};

inline constexpr int32_t kLayer = 1;

// One call of kv_append and attention; gives the stacked output rows.
inline Floats attend(Backend& backend, const Shape& shape, const std::vector<Part>& parts, Cache* cache) {
    std::vector<int32_t> row_begin = {0}, start, slot;
    Floats q, k, v;
    Batch batch;
    const auto append = [](Floats& to, const Floats& from, int64_t begin, int64_t n, int64_t cols) {
        to.insert(to.end(), from.begin() + begin * cols, from.begin() + (begin + n) * cols);
    };
    for (const Part& p : parts) {
        append(q, p.sequence->q, p.begin, p.n, shape.heads * shape.dim);
        append(k, p.sequence->k, p.begin, p.n, shape.kv_heads * shape.dim);
        append(v, p.sequence->v, p.begin, p.n, shape.kv_heads * shape.dim);
        row_begin.push_back(row_begin.back() + static_cast<int32_t>(p.n));
        start.push_back(p.slot < 0 ? 0 : static_cast<int32_t>(p.begin));
        slot.push_back(p.slot);
        batch.max_rows = std::max(batch.max_rows, static_cast<int32_t>(p.n));
        batch.max_entries = std::max(batch.max_entries, static_cast<int32_t>(p.begin + p.n));
    }
    batch.n_seq = static_cast<int32_t>(parts.size());
    batch.n_rows = row_begin.back();
    batch.row_begin = row_begin.data();
    batch.start = start.data();
    batch.slot = slot.data();
    const int64_t rows = batch.n_rows;
    const Tensor kt = view(k, rows, shape.kv_heads * shape.dim),
                 vt = view(v, rows, shape.kv_heads * shape.dim);
    if (cache != nullptr) backend.kv_append(cache->view(), kLayer, kt, vt, batch);
    Floats out(q.size(), kNan);
    const AttentionShape s{shape.heads,   shape.kv_heads, shape.dim,
                           shape.scale(), shape.weights,  shape.window};
    backend.attention(view(out, rows, shape.heads * shape.dim), view(q, rows, shape.heads * shape.dim), kt,
                      vt, s, cache == nullptr ? nullptr : &cache->view(), kLayer, batch);
    return out;
}

// Elements of `out` (the sequence's rows [begin, begin + n)) that are further from the reference than the
// bound.
inline int64_t count_wrong(const Shape& shape, const Sequence& sequence, int64_t begin, int64_t n,
                           bool causal, const float* out) {
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads;
    const double scale = shape.bf16() ? std::log(2.0) : static_cast<double>(shape.scale());
    const Sequence x = as_multiplied(shape, sequence);
    int64_t wrong = 0;
    for (int64_t r = begin; r < begin + n; ++r) {
        const int64_t entries = causal ? r + 1 : x.rows;
        const int64_t first = causal && shape.window > 0 ? std::max<int64_t>(0, entries - shape.window) : 0;
        for (int64_t h = 0; h < shape.heads; ++h) {
            const float* q = x.q.data() + (r * shape.heads + h) * dim;
            const double unseen = -std::numeric_limits<double>::infinity();
            std::vector<double> score(static_cast<size_t>(entries), unseen), size(score.size());
            for (int64_t e = first; e < entries; ++e) {
                const float* k = x.k.data() + (e * shape.kv_heads + h / group) * dim;
                double dot = 0.0, sizes = 0.0;
                for (int64_t d = 0; d < dim; ++d) {
                    const double term = static_cast<double>(q[d]) * static_cast<double>(k[d]);
                    dot += term;
                    sizes += std::fabs(term);
                }
                score[static_cast<size_t>(e)] = dot * scale;
                size[static_cast<size_t>(e)] = sizes * scale;
            }
            const auto [least, most] = std::minmax_element(score.begin() + first, score.end());
            const double largest = *most, range = *most - *least;
            double error = 0.0;
            for (const double s : size) error = std::max(error, gamma_n(dim + 2) * s);
            error += kEps * 2.0 * range + 4.0 * kEps;
            const int64_t blocks = (entries + kPageEntries - 1) / kPageEntries;
            if (shape.bf16()) error += kEps * 2.0 + 7.6e-5;
            const double bound = shape.bf16()
                                     ? 1.01 * (2.0 * error + 0x1p-8 + 2.0 * gamma_n(entries + 64))
                                     : 1.01 * (2.0 * error + 2.0 * gamma_n(entries + 8 * blocks + 16));
            double total = 0.0;
            for (double& s : score) total += s = std::exp(s - largest);
            for (int64_t d = 0; d < dim; ++d) {
                double sum = 0.0, sizes = 0.0;
                for (int64_t e = first; e < entries; ++e) {
                    const double v = static_cast<double>(
                        x.v[static_cast<size_t>((e * shape.kv_heads + h / group) * dim + d)]);
                    sum += score[static_cast<size_t>(e)] / total * v;
                    sizes += score[static_cast<size_t>(e)] / total * std::fabs(v);
                }
                if (!within(out[((r - begin) * shape.heads + h) * dim + d], sum, bound * sizes)) ++wrong;
            }
        }
    }
    return wrong;
}

inline Floats rows_of(const Floats& x, int64_t begin, int64_t n, int64_t cols) {
    return Floats(x.begin() + begin * cols, x.begin() + (begin + n) * cols);
}

}  // namespace refrag_test::ops_attention
