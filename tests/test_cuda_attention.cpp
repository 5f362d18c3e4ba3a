// The attention kernels: sequences without a cache, and what concerns several kernels; run on the CPU,
// against a softmax in double (cuda_attention_test.h).
#include "cuda_attention_test.h"

using namespace refrag_test;
using namespace refrag_test::cuda_attention;

TEST_CASE("cuda attention: sequences without a cache") {
    uint64_t seed = 1;
    for (const int32_t dim : {32, 64, 80, 96, 128}) {
        for (const DType dtype : {DType::bf16, DType::f16}) {
            const Shape shape = dim == 64 ? Shape{4, 2, dim, dtype} : Shape{2, dim == 80 ? 1 : 2, dim, dtype};
            CAPTURE(shape.dim);
            CAPTURE(shape.heads);
            set_seed(seed++);
            std::vector<Part> parts = {{1, 0, false},  {15, 0, false}, {5, 9},         {16, 0, false},
                                       {17, 0, false}, {0, 0, false},  {33, 0, false}, {64, 0, false}};
            if (dim == 64) parts.push_back({300, 0, false});
            const Call call(shape, parts, static_cast<uint32_t>(seed * 11));
            check(call, encode(call), true, [](const Part& p) { return !p.cached; });
        }
    }
}

TEST_CASE("cuda attention: a sequence without a cache has the bits that it has alone, and its own NaN") {
    const Shape shape{2, 2, 64, DType::bf16};
    Call batch(shape, {{18, 0, false}, {18, 0, false}, {40, 0, false}}, 71);
    const Floats out = encode(batch);
    Call alone(shape, {{18, 0, false}}, 72);
    alone.q = rows_of(batch, batch.q, 1);
    alone.k = rows_of(batch, batch.k, 1);
    alone.v = rows_of(batch, batch.v, 1);
    CHECK(same_bits(encode(alone), rows_of(batch, out, 1)));

    // NaN in the first sequence's keys, in an element of the last's values (head 1, element 5), and in a
    // query.
    std::fill(batch.k.begin(), batch.k.begin() + 18 * 128, kNan);
    batch.v[static_cast<size_t>((36 + 39) * 128 + 64 + 5)] = kNan;
    batch.q[static_cast<size_t>(20 * 128 + 3)] = kNan;
    const Floats bad = encode(batch);
    int64_t wrong = 0;
    for (size_t i = 0; i < out.size(); ++i) {
        const size_t row = i / 128, column = i % 128;
        const bool nan = row < 18 || (row == 20 && column < 64) || (row >= 36 && column == 64 + 5);
        wrong += same_bits(bad[i], nan ? kNan : out[i]) ? 0 : 1;
    }
    CHECK(wrong == 0);
}

TEST_CASE("cuda attention: scores of -inf without a cache") {
    const Shape shape{1, 1, 64, DType::bf16};
    Call call(shape, {{40, 0, false}}, 73);
    std::fill(call.q.begin(), call.q.end(), 1e30f);
    std::fill(call.k.begin(), call.k.begin() + 20 * 64, -1e30f);  // the first step, and part of the second
    std::fill(call.k.begin() + 20 * 64, call.k.end(), 0.0f);
    const Floats out = encode(call);
    int64_t wrong = 0;
    for (int32_t i = 0; i < 40 * 64; ++i) {
        double mean = 0.0;
        for (int32_t e = 20; e < 40; ++e) mean += static_cast<double>(call.value(0, 0, e, i % 64)) / 20.0;
        wrong += within(out[static_cast<size_t>(i)], mean, gamma_n(40)) ? 0 : 1;
    }
    CHECK(wrong == 0);
    std::fill(call.k.begin(), call.k.end(), -1e30f);
    const Floats none = encode(call);
    CHECK(std::all_of(none.begin(), none.end(), [](float x) { return std::isnan(x); }));
}

TEST_CASE("cuda attention: what the kernels support") {
    for (const int32_t dim : {64, 80, 96, 128}) CHECK(gpu::prefill_supports(dim));
    for (const int32_t dim : {0, 32, 40, 63, 112, 160, 256}) CHECK(!gpu::prefill_supports(dim));
    for (const int32_t dim : {32, 64, 80, 96, 128}) CHECK(gpu::encoder_supports(dim));
    for (const int32_t dim : {0, 16, 48, 33, 256}) CHECK(!gpu::encoder_supports(dim));
    for (const int32_t dim : {8, 24, 128, 256}) CHECK(gpu::decode_supports(dim, 16));
    for (const int32_t dim : {0, 4, 12, 257, 264}) CHECK(!gpu::decode_supports(dim, 1));
}

TEST_CASE("cuda attention: batches without anything to do") {
    const Shape shape{2, 1, 64, DType::bf16};
    for (const std::vector<Part>& parts :
         {std::vector<Part>{}, {{0, 0}}, {{0, 40}, {0, 0, false}}, {{0, 0, false}}}) {
        const Call call(shape, parts, 81);
        CHECK(prefill(call).empty());
        CHECK(decode(call).empty());
        CHECK(encode(call).empty());
    }
}

TEST_CASE("cuda attention: scores of -inf and +inf") {
    const Shape shape{1, 1, 64, DType::bf16};
    for (const bool decoding : {false, true}) {
        // Scores of -inf for entries 0 .. 79: the whole first step, or two pages, and more.
        set_seed(6);
        const int32_t rows = decoding ? 1 : 100;
        Call call(shape, {{rows, decoding ? 99 : 0}}, 53);
        std::fill(call.q.begin(), call.q.end(), 1e30f);
        for (int32_t e = 0; e < 100; ++e) {
            for (int32_t d = 0; d < 64; ++d)
                call.key(0, 0, e, d) = e < 80 ? rounded(DType::bf16, -1e30f) : 0.0f;
        }
        call.write_pages();
        const auto run = [&] { return decoding ? decode(call) : prefill(call); };
        Floats out = run();
        int64_t wrong = 0;
        for (int32_t r = 0; r < rows; ++r) {
            const int32_t last = 100 - rows + r;
            for (int32_t d = 0; d < 64; ++d) {
                const float got = out[static_cast<size_t>(r * 64 + d)];
                if (last < 80) {
                    wrong += std::isnan(got) ? 0 : 1;
                    continue;
                }
                // All weights are 1: what is left are the sums' roundings and the division's.
                double mean = 0.0;
                for (int32_t e = 80; e <= last; ++e) mean += static_cast<double>(call.value(0, 0, e, d));
                mean /= last - 79;
                wrong += within(got, mean, gamma_n(40)) ? 0 : 1;
            }
        }
        CHECK(wrong == 0);
        for (int32_t d = 0; d < 64; ++d) call.key(0, 0, 0, d) = rounded(DType::bf16, 1e30f);
        call.write_pages();
        out = run();
        CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isnan(x); }));
    }
}
