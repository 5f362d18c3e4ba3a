// The attention kernel in fp32, run on the CPU, against a softmax in double (cuda_attention_test.h): prompts
// over a cache of any dtype and chunks without one, of any head_dim up to 256.
#include "cuda_attention_test.h"

using namespace refrag_test;
using namespace refrag_test::cuda_attention;

namespace {

Floats cached_fp32(const Call& call, int32_t least_rows = 1) {
    Floats out = call.untouched();
    gpu::attention_fp32(call.args(out), call.shape().dtype, least_rows, stream());
    return out;
}
Floats uncached_fp32(const Call& call) {
    Floats out = call.untouched();
    gpu::attention_fp32_uncached(call.args(out), stream());
    return out;
}

}  // namespace

TEST_CASE("cuda attention: in fp32, prompts over ragged batches") {
    uint64_t seed = 1;
    for (const Shape& shape :
         {Shape{4, 1, 64, DType::f32}, Shape{2, 2, 128, DType::f32}, Shape{2, 1, 8, DType::f32},
          Shape{1, 1, 7, DType::f32}, Shape{3, 1, 24, DType::bf16}, Shape{2, 1, 40, DType::f16},
          Shape{1, 1, 200, DType::bf16}, Shape{1, 1, 254, DType::f32}, Shape{2, 1, 256, DType::f16},
          Shape{2, 2, 13, DType::f32}, Shape{2, 1, 64, DType::f32, 1}, Shape{2, 2, 24, DType::bf16, 33},
          Shape{1, 1, 40, DType::f32, 20}}) {
        CAPTURE(shape.dim);
        CAPTURE(shape.heads);
        CAPTURE(shape.window);
        set_seed(seed++);
        const Call call(
            shape,
            {{1, 100}, {15, 33}, {0, 40}, {17, 15}, {20, 0, false}, {40, 0, true, 0}, {5, 60, true, 9}},
            static_cast<uint32_t>(10 * seed));
        check(call, cached_fp32(call), false, cached);
        if (shape.heads > 2) continue;
        check(call, cached_fp32(call, 16), false, [](const Part& p) { return p.cached && p.rows >= 16; });
    }
}

TEST_CASE("cuda attention: in fp32, sequences without a cache") {
    uint64_t seed = 1;
    for (const Shape& shape :
         {Shape{4, 2, 64, DType::f32}, Shape{2, 2, 32, DType::f32}, Shape{2, 1, 128, DType::f32},
          Shape{1, 1, 48, DType::f32}, Shape{1, 1, 9, DType::f32}, Shape{1, 1, 256, DType::f32}}) {
        CAPTURE(shape.dim);
        set_seed(seed++);
        const Call call(shape,
                        {{1, 0, false},
                         {15, 0, false},
                         {5, 9},
                         {16, 0, false},
                         {18, 0, false},
                         {0, 0, false},
                         {70, 0, false}},
                        static_cast<uint32_t>(seed * 11));
        check(call, uncached_fp32(call), false, [](const Part& p) { return !p.cached; });
    }
}

TEST_CASE(
    "cuda attention: in fp32, a prompt in one call and in several, alone and in a batch, gives the same "
    "bits") {
    const Shape shape{2, 1, 40, DType::f32};
    const Call whole(shape, {{75, 33}}, 41);
    set_seed(1);
    const Floats expected = cached_fp32(whole);
    for (uint64_t seed = 2; seed < 5; ++seed) {
        set_seed(seed);
        CHECK(same_bits(cached_fp32(whole), expected));
    }
    // Rows from `done` on: in another place of a block than in the whole, and beside other sequences.
    for (const int32_t done : {1, 16, 42, 74}) {
        CAPTURE(done);
        const int32_t cols = shape.heads * shape.dim;
        Call copy(shape, {{3, 50}, {75 - done, 33 + done}, {1, 0}}, 42);
        for (int32_t e = 0; e < 108; ++e) {
            for (int32_t d = 0; d < shape.dim; ++d) {
                copy.key(1, 0, e, d) = whole.key(0, 0, e, d);
                copy.value(1, 0, e, d) = whole.value(0, 0, e, d);
            }
        }
        std::copy(whole.q.begin() + done * cols, whole.q.end(), copy.q.begin() + copy.row_begin(1) * cols);
        copy.write_pages();
        CHECK(same_bits(rows_of(copy, cached_fp32(copy), 1),
                        Floats(expected.begin() + done * cols, expected.end())));
    }
}

TEST_CASE("cuda attention: in fp32, what a row does not see cannot reach it") {
    for (const int32_t window : {0, 25}) {
        CAPTURE(window);
        const Shape shape{2, 2, 12, DType::f32, window};
        // Entries before `start` are seen by all rows; others by those behind them.
        for (const auto& [start, bad] :
             {std::pair{20, 5}, {20, 21}, {20, 31}, {20, 32}, {20, 59}, {31, 32}, {32, 63}}) {
            CAPTURE(start);
            CAPTURE(bad);
            set_seed(static_cast<uint64_t>(bad));
            Call call(shape, {{40, start}, {20, 3}}, 51);
            const Floats clean = cached_fp32(call);
            const int32_t cols = shape.heads * shape.dim, first = bad - start;
            const auto count = [&](const Floats& out, const std::function<float(int32_t, float)>& expected) {
                int64_t wrong = 0;
                for (int32_t r = 0; r < call.n_rows(); ++r) {
                    for (int32_t c = 0; c < cols; ++c) {
                        const auto at = static_cast<size_t>(r * cols + c);
                        const bool is_near = window == 0 || r < first + window;
                        const bool reads = r < 40 && r >= first && is_near && c < shape.dim;
                        if (!same_bits(out[at], reads ? expected(c, clean[at]) : clean[at])) ++wrong;
                    }
                }
                return wrong;
            };
            const float key = std::exchange(call.key(0, 0, bad, 7), kNan);
            call.write_pages();
            CHECK(count(cached_fp32(call), [](int32_t, float) { return kNan; }) == 0);
            call.key(0, 0, bad, 7) = key;
            for (const float x : {kNan, kInf, -kInf}) {
                const float value = std::exchange(call.value(0, 0, bad, 6), x);
                call.write_pages();
                CHECK(count(cached_fp32(call), [&](int32_t c, float y) { return c == 6 ? x : y; }) == 0);
                call.value(0, 0, bad, 6) = value;
            }
        }
    }
}

TEST_CASE("cuda attention: in fp32, scores of -inf, and what is supported") {
    set_seed(6);
    Call call({1, 1, 64, DType::f32}, {{60, 0}}, 53);
    std::fill(call.q.begin(), call.q.end(), 1e30f);
    for (int32_t e = 0; e < 60; ++e) {
        for (int32_t d = 0; d < 64; ++d) call.key(0, 0, e, d) = e < 40 ? -1e30f : 0.0f;
    }
    call.write_pages();
    const Floats out = cached_fp32(call);
    int64_t wrong = 0;
    for (int32_t r = 0; r < 60; ++r) {
        for (int32_t d = 0; d < 64; ++d) {
            const float got = out[static_cast<size_t>(r * 64 + d)];
            if (r < 40) {
                wrong += std::isnan(got) ? 0 : 1;
                continue;
            }
            double mean = 0.0;
            for (int32_t e = 40; e <= r; ++e) mean += static_cast<double>(call.value(0, 0, e, d));
            wrong += within(got, mean / (r - 39), gamma_n(40)) ? 0 : 1;
        }
    }
    CHECK(wrong == 0);
    for (const int32_t dim : {1, 7, 64, 256}) CHECK(gpu::fp32_supports(dim));
    for (const int32_t dim : {0, 257}) CHECK(!gpu::fp32_supports(dim));
    for (const std::vector<Part>& parts : {std::vector<Part>{}, {{0, 0}}, {{0, 40}, {0, 0, false}}}) {
        const Call none({2, 1, 64, DType::f32}, parts, 81);
        CHECK(cached_fp32(none).empty());
        CHECK(uncached_fp32(none).empty());
    }
}
