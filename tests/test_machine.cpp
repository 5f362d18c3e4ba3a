// What the machine says of itself: memory left and taken, and its peaks. Figures are only compared with each
// other; how large they are is the machine's business.
#include <doctest/doctest.h>

#include <cstring>
#include <string>
#include <vector>

#include "base/memory.h"
#include "cpu/cpu_backend.h"
#include "cpu/peaks.h"

using namespace refrag;

TEST_CASE("a control group's limit counts, and what it can reclaim does not") {
    CHECK(control_group_left("1000\n", "400\n", "") == 600u);
    CHECK(control_group_left("1000\n", "400\n", "anon 200\ninactive_file 150\nactive_file 50\n") == 750u);
    // Version 1 counts a group with those below it.
    CHECK(control_group_left("1000", "400", "inactive_file 10\ntotal_inactive_file 100\n") == 700u);
    CHECK(control_group_left("1000", "1200", "") == 0u);
    CHECK(control_group_left("1000", "100", "inactive_file 500\n") == 1000u);
    CHECK_FALSE(control_group_left("max\n", "400\n", "").has_value());
    CHECK_FALSE(control_group_left("9223372036854771712\n", "400\n", "").has_value());
    CHECK_FALSE(control_group_left("", "", "").has_value());
    CHECK_FALSE(control_group_left("1000", "?", "").has_value());
}

TEST_CASE("peak memory grows with what is touched and never falls") {
    const uint64_t before = peak_resident_bytes();
    if (before == 0) return;  // not told here
    CHECK(available_memory_bytes() > 0);
    {
        // More than any test before it can have left behind unused.
        std::vector<char> touched(before + (uint64_t{64} << 20));
        std::memset(touched.data(), 1, touched.size());
        CHECK(peak_resident_bytes() >= before + (uint64_t{32} << 20));
    }
    CHECK(peak_resident_bytes() >= before + (uint64_t{32} << 20));
}

TEST_CASE(
    "the machine's peaks are measured with an instruction each, and no type is slower than widening it") {
    const MachinePeaks peaks = measure_peaks(1, uint64_t{32} << 20);
    CHECK(peaks.fp32_gflops > 0.0);
    CHECK(peaks.bf16_gflops >= peaks.fp32_gflops);
    CHECK(peaks.int8_gops >= peaks.fp32_gflops);
    CHECK(peaks.read_gbs > 0.0);
    const std::string expected = cpu_supports(CpuIsa::avx512) ? "AVX-512 vfmadd"
                                 : cpu_supports(CpuIsa::avx2) ? "AVX2 vfmadd"
                                                              : "scalar";
    CHECK(peaks.fp32_instruction == expected);
    CHECK_FALSE(peaks.bf16_instruction.empty());
    CHECK_FALSE(peaks.int8_instruction.empty());
    CHECK_FALSE(cpu_name().empty());
}
