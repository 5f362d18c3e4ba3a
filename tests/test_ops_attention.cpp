// KV cache writes and attention over ragged batches, against a double-precision softmax.
//
// Bound. A score is dim products and sums and one product with scale: |ds| <= gamma(dim + 2) scale sum |q k|.
// exp(s - m) then has relative error ds + eps |s - m| + 4 eps. With each of the nb blocks the sums so far are
// multiplied by exp(m - m'): 4 eps + eps |m - m'| and one rounding, and the |m - m'| add up to at most the
// scores' range. The sums themselves give gamma(entries + nb), the last division and product 3 eps. Weights
// appear above and below the line, so everything counts twice: with E the largest of the first three,
// |error| <= (2 E + 2 gamma(entries + 8 nb + 16)) * sum_j w_j |v_j|, and 1% for second order.
#include <algorithm>
#include <array>
#include <numeric>

#include "ops_test.h"

using namespace refrag_test;
using refrag::AttentionShape;
using refrag::Batch;
using refrag::kPageEntries;
using refrag::KvView;
using refrag::make_cpu_backend;

namespace {

struct Shape {
    int32_t heads;
    int32_t kv_heads;
    int32_t dim;
};

// One sequence's queries, keys and values, all rows that it will ever have.
struct Sequence {
    int64_t rows;
    Floats q, k, v;
};

Sequence make_sequence(const Shape& shape, int64_t rows, uint32_t seed) {
    return {rows, random_floats(rows * shape.heads * shape.dim, seed, 2.0f),
            random_floats(rows * shape.kv_heads * shape.dim, seed + 1, 2.0f),
            random_floats(rows * shape.kv_heads * shape.dim, seed + 2)};
}

// A paged cache in host memory. Pages lie in a shuffled order, and hold NaN until written.
class Cache {
  public:
    Cache(const Shape& shape, int32_t n_slots, int64_t max_entries) {
        view_.n_layers = 2;
        view_.n_kv_heads = shape.kv_heads;
        view_.head_dim = shape.dim;
        view_.max_pages = static_cast<int32_t>((max_entries + kPageEntries - 1) / kPageEntries);
        const auto heads = static_cast<size_t>(n_slots * view_.n_layers * view_.n_kv_heads);
        length_.assign(heads, 0);
        table_.resize(heads * static_cast<size_t>(view_.max_pages));
        std::iota(table_.begin(), table_.end(), 0);
        std::shuffle(table_.begin(), table_.end(), std::mt19937(1));
        pages_.assign(table_.size() * 2 * kPageEntries * static_cast<size_t>(shape.dim), kNan);
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

constexpr int32_t kLayer = 1;

// One call of kv_append and attention; gives the stacked output rows.
Floats attend(Backend& backend, const Shape& shape, const std::vector<Part>& parts, Cache* cache) {
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
    const AttentionShape s{shape.heads, shape.kv_heads, shape.dim,
                           1.0f / std::sqrt(static_cast<float>(shape.dim))};
    backend.attention(view(out, rows, shape.heads * shape.dim), view(q, rows, shape.heads * shape.dim), kt,
                      vt, s, cache == nullptr ? nullptr : &cache->view(), kLayer, batch);
    return out;
}

// Elements of `out` (the sequence's rows [begin, begin + n)) that are further from the reference than the
// bound.
int64_t count_wrong(const Shape& shape, const Sequence& x, int64_t begin, int64_t n, bool causal,
                    const float* out) {
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads;
    const double scale = static_cast<double>(1.0f / std::sqrt(static_cast<float>(dim)));
    int64_t wrong = 0;
    for (int64_t r = begin; r < begin + n; ++r) {
        const int64_t entries = causal ? r + 1 : x.rows;
        for (int64_t h = 0; h < shape.heads; ++h) {
            const float* q = x.q.data() + (r * shape.heads + h) * dim;
            std::vector<double> score(static_cast<size_t>(entries)), size(score.size());
            for (int64_t e = 0; e < entries; ++e) {
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
            const auto [least, most] = std::minmax_element(score.begin(), score.end());
            const double largest = *most, range = *most - *least;
            double error = 0.0;
            for (const double s : size) error = std::max(error, gamma_n(dim + 2) * s);
            error += kEps * 2.0 * range + 4.0 * kEps;
            const int64_t blocks = (entries + kPageEntries - 1) / kPageEntries;
            const double bound = 1.01 * (2.0 * error + 2.0 * gamma_n(entries + 8 * blocks + 16));
            double total = 0.0;
            for (double& s : score) total += s = std::exp(s - largest);
            for (int64_t d = 0; d < dim; ++d) {
                double sum = 0.0, sizes = 0.0;
                for (int64_t e = 0; e < entries; ++e) {
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

Floats rows_of(const Floats& x, int64_t begin, int64_t n, int64_t cols) {
    return Floats(x.begin() + begin * cols, x.begin() + (begin + n) * cols);
}

}  // namespace

TEST_CASE("ops: kv_append writes each head's pages and lengths, and nothing else") {
    const auto backend = make_cpu_backend(3, CpuIsa::scalar);
    const Shape shape{4, 2, 8};
    Cache cache(shape, 3, 160);
    const Sequence a = make_sequence(shape, 150, 1), b = make_sequence(shape, 33, 2),
                   c = make_sequence(shape, 5, 3);
    const Sequence none = make_sequence(shape, 0, 4);
    // Slots 2 and 0; an encoder sequence writes nothing, nor does one without rows.
    attend(*backend, shape, {{&a, 0, 31, 2}, {&c, 0, 5, -1}, {&b, 0, 1, 0}, {&none, 0, 0, 1}}, &cache);
    attend(*backend, shape, {{&b, 1, 32, 0}, {&a, 31, 2, 2}}, &cache);
    attend(*backend, shape, {{&a, 33, 117, 2}}, &cache);
    for (int32_t h = 0; h < 2; ++h) {
        CHECK(cache.length(2, kLayer, h) == 150);
        CHECK(cache.length(0, kLayer, h) == 33);
        CHECK(cache.length(1, kLayer, h) == 0);
        CHECK(cache.length(2, 0, h) == 0);
    }
    CHECK(cache.written() == (150 + 33) * 2 * 2 * 8);
    int64_t wrong = 0;
    for (const auto& [x, slot] : {std::pair{&a, 2}, std::pair{&b, 0}}) {
        for (int64_t e = 0; e < x->rows; ++e) {
            for (int32_t h = 0; h < 2; ++h) {
                for (int32_t d = 0; d < 8; ++d) {
                    const auto at = static_cast<size_t>((e * 2 + h) * 8 + d);
                    if (!same_bits(cache.at(slot, kLayer, h, e, 0, d), x->k[at])) ++wrong;
                    if (!same_bits(cache.at(slot, kLayer, h, e, 1, d), x->v[at])) ++wrong;
                }
            }
        }
    }
    CHECK(wrong == 0);
}

TEST_CASE("ops: rope_kv_append is rope, rope and kv_append") {
    const auto backend = make_cpu_backend(2, CpuIsa::scalar);
    const Shape shape{4, 2, 8};
    Floats q = random_floats(3 * 32, 1), k = random_floats(3 * 16, 2), v = random_floats(3 * 16, 3);
    Floats table(3 * 8), position = {5.0f, 6.0f, 7.0f}, freq = {1.0f, 0.1f, 0.01f, 0.001f};
    backend->rope_table(view(table, 3, 8), position.data(), view(freq, 1, 4));
    const std::vector<int32_t> row_begin = {0, 3}, start = {0}, slot = {0};
    const Batch batch{1, 3, 3, 3, row_begin.data(), start.data(), slot.data(), position.data()};
    Cache one(shape, 1, 32), two(shape, 1, 32);
    Floats q2 = q, k2 = k;
    backend->rope_kv_append(one.view(), 0, view(q, 3, 32), view(k, 3, 16), view(v, 3, 16), view(table, 3, 8),
                            batch);
    backend->rope(view(q2, 3, 32), view(table, 3, 8));
    backend->rope(view(k2, 3, 16), view(table, 3, 8));
    backend->kv_append(two.view(), 0, view(k2, 3, 16), view(v, 3, 16), batch);
    CHECK(same_bits(q, q2));
    CHECK(same_bits(k, k2));
    for (int32_t d = 0; d < 8; ++d) {
        CHECK(same_bits(one.at(0, 0, 1, 2, 0, d), two.at(0, 0, 1, 2, 0, d)));
        CHECK(same_bits(one.at(0, 0, 1, 2, 1, d), two.at(0, 0, 1, 2, 1, d)));
    }
}

TEST_CASE_TEMPLATE("ops: causal attention over ragged batches", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const Shape shape : {Shape{2, 2, 8}, Shape{2, 1, 48}, Shape{4, 1, 64}, Shape{8, 1, 80},
                              Shape{2, 2, 128}, Shape{3, 3, 17}, Shape{8, 2, 16}}) {
        CAPTURE(shape.heads);
        CAPTURE(shape.kv_heads);
        CAPTURE(shape.dim);
        const std::array<int64_t, 6> starts = {0, 1, 31, 32, 33, 100}, rows = {110, 33, 1, 0, 32, 1};
        std::array<Sequence, 6> x;
        std::vector<Part> before, call;
        for (size_t s = 0; s < 6; ++s) {
            const auto slot = static_cast<int32_t>(5 - s);
            x[s] = make_sequence(shape, starts[s] + rows[s], static_cast<uint32_t>(100 + 3 * s));
            before.push_back({&x[s], 0, starts[s], slot});
            call.push_back({&x[s], starts[s], rows[s], slot});
        }
        Cache cache(shape, 6, 160);
        attend(*backend, shape, before, &cache);
        const Floats out = attend(*backend, shape, call, &cache);
        const float* at = out.data();
        for (size_t s = 0; s < 6; ++s) {
            CAPTURE(s);
            CHECK(count_wrong(shape, x[s], starts[s], rows[s], true, at) == 0);
            at += rows[s] * shape.heads * shape.dim;
        }
    }
}

TEST_CASE_TEMPLATE("ops: encoder attention sees its whole sequence and no other", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const Shape shape : {Shape{2, 2, 8}, Shape{2, 2, 64}, Shape{4, 2, 48}, Shape{2, 2, 80}}) {
        CAPTURE(shape.dim);
        std::vector<Sequence> x;
        for (const int64_t rows : {1, 3, 0, 16, 18, 31, 32, 33, 65, 130}) {
            x.push_back(make_sequence(shape, rows, static_cast<uint32_t>(200 + rows)));
        }
        std::vector<Part> call;
        for (const Sequence& s : x) call.push_back({&s, 0, s.rows, -1});
        const Floats out = attend(*backend, shape, call, nullptr);
        int64_t row = 0;
        for (const Sequence& s : x) {
            CAPTURE(s.rows);
            const int64_t cols = shape.heads * shape.dim;
            CHECK(count_wrong(shape, s, 0, s.rows, false, out.data() + row * cols) == 0);
            CHECK(same_bits(attend(*backend, shape, {{&s, 0, s.rows, -1}}, nullptr),
                            rows_of(out, row, s.rows, cols)));
            row += s.rows;
        }
    }
}

TEST_CASE_TEMPLATE("ops: prefill, split prefill and decode give the same bits", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    for (const Shape shape : {Shape{2, 2, 64}, Shape{8, 2, 16}, Shape{4, 1, 17}}) {
        const int64_t rows = 135, cols = shape.heads * shape.dim;
        const Sequence x = make_sequence(shape, rows, 301), other = make_sequence(shape, 50, 302);
        Floats whole;
        for (const int threads : {1, 2, 3}) {
            const auto backend = make_cpu_backend(threads, T::isa);
            Cache cache(shape, 1, 160);
            const Floats out = attend(*backend, shape, {{&x, 0, rows, 0}}, &cache);
            if (whole.empty()) whole = out;
            CHECK(same_bits(out, whole));
        }
        const auto backend = make_cpu_backend(2, T::isa);
        for (const int64_t step : {1, 7, 31, 32, 33, 100}) {
            CAPTURE(step);
            Cache cache(shape, 1, 160);
            Floats out;
            for (int64_t r = 0; r < rows; r += step) {
                const Floats part = attend(*backend, shape, {{&x, r, std::min(step, rows - r), 0}}, &cache);
                out.insert(out.end(), part.begin(), part.end());
            }
            CHECK(same_bits(out, whole));
        }
        // In a batch with others, encoder sequences among them.
        Cache cache(shape, 2, 160);
        const Floats mixed =
            attend(*backend, shape, {{&other, 0, 50, -1}, {&x, 0, rows, 1}, {&other, 0, 3, 0}}, &cache);
        CHECK(same_bits(rows_of(mixed, 50, rows, cols), whole));
    }
}

TEST_CASE_TEMPLATE("ops: what a row does not see cannot reach it", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const Shape shape : {Shape{4, 2, 64}, Shape{2, 2, 17}}) {
        const int64_t rows = 70, cols = shape.heads * shape.dim, bad = 37;
        const Sequence clean = make_sequence(shape, rows, 401), other = make_sequence(shape, 20, 402);
        Cache cache(shape, 2, 96), cache_k(shape, 2, 96), cache_v(shape, 2, 96);
        const Floats expected = attend(*backend, shape, {{&clean, 0, rows, 0}, {&other, 0, 20, 1}}, &cache);

        // NaN in one key: every later row of the heads that read it, and no earlier one.
        Sequence x = clean;
        x.k[static_cast<size_t>(bad * shape.kv_heads * shape.dim)] = kNan;
        const Floats k_out = attend(*backend, shape, {{&x, 0, rows, 0}, {&other, 0, 20, 1}}, &cache_k);
        // NaN in one element of one value: that element of every later row of those heads.
        x = clean;
        x.v[static_cast<size_t>(bad * shape.kv_heads * shape.dim + 3)] = kNan;
        const Floats v_out = attend(*backend, shape, {{&x, 0, rows, 0}, {&other, 0, 20, 1}}, &cache_v);

        const int64_t group = shape.heads / shape.kv_heads;
        bool right = true;
        for (int64_t r = 0; r < rows + 20; ++r) {
            for (int64_t c = 0; c < cols; ++c) {
                const auto at = static_cast<size_t>(r * cols + c);
                const bool reads = r >= bad && r < rows && c / shape.dim < group;
                right = right && same_bits(k_out[at], reads ? kNan : expected[at]);
                right = right && same_bits(v_out[at], reads && c % shape.dim == 3 ? kNan : expected[at]);
            }
        }
        CHECK(right);

        // An encoder sequence of NaN beside a clean one.
        Sequence all_nan = make_sequence(shape, 18, 403);
        std::fill(all_nan.k.begin(), all_nan.k.end(), kNan);
        const Floats both = attend(*backend, shape, {{&all_nan, 0, 18, -1}, {&other, 0, 20, -1}}, nullptr);
        CHECK(
            same_bits(rows_of(both, 18, 20, cols), attend(*backend, shape, {{&other, 0, 20, -1}}, nullptr)));
        CHECK(std::all_of(both.begin(), both.begin() + 18 * cols, [](float v) { return std::isnan(v); }));
    }
}

TEST_CASE_TEMPLATE("ops: scores of -inf and +inf", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(1, T::isa);
    const Shape shape{1, 1, 8};
    Sequence x = make_sequence(shape, 70, 501);
    // Keys that overflow to a score of -inf for entries 0 .. 39: the whole first block, and part of the
    // second.
    std::fill(x.q.begin(), x.q.end(), 1e30f);
    std::fill(x.k.begin(), x.k.begin() + 40 * 8, -1e30f);
    std::fill(x.k.begin() + 40 * 8, x.k.end(), 0.0f);
    Cache cache(shape, 1, 96);
    const Floats out = attend(*backend, shape, {{&x, 0, 70, 0}}, &cache);
    bool nan_rows = true;
    int64_t wrong = 0;
    for (int64_t r = 0; r < 70; ++r) {
        for (int64_t d = 0; d < 8; ++d) {
            const float got = out[static_cast<size_t>(r * 8 + d)];
            if (r < 40) {
                nan_rows = nan_rows && std::isnan(got);
                continue;
            }
            double mean = 0.0;
            for (int64_t e = 40; e <= r; ++e)
                mean += static_cast<double>(x.v[static_cast<size_t>(e * 8 + d)]);
            mean /= static_cast<double>(r - 39);
            if (!within(got, mean, gamma_n(60))) ++wrong;
        }
    }
    CHECK(nan_rows);
    CHECK(wrong == 0);

    std::fill(x.k.begin(), x.k.begin() + 8, 1e30f);  // +inf: inf - inf
    Cache again(shape, 1, 96);
    const Floats inf_out = attend(*backend, shape, {{&x, 0, 70, 0}}, &again);
    CHECK(std::all_of(inf_out.begin(), inf_out.end(), [](float v) { return std::isnan(v); }));
}

TEST_CASE("ops: attention without rows") {
    const auto backend = make_cpu_backend(2, CpuIsa::scalar);
    const Shape shape{2, 1, 8};
    const Sequence none = make_sequence(shape, 0, 601);
    CHECK(attend(*backend, shape, {{&none, 0, 0, -1}, {&none, 0, 0, -1}}, nullptr).empty());
    CHECK(attend(*backend, shape, {}, nullptr).empty());
}
