// The op table: every op of ops/backend.h on every backend (the CPU's instruction sets, the CUDA kernels run
// on the host, and a GPU where there is one), held against the CPU's scalar loops.
//
// Inputs are whole multiples of 1/128 in [-1, 1], which bf16 and F16 hold exactly: so a backend that rounds
// activations to the weights' type computes with the same numbers, and a bound needs to cover orders of
// summation alone: two sums of n terms of at most 1 differ by at most 2 gamma(n) n (see ops_test.h).
#include <algorithm>
#include <array>
#include <functional>
#include <optional>

#include "backends_test.h"
#include "base/int8.h"
#include "models/kv_cache.h"
#include "refrag/sampler.h"

using namespace refrag_test;
using refrag::Arena;
using refrag::AttentionShape;
using refrag::Batch;
using refrag::BatchPlan;
using refrag::Buffer;
using refrag::KvCache;
using refrag::Pooling;
using refrag::Product;
using refrag::str;

namespace {

using Run = std::function<Floats(On&)>;

struct Bound {
    double absolute = 0.0;
    double relative = 0.0;
};

// on_cuda: where the CUDA backend's bound is another one.
void check(const std::string& what, const Bound& any_bound, const Run& run,
           std::optional<Bound> on_cuda = {}) {
    On reference(*every_backend()[0]);
    const Floats expected = run(reference);
    std::vector<Backend*> backends;
    for (const auto& backend : every_backend().subspan(1)) backends.push_back(backend.get());
    for (const auto& backend : every_backend(true)) {
        if (backend->device().description().starts_with("cuda")) backends.push_back(backend.get());
    }
    for (Backend* backend : backends) {
        const std::string name = backend->device().description();
        const Bound bound = on_cuda && name.starts_with("cuda") ? *on_cuda : any_bound;
        On on(*backend);
        const Floats got = run(on);
        REQUIRE(got.size() == expected.size());
        int64_t wrong = 0;
        double worst = 0.0;
        for (size_t i = 0; i < got.size(); ++i) {
            const auto e = static_cast<double>(expected[i]);
            if (within(got[i], e, bound.absolute + bound.relative * std::fabs(e))) continue;
            ++wrong;
            worst = std::max(worst, std::fabs(static_cast<double>(got[i]) - e));
        }
        CAPTURE(what);
        CAPTURE(name);
        CAPTURE(worst);
        CHECK(wrong == 0);
    }
}

// A weight matrix whose values are multiples of 1/128 too (I8: of 1/127).
std::unique_ptr<Matrix> matrix(Backend& b, DType dtype, int64_t out, int64_t in, uint32_t seed) {
    return matrix_of(b, dtype, out, in, exact_floats(out * in, seed));
}

constexpr std::array kDtypes = {DType::f32, DType::bf16, DType::f16, DType::i8};

}  // namespace

TEST_CASE("backends: rows are looked up, added and gathered exactly") {
    for (const DType dtype : kDtypes) {
        for (const int64_t dim : {7, 64, 300}) {
            const std::vector<int32_t> source = {3, -1, 0, 22, -3, 5, 5}, ids = {22, 0, 1, 2, 3, 4, 5};
            check(str("embed ", refrag::dtype_name(dtype)), {}, [&](On& on) {
                const auto table = matrix(on.b, dtype, 23, dim, 1);
                const Tensor out = on.empty(7, dim);
                on.b.embed(out, *table, on.put(source), on.put(random_floats(3 * dim, 2), 3, dim));
                on.b.add_embed(out, *table, on.put(ids));
                const Tensor some = on.empty(3, dim);
                on.b.gather_rows(some, out, on.put(std::vector<int32_t>{6, 0, 6}));
                Floats all = on.get(out), gathered = on.get(some);
                all.insert(all.end(), gathered.begin(), gathered.end());
                const Tensor copied = on.empty(3, dim);
                on.b.copy(copied, some);
                CHECK(same_bits(on.get(copied), gathered));
                return all;
            });
        }
    }
}

TEST_CASE("backends: products") {
    for (const DType dtype : kDtypes) {
        for (const auto& [out_dim, in_dim] :
             {std::pair<int64_t, int64_t>{37, 70}, {64, 256}, {3, 5}, {130, 33}}) {
            for (const int64_t rows : {1, 2, 3, 7, 8, 9, 40}) {
                // I8 weights are not exact in bf16: 2^-9 each where a backend rounds them, CUDA for many rows
                // alone. The CPU may round x instead, to 127ths of a group's largest: half a 127th.
                const double n = static_cast<double>(in_dim), sums = 2 * gamma_n(in_dim + 2) * (n + 2);
                const bool int8 = dtype == DType::i8;
                const Bound bound{sums + (int8 ? n / 254 : 0.0), 0.0};
                const Bound on_cuda{sums + (int8 && rows > 8 ? n * 0x1p-9 : 0.0), 0.0};
                const std::string what =
                    str(refrag::dtype_name(dtype), " ", rows, " x ", in_dim, " x ", out_dim);
                const Floats x = exact_floats(rows * in_dim, 3), bias = exact_floats(out_dim, 4);
                const auto product = [&](bool biased) {
                    return [&, biased](On& on) {
                        const auto w = matrix(on.b, dtype, out_dim, in_dim, 5);
                        const Tensor out = on.empty(rows, out_dim);
                        on.b.linear(out, on.put(x, rows, in_dim), *w,
                                    biased ? on.put(bias, 1, out_dim) : Tensor{});
                        return on.get(out);
                    };
                };
                check("linear " + what, bound, product(false), on_cuda);
                check("linear, bias " + what, bound, product(true), on_cuda);
                check(
                    "linear_add " + what, bound,
                    [&](On& on) {
                        const auto w = matrix(on.b, dtype, out_dim, in_dim, 5);
                        const Tensor out = on.put(exact_floats(rows * out_dim, 6), rows, out_dim);
                        on.b.linear_add(out, on.put(x, rows, in_dim),
                                        {on.empty(rows, out_dim), w.get(), on.put(bias, 1, out_dim)});
                        return on.get(out);
                    },
                    on_cuda);
            }
        }
    }
}

TEST_CASE("backends: fused products") {
    constexpr int64_t in_dim = 70;
    for (const DType dtype : {DType::f32, DType::bf16}) {
        for (const int64_t rows : {1, 40}) {
            const Floats x = exact_floats(rows * in_dim, 3), bias = exact_floats(48, 4);
            // gelu's and silu's slopes are below 1.13; the second factor of silu_mul is at most 71.
            const double one = 2 * gamma_n(in_dim + 2) * (in_dim + 2);
            check("linears", {one, 0.0}, [&](On& on) {
                const auto a = matrix(on.b, dtype, 48, in_dim, 5), b = matrix(on.b, dtype, 5, in_dim, 6);
                const std::array products = {Product{on.empty(rows, 48), a.get(), on.put(bias, 1, 48)},
                                             Product{on.empty(rows, 5), b.get(), Tensor{}}};
                on.b.linears(on.put(x, rows, in_dim), products);
                Floats all = on.get(products[0].out), second = on.get(products[1].out);
                all.insert(all.end(), second.begin(), second.end());
                return all;
            });
            check("linear_gelu", {2 * one, 1e-6}, [&](On& on) {
                const auto w = matrix(on.b, dtype, 48, in_dim, 5);
                const Tensor out = on.empty(rows, 48);
                on.b.linear_gelu(out, on.put(x, rows, in_dim), *w, on.put(bias, 1, 48));
                return on.get(out);
            });
            check("linear_silu_mul", {3 * 71 * one, 1e-6}, [&](On& on) {
                const auto gate = matrix(on.b, dtype, 48, in_dim, 5), up = matrix(on.b, dtype, 48, in_dim, 6);
                const Tensor out = on.empty(rows, 48);
                on.b.linear_silu_mul(on.put(x, rows, in_dim), {out, gate.get(), on.put(bias, 1, 48)},
                                     {on.empty(rows, 48), up.get(), Tensor{}});
                return on.get(out);
            });
        }
    }
}

TEST_CASE("backends: element by element, over fp32's range") {
    Floats x = {0.0f, -0.0f, 1e-30f, -1e-30f, 0.5f, -0.5f, 5.9f, -5.9f, 88.0f, -88.0f, 1e30f, kInf, kNan};
    const Floats more = random_floats(1000, 7, 12.0f);
    x.insert(x.end(), more.begin(), more.end());
    const auto n = std::ssize(x);
    const Floats y = random_floats(n, 8);
    check("gelu", {1e-13, 1e-6}, [&](On& on) {
        const Tensor t = on.put(x, 1, n);
        on.b.gelu(t);
        return on.get(t);
    });
    check("tanh", {0.0, 6e-7}, [&](On& on) {
        const Tensor t = on.put(x, 1, n);
        on.b.tanh(t);
        return on.get(t);
    });
    check("silu_mul", {1e-37, 1e-6}, [&](On& on) {
        const Tensor t = on.put(x, 1, n);
        on.b.silu_mul(t, on.put(y, 1, n));
        return on.get(t);
    });
    check("add", {}, [&](On& on) {
        const Tensor t = on.put(x, 1, n);
        on.b.add(t, on.put(y, 1, n));
        return on.get(t);
    });
    check("add to every row", {}, [&](On& on) {
        const Tensor t = on.put(random_floats(5 * 33, 9), 5, 33);
        on.b.add(t, on.put(random_floats(33, 10), 1, 33));
        return on.get(t);
    });
}

TEST_CASE("backends: norms") {
    for (const int64_t n : {1, 33, 256, 1000}) {
        constexpr int64_t rows = 5;
        Floats x = random_floats(rows * n, 11, 3.0f);
        for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(n + i)] += 100.0f;   // a large mean
        for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(2 * n + i)] = 0.0f;  // nothing at all
        x[static_cast<size_t>(3 * n)] = kNan;
        const Floats w = random_floats(n, 12), b = random_floats(n, 13);
        // Sums of squares in another order: gamma(n) relative, halved by the root; a distance from a mean of
        // 100 has that mean's error, 100 gamma(n), against a deviation of about 1.7;
        // one value is its own mean, exactly.
        const double sums = gamma_n(n + 8);
        check("rms_norm", {0.0, 2 * sums}, [&](On& on) {
            const Tensor out = on.empty(rows, n);
            on.b.rms_norm(out, on.put(x, rows, n), on.put(w, 1, n), 1e-6f);
            return on.get(out);
        });
        check("layer_norm", {n == 1 ? 0.0 : 300 * sums, 4 * sums}, [&](On& on) {
            const Tensor t = on.put(x, rows, n);
            on.b.layer_norm(t, t, on.put(w, 1, n), on.put(b, 1, n), 1e-5f);
            return on.get(t);
        });
        for (const float scale : {1.0f, 1e-13f, 1e15f}) {
            Floats scaled = x;
            for (float& v : scaled) v *= scale;
            check("l2_normalize", {0.0, 2 * sums}, [&](On& on) {
                const Tensor t = on.put(scaled, rows, n);
                on.b.l2_normalize(t);
                return on.get(t);
            });
        }
    }
}

TEST_CASE("backends: rope") {
    for (const int64_t dim : {2, 8, 64, 96}) {
        constexpr int64_t rows = 4;
        Floats freq(static_cast<size_t>(dim / 2));
        for (size_t i = 0; i < freq.size(); ++i) {
            freq[i] = std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(dim));
        }
        const Floats position = {0.0f, 1.0f, 4097.0f, 131071.0f};
        // Sine and cosine within 2 ulp of values at most 1; products and a sum of values at most 1.
        check("rope", {16 * kEps, 0.0}, [&](On& on) {
            const Tensor table = on.empty(rows, dim),
                         x = on.put(random_floats(rows * 3 * dim, 14), rows, 3 * dim);
            on.b.rope_table(table, on.put(position, 1, rows).f32(), on.put(freq, 1, dim / 2));
            on.b.rope(x, table);
            Floats all = on.get(table), rotated = on.get(x);
            all.insert(all.end(), rotated.begin(), rotated.end());
            return all;
        });
    }
}

namespace {

struct AttentionCase {
    int32_t heads, kv_heads, dim;
    DType weights;
};

// Two calls: prompts of several lengths, then more rows for some of the slots; with and without rotation.
Floats attend(On& on, const AttentionCase& c, bool rotates) {
    const DType kv = on.b.device().kv_dtype(c.weights, c.dim);
    KvCache cache(on.b, 4, 2, c.kv_heads, c.dim, 200, kv);
    const AttentionShape shape{c.heads, c.kv_heads, c.dim, 1.0f / std::sqrt(static_cast<float>(c.dim)),
                               c.weights};
    const int32_t calls[2][4] = {{70, 1, 0, 17}, {1, 33, 5, 1}};
    Floats all;
    uint32_t seed = 20;
    for (const auto& call : calls) {
        BatchPlan plan;
        for (int32_t slot = 0; slot < 4; ++slot) {
            cache.reserve(slot, call[slot]);
            plan.add_cached(slot, cache.length(slot), call[slot]);
        }
        const int64_t rows = plan.n_rows(), q_cols = int64_t{c.heads} * c.dim,
                      k_cols = int64_t{c.kv_heads} * c.dim;
        const Tensor q = on.put(exact_floats(rows * q_cols, seed), rows, q_cols);
        const Tensor k = on.put(exact_floats(rows * k_cols, seed + 1), rows, k_cols);
        const Tensor v = on.put(exact_floats(rows * k_cols, seed + 2), rows, k_cols);
        const Tensor out = on.empty(rows, q_cols), table = on.empty(rows, c.dim);
        seed += 3;
        const Batch batch = plan.upload(on.b, on.arena);
        const refrag::KvView view = cache.view();
        if (rotates) {
            Floats freq(static_cast<size_t>(c.dim / 2), 0.25f);
            on.b.rope_table(table, batch.position, on.put(freq, 1, c.dim / 2));
            on.b.rope_kv_append(view, 1, q, k, v, table, batch);
        } else {
            on.b.kv_append(view, 1, k, v, batch);
        }
        on.b.attention(out, q, k, v, shape, &view, 1, batch);
        for (int32_t slot = 0; slot < 4; ++slot) cache.advance(slot, call[slot]);
        const Floats result = on.get(out);
        all.insert(all.end(), result.begin(), result.end());
    }
    return all;
}

}  // namespace

TEST_CASE("backends: attention over a cache") {
    for (const bool rotates : {false, true}) {
        for (const AttentionCase& c : {AttentionCase{2, 2, 8, DType::f32},
                                       {4, 2, 40, DType::f32},
                                       {2, 1, 64, DType::bf16},
                                       {4, 1, 128, DType::bf16},
                                       {2, 2, 80, DType::f16},
                                       {3, 1, 24, DType::bf16}}) {
            // In fp32 (see test_ops_attention.cpp): scores to gamma(dim + 2) dim / sqrt(dim), weights and
            // sums to a few gamma(entries), values at most 1. In 16 bits a weight has 2^-8 (above the line
            // alone), and q * scale, which no longer is exact, and rotated keys have 2^-9 of each score: |s|
            // is at most sqrt(dim).
            const double dim = c.dim, scores = gamma_n(c.dim + 4) * std::sqrt(dim) + 16 * kEps;
            const double rounding = c.weights == DType::f32 ? 0.0 : 0x1p-8 + 2 * 0x1p-8 * std::sqrt(dim);
            check(str("attention ", c.heads, "/", c.kv_heads, " of ", c.dim, " ",
                      refrag::dtype_name(c.weights)),
                  {2 * scores + 4 * gamma_n(200) + rounding, 0.0},
                  [&](On& on) { return attend(on, c, rotates); });
        }
    }
}

TEST_CASE("backends: attention without a cache") {
    for (const AttentionCase& c : {AttentionCase{2, 2, 8, DType::f32},
                                   {3, 3, 64, DType::bf16},
                                   {2, 2, 32, DType::f16},
                                   {2, 2, 48, DType::bf16}}) {
        const double dim = c.dim, scores = gamma_n(c.dim + 4) * std::sqrt(dim) + 16 * kEps;
        const double rounding = c.weights == DType::f32 ? 0.0 : 0x1p-8 + 2 * 0x1p-8 * std::sqrt(dim);
        check(str("encoder attention of ", c.dim), {2 * scores + 4 * gamma_n(200) + rounding, 0.0},
              [&](On& on) {
                  BatchPlan plan;
                  for (const int32_t rows : {16, 1, 40, 18, 0, 130}) plan.add_encoder(rows);
                  const int64_t rows = plan.n_rows(), cols = int64_t{c.heads} * c.dim;
                  const Tensor q = on.put(exact_floats(rows * cols, 30), rows, cols);
                  const Tensor k = on.put(exact_floats(rows * cols, 31), rows, cols);
                  const Tensor v = on.put(exact_floats(rows * cols, 32), rows, cols);
                  const Tensor out = on.empty(rows, cols);
                  const AttentionShape shape{c.heads, c.kv_heads, c.dim,
                                             1.0f / std::sqrt(static_cast<float>(c.dim)), c.weights};
                  on.b.attention(out, q, k, v, shape, nullptr, 0, plan.upload(on.b, on.arena));
                  return on.get(out);
              });
    }
}

TEST_CASE("backends: pooling and log-likelihood") {
    for (const int64_t n : {1, 65, 1000}) {
        // Sums of up to 17 rows, in one order everywhere; a product with 1 / rows.
        check("pool", {0.0, 2 * kEps}, [&](On& on) {
            BatchPlan plan;
            for (const int32_t rows : {1, 17, 3}) plan.add_encoder(rows);
            const Tensor x = on.put(random_floats(21 * n, 40), 21, n), cls = on.empty(3, n),
                         mean = on.empty(3, n);
            const Batch batch = plan.upload(on.b, on.arena);
            on.b.pool(cls, x, batch, Pooling::cls);
            on.b.pool(mean, x, batch, Pooling::mean);
            Floats all = on.get(cls), means = on.get(mean);
            all.insert(all.end(), means.begin(), means.end());
            return all;
        });
        Floats logits = random_floats(4 * n, 41, 20.0f);
        logits[static_cast<size_t>(n)] = -kInf;
        logits[static_cast<size_t>(2 * n)] = kNan;
        logits[static_cast<size_t>(3 * n)] = kInf;
        // exp within 2 ulp, the sum in double, the result rounded at a size of up to 50.
        check("nll", {8 * 50 * kEps, 0.0}, [&](On& on) {
            const Tensor out = on.empty(1, 4);
            const auto last = static_cast<int32_t>(n - 1);
            on.b.nll(out, on.put(logits, 4, n), on.put(std::vector<int32_t>{0, last, 0, last}));
            return on.get(out);
        });
    }
}

TEST_CASE("backends: the largest logits, with their ids") {
    for (const int64_t cols : {1, 5, 1000, 9000}) {
        for (const int64_t n : {int64_t{1}, std::min<int64_t>(cols, 7), std::min<int64_t>(cols, 128)}) {
            constexpr int64_t rows = 5;
            Floats logits = exact_floats(rows * cols, 60);  // few values, many equal
            for (int64_t i = 0; i < cols; ++i) logits[static_cast<size_t>(cols + i)] = 1.0f;
            logits[static_cast<size_t>(3 * cols - 1)] = kNan;
            logits[static_cast<size_t>(2 * cols)] = kInf;
            for (int64_t i = 0; i < cols; ++i) logits[static_cast<size_t>(3 * cols + i)] = -kInf;
            check(str("top ", n, " of ", cols), {}, [&](On& on) {
                const Tensor values = on.empty(rows, n);
                int32_t* const ids = on.put(std::vector<int32_t>(static_cast<size_t>(rows * n), -1));
                on.b.top_logits(values, ids, on.put(logits, rows, cols));
                Floats all = on.get(values);
                std::vector<int32_t> found(static_cast<size_t>(rows * n));
                on.b.download(found.data(), ids, found.size() * sizeof(int32_t));
                for (const int32_t id : found) all.push_back(static_cast<float>(id));
                return all;
            });
        }
    }
}

TEST_CASE("backends: tokens are drawn where the logits are as the sampler draws them") {
    int drawn = 0, refused = 0;
    for (const auto& backend : every_backend()) {
        if (!backend->device().is_remote()) continue;
        CAPTURE(backend->device().description());
        On on(*backend);
        for (const int64_t cols : {150, 9000}) {
            for (int round = 0; round < 40; ++round) {
                refrag::SamplerOptions options;
                // From a few likely tokens to nearly as many as there are.
                options.temperature = round == 0       ? 0.0f
                                      : round % 3 == 0 ? 0.05f
                                      : round % 3 == 1 ? 0.5f
                                                       : 3.0f;
                options.top_k = round % 4 == 0 ? 1 + round : 0;
                options.top_p = round % 5 < 2 ? 0.7f : 1.0f;
                options.min_p = round % 7 < 2 ? 0.1f : 0.0f;
                options.seed = static_cast<uint64_t>(round);
                refrag::Sampler host(options), here(options);
                const Floats row = random_floats(cols, static_cast<uint32_t>(70 + round), 8.0f);
                for (int i = 0; i < 2; ++i) {
                    CAPTURE(cols);
                    CAPTURE(round);
                    const auto draw = here.draw_elsewhere();
                    REQUIRE(draw.has_value());
                    const Tensor draws = on.arena.tensor(1, sizeof *draw / 4), id = on.arena.tensor(1, 1);
                    on.b.upload(draws.data, &*draw, sizeof *draw);
                    on.b.draw(static_cast<int32_t*>(id.data), on.put(row, 1, cols),
                              static_cast<const refrag::TokenDraw*>(draws.data));
                    int32_t token = -2;
                    on.b.download(&token, id.data, sizeof token);
                    (token < 0 ? refused : drawn) += 1;
                    // What was refused is drawn from all logits, by the same number.
                    const int32_t expected = host.sample(row);
                    CHECK(here.sample(token < 0 ? refrag::Logits{row, {}} : refrag::Logits{{}, {}, token}) ==
                          expected);
                }
            }
        }
        for (const float broken : {kNan, kInf}) {
            Floats row = random_floats(200, 90);
            row[5] = broken;
            const refrag::TokenDraw draw{0.5, 1.0f, 1.0f, 0.0f, 0};
            const Tensor draws = on.arena.tensor(1, sizeof draw / 4), id = on.arena.tensor(1, 1);
            on.b.upload(draws.data, &draw, sizeof draw);
            on.b.draw(static_cast<int32_t*>(id.data), on.put(row, 1, 200),
                      static_cast<const refrag::TokenDraw*>(draws.data));
            int32_t token = -2;
            on.b.download(&token, id.data, sizeof token);
            CHECK(token == -1);
        }
    }
    CHECK(drawn > 100);
    CHECK(refused > 0);
}

TEST_CASE("backends: no rows are no work") {
    for (const auto& backend : every_backend()) {
        CAPTURE(backend->device().description());
        On on(*backend);
        const Tensor none{nullptr, DType::f32, 0, 16}, w = on.put(Floats(16, 1.0f), 1, 16);
        const auto square = matrix(on.b, DType::bf16, 16, 16, 1), deep = matrix(on.b, DType::f32, 16, 0, 1);
        on.b.linear(none, none, *square, w);
        on.b.linear_add(none, none, {none, square.get(), w});
        on.b.embed(none, *square, nullptr, Tensor{});
        on.b.gather_rows(none, w, nullptr);
        on.b.gelu(none);
        on.b.silu_mul(none, none);
        on.b.add(none, none);
        on.b.rms_norm(none, none, w, 1e-5f);
        on.b.layer_norm(none, none, w, w, 1e-5f);
        on.b.l2_normalize(none);
        on.b.rope(none, none);
        on.b.pool(none, none, Batch{}, Pooling::mean);
        on.b.attention(none, none, none, none, {1, 1, 16, 1.0f, DType::f32}, nullptr, 0, Batch{});
        // A product over no k is the bias.
        const Tensor out = on.empty(20, 16);
        on.b.linear(out, Tensor{nullptr, DType::f32, 20, 0}, *deep, w);
        CHECK(same_bits(on.get(out), Floats(20 * 16, 1.0f)));
    }
}

TEST_CASE("backends: recorded work is done with what memory holds then, and survives what else happens") {
    for (const auto& backend : every_backend()) {
        CAPTURE(backend->device().description());
        const bool records = backend->device().is_remote();
        On on(*backend);
        const Tensor x = on.empty(3, 40), y = on.empty(3, 40);
        const std::unique_ptr<refrag::Recording> recording = on.b.make_recording();
        int enqueued = 0;
        uint32_t seed = 50;
        const auto check = [&](uint64_t key) {
            const Floats values = random_floats(120, seed++);
            on.b.upload(x.data, values.data(), x.bytes());
            on.b.replay(*recording, key, [&] {
                ++enqueued;
                on.b.copy(y, x);
                on.b.add(y, x);
            });
            Floats twice = values;
            for (float& v : twice) v += v;
            CHECK(same_bits(on.get(y), twice));
        };
        for (const uint64_t key : {0, 0, 0, 1, 0}) check(key);
        // A GPU's first call of a key runs, its second is recorded, and then it is replayed.
        CHECK(enqueued == (records ? 3 : 5));
        { const Buffer other(on.b, 1 << 20); }
        on.b.make_recording();
        check(0);
        CHECK(enqueued == (records ? 3 : 6));
        CHECK(recording->counts().run == (records ? 2 : 6));
        CHECK(recording->counts().recorded == (records ? 1 : 0));
        CHECK(recording->counts().replayed == (records ? 3 : 0));
        recording->forget();
        check(0);
        CHECK(enqueued == (records ? 4 : 7));
    }
}

TEST_CASE("backends: recorded work whose scratch has moved is recorded anew, other work is not") {
    const auto backend = refrag_on_host::open_backend();
    On on(*backend);
    const auto w = matrix(on.b, DType::bf16, 24, 40, 9);
    // Ten rows go through cuBLAS, x rounded in scratch; two do not.
    const Floats values = random_floats(400, 3);
    const Tensor x = on.put(values, 10, 40), out = on.empty(10, 24), few = on.empty(2, 24);
    const std::unique_ptr<refrag::Recording> recording = on.b.make_recording();
    const auto many_rows = [&] { on.b.linear(out, x, *w, Tensor{}); };
    const auto few_rows = [&] { on.b.linear(few, x.row_slice(0, 2), *w, Tensor{}); };
    for (int i = 0; i < 3; ++i) {
        on.b.replay(*recording, 10, many_rows);
        on.b.replay(*recording, 2, few_rows);
    }
    CHECK(recording->counts().replayed == 2);
    const Floats expected = on.get(out), expected_few = on.get(few);
    const Tensor large = on.empty(64, 40), large_out = on.empty(64, 24);
    on.b.linear(large_out, large, *w, Tensor{});  // more scratch than there was
    on.b.replay(*recording, 10, many_rows);
    on.b.replay(*recording, 2, few_rows);
    CHECK(recording->counts().run == 3);
    CHECK(recording->counts().recorded == 2);
    CHECK(recording->counts().replayed == 3);
    CHECK(same_bits(on.get(out), expected));
    CHECK(same_bits(on.get(few), expected_few));
}

TEST_CASE("backends: memory that is not there is an error with both numbers") {
    const auto small = refrag_on_host::open_backend({.memory_fraction = 0.5, .memory_bytes = 200 << 20});
    CHECK(small->device().available_bytes() == (100 << 20) - (32 << 20));  // cuBLAS has its workspace
    const Buffer half(*small, 40 << 20);
    CHECK(small->device().available_bytes() == 28 << 20);
    try {
        const Buffer more(*small, 29 << 20);
        CHECK(false);
    } catch (const refrag::Error& error) {
        CHECK(error.status() == refrag::Status::out_of_memory);
        CHECK(
            error.message() ==
            "GPU memory: 30408704 bytes (29 MiB) needed, 29360128 bytes (28 MiB) left of the 104857600 bytes "
            "(100 MiB) that this process may take");
    }
    const Buffer rest(*small, 28 << 20);
    CHECK(contains(error_of([] { refrag_on_host::open_backend({.memory_fraction = 1.5}); }),
                   "GPU memory fraction: expected a number above 0, at most 1, found 1.5"));
}
