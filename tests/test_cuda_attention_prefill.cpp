// The attention kernel for prompts, run on the CPU, against a softmax in double (cuda_attention_test.h).
#include "cuda_attention_test.h"

using namespace refrag_test;
using namespace refrag_test::cuda_attention;

TEST_CASE("cuda attention: prefill over ragged batches") {
    uint64_t seed = 1;
    for (const Shape& shape :
         {Shape{8, 1, 64, DType::bf16}, Shape{2, 1, 80, DType::bf16}, Shape{2, 2, 96, DType::bf16},
          Shape{4, 1, 128, DType::bf16}, Shape{4, 2, 64, DType::f16}, Shape{1, 1, 80, DType::f16},
          Shape{4, 1, 96, DType::f16}, Shape{1, 1, 128, DType::f16}, Shape{4, 2, 64, DType::bf16, 37},
          Shape{2, 1, 128, DType::bf16, 64}, Shape{1, 1, 80, DType::f16, 1}}) {
        CAPTURE(shape.dim);
        CAPTURE(shape.heads);
        set_seed(seed);
        const bool odd = seed++ % 2 != 0;
        const std::vector<Part> parts =
            odd ? std::vector<Part>{{1, 300}, {15, 33},       {0, 40},           {64, 1},
                                    {65, 31}, {20, 0, false}, {17, 100, true, 9}}
                : std::vector<Part>{{1, 0},  {16, 32}, {20, 0, false}, {63, 33}, {130, 0, true, 0},
                                    {1, 63}, {0, 0}};
        const Call call(shape, parts, static_cast<uint32_t>(10 * seed));
        check(call, prefill(call), true, cached);
        if (shape.heads <= 2) {
            check(call, prefill(call, 16), true, [](const Part& p) { return p.cached && p.rows >= 16; });
        }
    }
}

TEST_CASE("cuda attention: prefill of every length after every start") {
    set_seed(3);
    const Shape shape{1, 1, 64, DType::bf16};
    std::vector<Part> parts;
    for (const int32_t start : {0, 1, 31, 32, 33, 100, 300}) {
        for (const int32_t rows : {1, 15, 16, 17, 63, 64, 65, 130}) parts.push_back({rows, start});
    }
    for (const int32_t window : {0, 1, 63, 64, 65, 129}) {
        CAPTURE(window);
        const Call call({1, 1, 64, DType::bf16, window}, parts, 31);
        check(call, prefill(call), true, cached);
    }
    // The last page is full, and there is no page number behind it.
    const Call full(shape, {{64, 64}}, 32);
    check(full, prefill(full), true, cached);
}

TEST_CASE("cuda attention: prefill in one call and in several, alone and in a batch, gives the same bits") {
    for (const int32_t window : {0, 50}) {
        CAPTURE(window);
        const Shape shape{2, 1, 80, DType::bf16, window};
        const Call whole(shape, {{130, 33}}, 41);
        set_seed(1);
        const Floats expected = prefill(whole);
        for (uint64_t seed = 2; seed < 4; ++seed) {
            set_seed(seed);
            CHECK(same_bits(prefill(whole), expected));
        }
        // The rows from 77 on alone: what was before is in the cache.
        const int32_t done = 77, cols = shape.heads * shape.dim;
        const Call rest(shape, {{3, 50}, {130 - done, 33 + done}, {1, 0}}, 42);
        Call copy(shape, {{3, 50}, {130 - done, 33 + done}, {1, 0}}, 42);
        for (int32_t e = 0; e < 163; ++e) {
            for (int32_t d = 0; d < shape.dim; ++d) {
                copy.key(1, 0, e, d) = whole.key(0, 0, e, d);
                copy.value(1, 0, e, d) = whole.value(0, 0, e, d);
            }
        }
        std::copy(whole.q.begin() + done * cols, whole.q.end(), copy.q.begin() + copy.row_begin(1) * cols);
        copy.write_pages();
        const Floats out = prefill(copy);
        CHECK(same_bits(rows_of(copy, out, 1), Floats(expected.begin() + done * cols, expected.end())));
        CHECK(same_bits(rows_of(copy, out, 0), rows_of(rest, prefill(rest), 0)));
    }
}

TEST_CASE("cuda attention: in prefill, what a row does not see cannot reach it") {
    for (const Shape& shape : {Shape{2, 2, 64, DType::bf16}, Shape{1, 1, 96, DType::f16},
                               Shape{2, 2, 64, DType::bf16, 30}, Shape{1, 1, 96, DType::f16, 70}}) {
        // Entries before `start` are seen by all rows; at (62, 63) by all but the first, in a step that ends
        // there.
        for (const auto& place : {std::pair{20, 5},
                                  {20, 21},
                                  {20, 63},
                                  {20, 64},
                                  {20, 83},
                                  {20, 99},
                                  {62, 63},
                                  {63, 63},
                                  {64, 127}}) {
            const int32_t start = place.first, bad = place.second;
            CAPTURE(start);
            CAPTURE(bad);
            set_seed(static_cast<uint64_t>(bad));
            Call call(shape, {{80, start}, {20, 3}}, 51);
            const Floats clean = prefill(call);
            const int32_t cols = shape.heads * shape.dim, first = bad - start;
            const auto count = [&](const Floats& out, const std::function<float(int32_t, float)>& expected) {
                int64_t wrong = 0;
                for (int32_t r = 0; r < call.n_rows(); ++r) {
                    for (int32_t c = 0; c < cols; ++c) {
                        const auto at = static_cast<size_t>(r * cols + c);
                        const bool is_near = shape.window == 0 || r < first + shape.window;
                        const bool reads = r < 80 && r >= first && is_near && c < shape.dim;
                        const float value = reads ? expected(c, clean[at]) : clean[at];
                        if (!same_bits(out[at], value)) ++wrong;
                    }
                }
                return wrong;
            };
            // A key makes NaN of all elements, a value of its own.
            const float key = std::exchange(call.key(0, 0, bad, 7), kNan);
            call.write_pages();
            CHECK(count(prefill(call), [](int32_t, float) { return kNan; }) == 0);
            call.key(0, 0, bad, 7) = key;
            for (const float x : {kNan, kInf, -kInf}) {
                const float low = std::exchange(call.value(0, 0, bad, 6), x);
                const float high = std::exchange(call.value(0, 0, bad, 41), x);
                call.write_pages();
                CHECK(count(prefill(call), [&](int32_t c, float y) { return c == 6 || c == 41 ? x : y; }) ==
                      0);
                call.value(0, 0, bad, 6) = low;
                call.value(0, 0, bad, 41) = high;
            }
        }
    }
}

TEST_CASE("cuda attention: in prefill, infinities of both signs meet") {
    set_seed(5);
    Call call({1, 1, 64, DType::bf16}, {{40, 0}}, 52);
    call.value(0, 0, 10, 3) = kInf;
    call.value(0, 0, 12, 3) = -kInf;
    call.value(0, 0, 12, 4) = kNan;
    call.write_pages();
    const Floats out = prefill(call);
    for (int32_t r = 0; r < 40; ++r) {
        const float x = out[static_cast<size_t>(r * 64 + 3)], y = out[static_cast<size_t>(r * 64 + 4)];
        CHECK((r < 10 ? std::isfinite(x) : r < 12 ? x == kInf : std::isnan(x)));
        CHECK((r < 12 ? std::isfinite(y) : std::isnan(y)));
    }
}
