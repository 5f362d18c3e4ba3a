// Every table of bench_cuda at small sizes over the kernels that run on the CPU: that its checks hold where
// the kernels are right, and that they fail where they are not. Figures mean nothing here.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdio>

#include "bench/bench_cuda.h"
#include "every_backend.h"
#include "support.h"

using namespace refrag_bench;

namespace {

Bench small_bench(std::FILE* tables) {
    return Bench(
        [](const Way& way) {
            return refrag_test::open_on_host({.deterministic = way.deterministic,
                                              .plain_attention = way.plain_attention,
                                              .own_product_rows = way.own_product_rows});
        },
        {1.0, 1.0}, small_sizes(), tables);
}

}  // namespace

TEST_CASE("bench_cuda: every table, at small sizes, finds nothing wrong") {
    if (refrag_test::gpu_alone() && refrag_test::skip("REFRAG_TEST_BACKENDS=cuda")) return;
    const refrag_test::TempDir dir;
    std::FILE* const file = std::fopen(dir.file("tables").c_str(), "w");
    REQUIRE(file != nullptr);
    Bench bench = small_bench(file);
    all_tables(bench);
    profile(bench);
    std::fclose(file);
    CHECK(bench.wrong() == 0);
    const std::string tables = refrag::read_file(dir.file("tables"), 1 << 20);
    CHECK(!refrag_test::contains(tables, "WRONG"));
    for (const char* row :
         {"| 4 heads, 2 KV heads, dim 64 | 80 |", "| 4 heads, 2 KV heads, dim 64 | 2 | 300 |",
          "| 96 x 128 | I8 | 8 |", "| 96 x 128 | BF16 | 70 |", "| linear, deterministic: out x in |",
          "| 4 chunks of 18 tokens | F32 |", "| gelu, 160 | 40 |", "| temperature 1, top-k 40 | 1 |"})
        CHECK(refrag_test::contains(tables, row));
}

TEST_CASE("bench_cuda: what is off by more than rounding, and what is no number, is wrong") {
    if (refrag_test::gpu_alone() && refrag_test::skip("REFRAG_TEST_BACKENDS=cuda")) return;
    Bench bench = small_bench(stdout);
    std::vector<float> expected(512);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<float>(drawn(i)) * 0x1p-31f - 1.0f;
    CHECK(bench.off(expected, expected, 0.0) == "0e+00");
    CHECK(bench.wrong() == 0);
    std::vector<float> got = expected;
    got[300] += 1.0f;  // of a length of about 13
    CHECK(refrag_test::contains(bench.off(got, expected, kRounded), "WRONG: 0.0"));
    CHECK(bench.wrong() == 1);
    got[300] = std::nanf("");
    CHECK(refrag_test::contains(bench.off(got, expected, kRounded), "WRONG: "));
    CHECK(refrag_test::contains(bench.off(std::vector<float>(512, 0.0f), expected, kRounded), "WRONG: 1"));
    CHECK(bench.wrong() == 3);
}
