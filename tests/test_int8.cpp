// The rule that makes 8-bit weights (base/int8.h): by its definition at the edges, and to the bit what
// weights_tools/quantize.py makes (tests/golden/int8.safetensors).
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <doctest/doctest.h>

#include "base/int8.h"
#include "io/safetensors.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Quantised {
    std::vector<uint16_t> bytes;  // as halves, for their alignment
    int64_t in_dim;
    int64_t result;

    Quantised(DType dtype, const void* values, int64_t n)
        : bytes(int8_row_bytes(n) / 2 + 1, 0x5a5a), in_dim(n) {
        result = quantize_int8_row(bytes.data(), dtype, values, n);
    }
    explicit Quantised(const std::vector<float>& w) : Quantised(DType::f32, w.data(), std::ssize(w)) {}
    float scale(int64_t group) const {
        return f16_to_f32(int8_row_scales(bytes.data())[static_cast<size_t>(group)]);
    }
    int q(int64_t i) const { return int8_row_values(bytes.data(), in_dim)[i]; }
};

// The definition, group by group, in arithmetic that cannot round: every F16 number below the scale must be
// too small. Returns how many groups or weights are wrong.
int wrong_in(const Quantised& made, const std::vector<float>& w) {
    int wrong = 0;
    for (int64_t begin = 0; begin < made.in_dim; begin += kInt8Group) {
        const int64_t end = std::min(begin + kInt8Group, made.in_dim);
        const auto bits = int8_row_scales(made.bytes.data())[begin / kInt8Group];
        const double scale = static_cast<double>(f16_to_f32(bits));
        double largest = 0;
        for (int64_t i = begin; i < end; ++i) {
            largest = std::max(largest, std::fabs(static_cast<double>(w[static_cast<size_t>(i)])));
        }
        if (127 * scale < largest) ++wrong;
        if (bits > 0 && 127 * static_cast<double>(f16_to_f32(static_cast<uint16_t>(bits - 1))) >= largest) {
            ++wrong;
        }
        for (int64_t i = begin; i < end; ++i) {
            // A quotient rounded to fp32 may cross a tie by half a rounding, not more.
            const double exact = static_cast<double>(w[static_cast<size_t>(i)]);
            const double slack = 127 * 0x1p-24 * scale;
            if (std::fabs(exact - made.q(i) * scale) > scale / 2 + slack) ++wrong;
            if (made.q(i) < -127) ++wrong;
            if (scale == 0 && made.q(i) != 0) ++wrong;
        }
    }
    return wrong;
}

}  // namespace

TEST_CASE("int8: scales and values follow the rule at every length") {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (const int64_t n : {0, 1, 2, 31, 32, 33, 63, 64, 65, 100, 1000}) {
        CAPTURE(n);
        CHECK(int8_groups(n) == (n + 31) / 32);
        for (int exponent = -150; exponent <= 20; exponent += 5) {
            std::vector<float> w(static_cast<size_t>(n));
            for (float& x : w) x = std::ldexp(normal(random), exponent);
            const Quantised made(w);
            CHECK(made.result == n);
            CHECK(wrong_in(made, w) == 0);
            // Nothing beyond the row is written.
            CHECK(made.bytes.back() == 0x5a5a);
        }
    }
}

TEST_CASE("int8: zeros, signs, ties, one large value, denormals") {
    std::vector<float> w(64, 0.0f);
    w[40] = -0.0f;
    const Quantised zeros(w);
    CHECK(zeros.scale(0) == 0.0f);
    CHECK(zeros.scale(1) == 0.0f);
    for (int64_t i = 0; i < 64; ++i) CHECK(zeros.q(i) == 0);

    // A scale of exactly 1: whole numbers stay, halves go to the even neighbour.
    w = {127.0f, -127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f, 0.49999997f};
    const Quantised ties(w);
    CHECK(ties.scale(0) == 1.0f);
    const int expected[] = {127, -127, 0, 2, 2, 0, -2, -2, 126, 0};
    for (int64_t i = 0; i < std::ssize(w); ++i) CHECK(ties.q(i) == expected[i]);

    // One large value takes the others' precision, in its own group alone.
    w.assign(64, 0.01f);
    w[7] = 127.0f;
    const Quantised large(w);
    CHECK(large.q(7) == 127);
    CHECK(large.q(8) == 0);
    CHECK(large.q(33) == 127);

    // Below F16's smallest scale: the scale stays, and the values vanish.
    w.assign(5, 1e-42f);
    const Quantised tiny(w);
    CHECK(tiny.scale(0) == 0x1p-24f);
    CHECK(tiny.q(0) == 0);
}

TEST_CASE("int8: a weight whose scale F16 does not have is reported with its place") {
    std::vector<float> w(100, 1.0f);
    w[70] = kInt8Largest;
    CHECK(Quantised(w).result == 100);
    CHECK(Quantised(w).scale(2) == 65504.0f);
    w[71] = -std::nextafter(kInt8Largest, std::numeric_limits<float>::infinity());
    CHECK(Quantised(w).result == 71);
    w[33] = std::numeric_limits<float>::max();
    CHECK(Quantised(w).result == 33);
    CHECK(contains(error_of([&] { Quantised(DType::i32, w.data(), 4); }), "dtype I32"));
}

TEST_CASE("int8: the same bits as weights_tools/quantize.py") {
    const WeightFiles files = WeightFiles::open(repo_path("tests/golden/int8.safetensors"));
    int rows_seen = 0;
    for (const char* name : {"f32", "f16", "bf16"}) {
        CAPTURE(name);
        const TensorEntry& entry = files.get(name);
        const int64_t rows = entry.shape[0], in_dim = entry.shape[1];
        std::string values(entry.bytes, '\0');
        files.read(entry, values.data(), values.size());
        const TensorEntry& q_entry = files.get(std::string(name) + ".q");
        std::string q(q_entry.bytes, '\0');
        files.read(q_entry, q.data(), q.size());
        const TensorEntry& scale_entry = files.get(std::string(name) + ".scale");
        std::string scales(scale_entry.bytes, '\0');
        files.read(scale_entry, scales.data(), scales.size());
        const size_t row_bytes = values.size() / static_cast<size_t>(rows);
        const size_t scale_bytes = scales.size() / static_cast<size_t>(rows);
        for (int64_t r = 0; r < rows; ++r) {
            CAPTURE(r);
            const auto row = static_cast<size_t>(r);
            const Quantised made(*entry.dtype, values.data() + row * row_bytes, in_dim);
            REQUIRE(made.result == in_dim);
            CHECK(std::memcmp(int8_row_scales(made.bytes.data()), scales.data() + row * scale_bytes,
                              scale_bytes) == 0);
            CHECK(std::memcmp(int8_row_values(made.bytes.data(), in_dim),
                              q.data() + row * static_cast<size_t>(in_dim),
                              static_cast<size_t>(in_dim)) == 0);
            ++rows_seen;
        }
    }
    CHECK(rows_seen == 3 * 48);
}
