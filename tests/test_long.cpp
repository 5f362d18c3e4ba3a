// Long contexts and wide products on the CUDA backend: many splits that are merged, many steps of a running
// softmax, rows of thousands of numbers. On a card at the sizes of published models; the kernels that run on
// the CPU get what they can bear. What holds the results is exact, so that a single page or a few weights
// that were left out show.
#include <array>

#include "backends_test.h"
#include "models/kv_cache.h"

using namespace refrag_test;
using refrag::AttentionShape;
using refrag::Batch;
using refrag::BatchPlan;
using refrag::KvCache;
using refrag::Product;
using refrag::str;

namespace {

using Open = std::unique_ptr<Backend> (*)(const CudaBackendOptions&);

// ---- attention
// ----------------------------------------------------------------------------------------------------

struct LongShape {
    int32_t heads, kv_heads, dim, entries;
    DType dtype;
};

// A prompt's last rows that begin at no multiple of 64, in a batch with a row alone and a short piece; or
// rows alone.
struct LongBatch {
    std::array<int32_t, 3> rows;
};

// q with q * scale * log2 e exact in 16 bits: what the kernels round then stays as it is, so that they and
// the plain kernel compute with the same numbers. Scores are at most dim / 4 in units of log2.
Floats exact_queries(int64_t n, int32_t dim, uint32_t seed) {
    Floats q = exact_floats(n, seed);
    const float factor = 1.0f / std::sqrt(static_cast<float>(dim)) * 0x1.715476p+0f;
    for (float& x : q) x = x * 0.25f / factor;
    return q;
}

// Element d of the values is 0 but for the pages e / 32 with e / 32 % dim = d. So each element of the result
// is the share of few pages, and one that is left out, or read twice, changes it by far more than any bound.
Floats marked_values(int32_t first, int32_t n, int32_t kv_heads, int32_t dim, uint32_t seed) {
    const Floats sizes = random_floats(int64_t{n} * kv_heads, seed);
    Floats v(static_cast<size_t>(n) * static_cast<size_t>(kv_heads * dim), 0.0f);
    for (int32_t e = 0; e < n; ++e) {
        for (int32_t h = 0; h < kv_heads; ++h) {
            const auto at = static_cast<size_t>(e * kv_heads + h);
            v[at * static_cast<size_t>(dim) + static_cast<size_t>((first + e) / 32 % dim)] =
                std::nearbyint(96.0f + 32.0f * sizes[at]) / 128.0f;
        }
    }
    return v;
}

Floats attend(Backend& backend, const LongShape& s, const LongBatch& batch) {
    constexpr int32_t kPiece = 2048;
    On on(backend);
    KvCache cache(backend, 3, 1, s.kv_heads, s.dim, s.entries, s.dtype);
    const int64_t q_cols = int64_t{s.heads} * s.dim, k_cols = int64_t{s.kv_heads} * s.dim;
    // The second slot is as long as the first, the third half as long.
    const std::array<int32_t, 3> entries = {s.entries, s.entries, s.entries / 2 + 1};
    Floats keys, values;
    for (int32_t slot = 0; slot < 3; ++slot) {
        const auto seed = static_cast<uint32_t>(100 * slot);
        for (int32_t held = 0; held < entries[static_cast<size_t>(slot)];) {
            const refrag::ArenaScope scope(on.arena);
            const int32_t n = std::min(kPiece, entries[static_cast<size_t>(slot)] - held);
            cache.reserve(slot, n);
            BatchPlan plan;
            plan.add_cached(slot, held, n);
            const auto of = seed + static_cast<uint32_t>(held / kPiece);
            const Tensor k = on.put(exact_floats(n * k_cols, of + 1), n, k_cols),
                         v = on.put(marked_values(held, n, s.kv_heads, s.dim, of + 2), n, k_cols);
            backend.kv_append(cache.view(), 0, k, v, plan.upload(backend, on.arena));
            cache.advance(slot, n);
            held += n;
        }
    }
    BatchPlan plan;
    for (int32_t slot = 0; slot < 3; ++slot) {
        const auto i = static_cast<size_t>(slot);
        plan.add_cached(slot, entries[i] - batch.rows[i], batch.rows[i]);
    }
    const int64_t rows = plan.n_rows();
    const Tensor q = on.put(exact_queries(rows * q_cols, s.dim, 7), rows, q_cols),
                 out = on.empty(rows, q_cols);
    // k and v of the call's own rows are read from the cache.
    const Tensor k = on.empty(rows, k_cols), v = on.empty(rows, k_cols);
    const AttentionShape shape{s.heads, s.kv_heads, s.dim, 1.0f / std::sqrt(static_cast<float>(s.dim)),
                               s.dtype};
    const refrag::KvView view = cache.view();
    backend.attention(out, q, k, v, shape, &view, 0, plan.upload(backend, on.arena));
    return on.get(out);
}

// Bound: cuda_attention_test.h's, for scores of at most dim / 4 in size and values >= 0, so that sum w |v| is
// the result itself. The plain kernel has the same without the rounding of the powers: E and gamma count once
// more.
void check_long_attention(Open open, const LongShape& s) {
    const auto fast = open({}), plain = open({.plain_attention = true});
    const double n = s.entries, steps = n / 16 + 1;
    const double e = std::log(2.0) * (gamma_n(s.dim + 2) + 4.0 * kEps) * s.dim / 4 + 0x1p-22 * (1 + steps);
    const double sums = 2.0 * (2.0 * e + 2.0 * gamma_n(static_cast<int64_t>(n + 2 * steps + 32)));
    for (const LongBatch& batch : {LongBatch{{70, 1, 3}}, LongBatch{{1, 1, 1}}}) {
        const bool rounds = s.dtype != DType::f32 && batch.rows[0] > 1;
        const double u = !rounds ? 0.0 : s.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
        const double small = rounds && s.dtype == DType::f16 ? 0x1p-25 * n : 0.0;
        const Floats got = attend(*fast, s, batch), expected = attend(*plain, s, batch);
        REQUIRE(got.size() == expected.size());
        int64_t wrong = 0, nothing = 0;
        double worst = 0.0;
        for (size_t i = 0; i < got.size(); ++i) {
            const auto x = static_cast<double>(expected[i]);
            nothing += x > 0.0 ? 0 : 1;
            worst = std::max(worst, std::fabs(static_cast<double>(got[i]) - x) / std::max(x, 1e-30));
            wrong += within(got[i], x, 1.01 * ((sums + u) * x + small)) ? 0 : 1;
        }
        CAPTURE(s.heads);
        CAPTURE(s.kv_heads);
        CAPTURE(s.dim);
        CAPTURE(s.entries);
        CAPTURE(batch.rows[0]);
        CAPTURE(worst);
        CAPTURE(sums);
        CHECK(wrong == 0);
        // No page of elements without any, where there are as many pages as elements.
        if (s.entries >= 64 * s.dim) CHECK(nothing == 0);
    }
}

// ---- products
// -----------------------------------------------------------------------------------------------------

// Whole numbers / 128 with 127 / 128 at the head of every 32, so that 8 bits hold them exactly as well.
Floats whole_weights(int64_t out_dim, int64_t in_dim) {
    Floats w = random_floats(out_dim * in_dim, 11, 127.0f);
    for (float& x : w) x = std::nearbyint(x);
    for (int64_t r = 0; r < out_dim; ++r) {
        for (int64_t k = 0; k < in_dim; k += refrag::kInt8Group)
            w[static_cast<size_t>(r * in_dim + k)] = 127.0f;
    }
    for (float& x : w) x /= 128.0f;
    return w;
}

// Sums are whole numbers / 128 below 2^24: exact in fp32, whatever the order and whatever is rounded. So
// every product must have the bits of the reference.
void check_wide_products(Open open, int64_t out_dim, int64_t in_dim, const std::vector<int64_t>& all_rows) {
    REQUIRE(in_dim * 2 * 127 < 1 << 24);
    const Floats w = whole_weights(out_dim, in_dim);
    const int64_t most = *std::max_element(all_rows.begin(), all_rows.end());
    Floats x = random_floats(most * in_dim, 12, 2.0f);
    for (float& v : x) v = std::nearbyint(v);
    Floats bias = exact_floats(out_dim, 13);
    Floats sums(static_cast<size_t>(most * out_dim));
    for (int64_t r = 0; r < most; ++r) {
        for (int64_t n = 0; n < out_dim; ++n) {
            float sum = 0.0f;
            for (int64_t k = 0; k < in_dim; ++k) {
                sum += x[static_cast<size_t>(r * in_dim + k)] * w[static_cast<size_t>(n * in_dim + k)];
            }
            sums[static_cast<size_t>(r * out_dim + n)] = sum;
        }
    }
    const auto plain = open({}), own = open({.own_product_rows = 16}), cublas = open({.own_product_rows = 0}),
               deterministic = open({.deterministic = true});
    for (const DType dtype : {DType::bf16, DType::f16, DType::i8, DType::f32}) {
        CAPTURE(refrag::dtype_name(dtype));
        for (Backend* const backend : {plain.get(), own.get(), cublas.get(), deterministic.get()}) {
            const auto matrix = matrix_of(*backend, dtype, out_dim, in_dim, w);
            for (const int64_t rows : all_rows) {
                CAPTURE(rows);
                On on(*backend);
                const Floats expected(sums.begin(), sums.begin() + rows * out_dim);
                const Tensor xs = on.put(Floats(x.begin(), x.begin() + rows * in_dim), rows, in_dim);
                const Tensor b = on.put(bias, 1, out_dim), out = on.empty(rows, out_dim),
                             more = on.empty(rows, out_dim);
                backend->linear(out, xs, *matrix, Tensor{});
                CHECK(same_bits(on.get(out), expected));

                Floats biased = expected, added;
                for (size_t i = 0; i < biased.size(); ++i) biased[i] += bias[i % bias.size()];
                const std::array products = {Product{out, matrix.get(), b},
                                             Product{more, matrix.get(), Tensor{}}};
                backend->linears(xs, products);
                CHECK(same_bits(on.get(out), biased));
                CHECK(same_bits(on.get(more), expected));

                added = biased;
                for (size_t i = 0; i < added.size(); ++i) added[i] += biased[i];
                backend->linear_add(out, xs, {more, matrix.get(), b});
                CHECK(same_bits(on.get(out), added));

                // silu has its own roundings: a few of fp32.
                backend->linear_silu_mul(xs, {out, matrix.get(), b}, {more, matrix.get(), Tensor{}});
                const Floats gated = on.get(out);
                int64_t wrong = 0;
                for (size_t i = 0; i < gated.size(); ++i) {
                    const auto gate = static_cast<double>(biased[i]);
                    const double want = gate / (1.0 + std::exp(-gate)) * static_cast<double>(expected[i]);
                    wrong += within(gated[i], want, 1e-6 * std::fabs(want) + 1e-30) ? 0 : 1;
                }
                CHECK(wrong == 0);
            }
        }
    }
}

}  // namespace

TEST_CASE("long: attention against the plain kernel, on the host") {
    if (gpu_alone() && skip("REFRAG_TEST_BACKENDS=cuda")) return;
    for (const LongShape& s : {LongShape{4, 1, 64, 257, DType::bf16}, LongShape{2, 2, 64, 129, DType::f16},
                               LongShape{2, 1, 64, 129, DType::f32}})
        check_long_attention(open_on_host, s);
}

TEST_CASE("card: attention of long contexts against the plain kernel") {
    if (!has_gpu() && skip("no GPU")) return;
    for (const LongShape& s :
         {LongShape{8, 8, 64, 16384, DType::f32}, LongShape{8, 2, 128, 4097, DType::f32}})
        check_long_attention(open_gpu, s);
    for (const int32_t dim : {64, 128}) {
        for (const int32_t kv_heads : {8, 2, 1}) {
            for (const int32_t entries : {129, 257, 4097, 16384})
                check_long_attention(open_gpu,
                                     {8, kv_heads, dim, entries, entries == 4097 ? DType::f16 : DType::bf16});
        }
    }
}

TEST_CASE("long: wide products are exact, on the host") {
    if (gpu_alone() && skip("REFRAG_TEST_BACKENDS=cuda")) return;
    check_wide_products(open_on_host, 37, 1376, {1, 2, 5, 9});
}

TEST_CASE("card: wide products are exact") {
    if (!has_gpu() && skip("no GPU")) return;
    check_wide_products(open_gpu, 4096, 11008, {1, 2, 3, 4, 5, 6, 7, 8, 9});
}
