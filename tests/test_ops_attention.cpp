// KV cache writes and attention over ragged batches, against a double-precision softmax
// (ops_attention_test.h, where the bound is).
#include <array>

#include "failing.h"
#include "ops_attention_test.h"

using namespace refrag_test;
using namespace refrag_test::ops_attention;
using refrag::make_cpu_backend;

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

TEST_CASE_TEMPLATE("ops: linears_rope_kv_append is its definition", T, Scalar, Avx2, Avx512, Avx512Bf16,
                   Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    constexpr int64_t depth = 50;
    for (const DType dtype : {DType::bf16, DType::f32}) {
        for (const int32_t dim : {32, 40, 64, 96, 320}) {
            for (const int32_t rows : {1, 3, 40, 300}) {
                CAPTURE(dim);
                CAPTURE(rows);
                const Shape shape{5, 2, dim};
                const int64_t q_cols = int64_t{5} * dim, k_cols = int64_t{2} * dim;
                const FileMatrix q_file(dtype, q_cols, depth, 1), k_file(dtype, k_cols, depth, 2),
                    v_file(dtype, k_cols, depth, 3);
                const auto q_w = q_file.make(*backend), k_w = k_file.make(*backend),
                           v_w = v_file.make(*backend);
                Floats x = random_floats(rows * depth, 4), bias = random_floats(k_cols, 5);
                Floats table = random_floats(int64_t{rows} * dim, 6), position(static_cast<size_t>(rows));
                const std::vector<int32_t> row_begin = {0, rows}, start = {0}, slot = {0};
                const Batch batch{1,           rows,           rows, rows, row_begin.data(), start.data(),
                                  slot.data(), position.data()};
                Cache caches[] = {Cache(shape, 1, 320), Cache(shape, 1, 320)};
                Floats out[2][3];
                for (size_t i = 0; i < 2; ++i) {
                    out[i][0].assign(static_cast<size_t>(rows * q_cols), kNan);
                    out[i][1].assign(static_cast<size_t>(rows * k_cols), kNan);
                    out[i][2] = out[i][1];
                    const std::array qkv = {
                        refrag::Product{view(out[i][0], rows, q_cols), q_w.get(), Tensor{}},
                        refrag::Product{view(out[i][1], rows, k_cols), k_w.get(), view(bias, 1, k_cols)},
                        refrag::Product{view(out[i][2], rows, k_cols), v_w.get(), Tensor{}}};
                    const refrag::KvView kv = caches[i].view();
                    const Tensor cos_sin = view(table, rows, dim);
                    if (i == 0)
                        backend->linears_rope_kv_append(kv, 0, view(x, rows, depth), qkv, cos_sin, batch);
                    else
                        backend->Backend::linears_rope_kv_append(kv, 0, view(x, rows, depth), qkv, cos_sin,
                                                                 batch);
                }
                for (size_t i = 0; i < 3; ++i) CHECK(same_bits(out[0][i], out[1][i]));
                int64_t wrong = 0;
                for (int32_t e = 0; e < rows; ++e) {
                    for (int32_t d = 0; d < 2 * dim; ++d) {
                        const float one = caches[0].at(0, 0, 1, e, d / dim, d % dim);
                        if (!same_bits(one, caches[1].at(0, 0, 1, e, d / dim, d % dim))) ++wrong;
                    }
                }
                CHECK(wrong == 0);
            }
        }
    }
}

TEST_CASE_TEMPLATE("ops: causal attention over ragged batches", T, Scalar, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const Shape plain :
         {Shape{2, 2, 8}, Shape{2, 1, 48}, Shape{4, 1, 64}, Shape{8, 1, 80}, Shape{2, 2, 128},
          Shape{3, 3, 17}, Shape{8, 2, 16}, Shape{8, 1, 32}, Shape{1, 1, 96}, Shape{2, 2, 40},
          Shape{4, 2, 64, DType::f32, 1}, Shape{2, 2, 17, DType::f32, 31}, Shape{8, 1, 32, DType::f32, 32},
          Shape{4, 1, 64, DType::f32, 45}, Shape{2, 1, 48, DType::f32, 1000}}) {
        const Shape shape = on<T>(plain);
        CAPTURE(shape.window);
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

TEST_CASE_TEMPLATE("ops: encoder attention sees its whole sequence and no other", T, Scalar, Avx2, Avx512,
                   Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const Shape plain : {Shape{2, 2, 8}, Shape{2, 2, 64}, Shape{4, 2, 48}, Shape{2, 2, 80},
                              Shape{12, 12, 32}, Shape{4, 1, 96}}) {
        const Shape shape = on<T>(plain);
        CAPTURE(shape.dim);
        std::vector<Sequence> x;
        for (const int64_t rows : {1, 3, 0, 16, 18, 31, 32, 33, 65, 130, 300}) {
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

TEST_CASE_TEMPLATE("ops: prefill, split prefill and decode give the same bits", T, Scalar, Avx2, Avx512,
                   Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    for (const Shape plain : {Shape{2, 2, 64}, Shape{8, 2, 16}, Shape{4, 1, 17}, Shape{8, 1, 32},
                              Shape{4, 2, 64, DType::f32, 40}, Shape{3, 1, 17, DType::f32, 33}}) {
        const Shape shape = on<T>(plain);
        CAPTURE(shape.window);
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

TEST_CASE_TEMPLATE("ops: what a row does not see cannot reach it", T, Scalar, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const Shape plain : {Shape{4, 2, 64}, Shape{2, 2, 17}, Shape{8, 4, 32},
                              Shape{4, 2, 64, DType::f32, 9}, Shape{2, 2, 17, DType::f32, 20}}) {
        const Shape shape = on<T>(plain);
        CAPTURE(shape.window);
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
                const bool is_near = shape.window == 0 || r - bad < shape.window;
                const bool reads = r >= bad && r < rows && is_near && c / shape.dim < group;
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

TEST_CASE_TEMPLATE("ops: scores of -inf and +inf", T, Scalar, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(1, T::isa);
    const Shape shape = on<T>({1, 1, 32});
    const int64_t dim = shape.dim;
    Sequence x = make_sequence(shape, 70, 501);
    // Keys that overflow to a score of -inf for entries 0 .. 39: the whole first block, and part of the
    // second.
    std::fill(x.q.begin(), x.q.end(), 1e30f);
    std::fill(x.k.begin(), x.k.begin() + 40 * dim, -1e30f);
    std::fill(x.k.begin() + 40 * dim, x.k.end(), 0.0f);
    Cache cache(shape, 1, 96);
    const Floats out = attend(*backend, shape, {{&x, 0, 70, 0}}, &cache);
    const Sequence used = as_multiplied(shape, x);
    bool nan_rows = true;
    int64_t wrong = 0;
    for (int64_t r = 0; r < 70; ++r) {
        for (int64_t d = 0; d < dim; ++d) {
            const float got = out[static_cast<size_t>(r * dim + d)];
            if (r < 40) {
                nan_rows = nan_rows && std::isnan(got);
                continue;
            }
            double mean = 0.0;
            for (int64_t e = 40; e <= r; ++e)
                mean += static_cast<double>(used.v[static_cast<size_t>(e * dim + d)]);
            mean /= static_cast<double>(r - 39);
            // All weights are 1, or the same power's error.
            if (!within(got, mean, gamma_n(60) + (shape.bf16() ? 0x1p-8 + 2.0 * 7.6e-5 : 0.0))) ++wrong;
        }
    }
    CHECK(nan_rows);
    CHECK(wrong == 0);

    std::fill(x.k.begin(), x.k.begin() + dim, 1e30f);  // +inf: inf - inf
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
TEST_CASE_TEMPLATE("ops: entries beyond a split: one call, several, decode, any threads", T, Avx2, Avx512Bf16,
                   Amx) {
    REQUIRE_ISA(T);
    for (const Shape plain : {Shape{4, 1, 64}, Shape{2, 2, 32}, Shape{2, 1, 64, DType::f32, 700}}) {
        const Shape shape = on<T>(plain);
        CAPTURE(shape.window);
        const int64_t cols = shape.heads * shape.dim, rows = 2100;
        const Sequence x = make_sequence(shape, rows, 631);
        Cache whole_cache(shape, 1, rows);
        const Floats whole = attend(*make_cpu_backend(2, T::isa), shape, {{&x, 0, rows, 0}}, &whole_cache);
        for (const int64_t at : {0, 1023, 1024, 2099}) {
            CHECK(count_wrong(shape, x, at, 1, true, whole.data() + at * cols) == 0);
        }
        for (const int threads : {1, 2, 3, 16}) {
            const auto backend = make_cpu_backend(threads, T::isa);
            Cache cache(shape, 1, rows);
            int64_t wrong = 0;
            const std::array<int64_t, 8> ends = {1000, 1023, 1024, 1025, 1060, 2047, 2099, 2100};
            int64_t begin = 0;
            for (const int64_t end : ends) {
                const Floats part = attend(*backend, shape, {{&x, begin, end - begin, 0}}, &cache);
                if (!same_bits(part, rows_of(whole, begin, end - begin, cols))) ++wrong;
                begin = end;
            }
            CHECK(wrong == 0);
        }
    }
}

TEST_CASE_TEMPLATE("ops: what a slot held before it was cut back cannot reach a row", T, Avx512, Avx512Bf16,
                   Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    const Shape shape = on<T>({4, 2, 64});
    const Sequence x = make_sequence(shape, 60, 641);
    Sequence nan = x;
    for (Floats* part : {&nan.k, &nan.v}) std::fill(part->begin(), part->end(), kNan);
    Cache clean(shape, 1, 96), stale(shape, 1, 96);
    const Floats expected = attend(*backend, shape, {{&x, 0, 41, 0}}, &clean);
    attend(*backend, shape, {{&nan, 0, 60, 0}}, &stale);
    stale.truncate(0, 0);
    CHECK(same_bits(attend(*backend, shape, {{&x, 0, 41, 0}}, &stale), expected));
    attend(*backend, shape, {{&nan, 41, 19, 0}}, &stale);
    stale.truncate(0, 41);
    for (int64_t r = 41; r < 60; ++r) {
        CHECK(same_bits(attend(*backend, shape, {{&x, r, 1, 0}}, &stale),
                        attend(*backend, shape, {{&x, r, 1, 0}}, &clean)));
    }
}

TEST_CASE_TEMPLATE("ops: an infinity in a value reaches the rows that see it", T, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    const Shape shape = on<T>({2, 1, 32});
    const int64_t rows = 300, bad = 261, cols = shape.heads * shape.dim;
    const Sequence clean = make_sequence(shape, rows, 651);
    Sequence x = clean;
    x.v[static_cast<size_t>(bad * shape.dim + 7)] = kInf;
    Cache cache(shape, 1, rows), cache_inf(shape, 1, rows);
    const Floats expected = attend(*backend, shape, {{&clean, 0, rows, 0}}, &cache);
    const Floats out = attend(*backend, shape, {{&x, 0, rows, 0}}, &cache_inf);
    bool right = true;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
            const auto at = static_cast<size_t>(r * cols + c);
            const bool reads = r >= bad && c % shape.dim == 7;
            right = right && (reads ? !std::isfinite(out[at]) : same_bits(out[at], expected[at]));
        }
    }
    CHECK(right);
}

TEST_CASE_TEMPLATE("ops: a decode step's attention allocates nothing", T, Scalar, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(3, T::isa);
    const Shape shape = on<T>({4, 1, 64});
    const int32_t entries = 2100;
    Sequence x = make_sequence(shape, entries, 661);
    Cache cache(shape, 2, entries + 8);
    attend(*backend, shape, {{&x, 0, entries, 0}, {&x, 0, 40, 1}}, &cache);
    Floats q = random_floats(2 * 256, 662), k = random_floats(2 * 64, 663), v = k, out(2 * 256);
    const std::vector<int32_t> row_begin = {0, 1, 2}, slot = {0, 1};
    const AttentionShape s{4, 1, 64, shape.scale(), shape.weights};
    int64_t asked = -1;
    for (int32_t step = 0; step < 3; ++step) {
        const std::vector<int32_t> start = {entries + step, 40 + step};
        const Batch batch{2, 2, 1, entries + step + 1, row_begin.data(), start.data(), slot.data(), nullptr};
        const Tensor kt = view(k, 2, 64), vt = view(v, 2, 64), qt = view(q, 2, 256), ot = view(out, 2, 256);
        FailingMemory memory(0);  // counts
        backend->kv_append(cache.view(), kLayer, kt, vt, batch);
        backend->attention(ot, qt, kt, vt, s, &cache.view(), kLayer, batch);
        memory.disarm();
        asked = memory.asked();
    }
    CHECK(asked == 0);
}
