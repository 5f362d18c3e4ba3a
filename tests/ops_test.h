// What the op tests share: the instruction sets as doctest types, tensors on a CPU backend, random data, and
// the rounding bounds. References are plain loops in double, written from backend.h and nothing else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include "base/dtype.h"
#include "cpu/cpu_backend.h"
#include "support.h"

namespace refrag_test {

using refrag::Backend;
using refrag::CpuIsa;
using refrag::DType;
using refrag::Matrix;
using refrag::Tensor;

struct Scalar {
    static constexpr CpuIsa isa = CpuIsa::scalar;
};
struct Avx2 {
    static constexpr CpuIsa isa = CpuIsa::avx2;
};
struct Avx512 {
    static constexpr CpuIsa isa = CpuIsa::avx512;
};
struct Avx512Bf16 {
    static constexpr CpuIsa isa = CpuIsa::avx512_bf16;
};
struct Amx {
    static constexpr CpuIsa isa = CpuIsa::amx;
};

// First line of a test over the instruction sets: leaves it, counted as skipped, where the CPU lacks one.
#define REQUIRE_ISA(T)                                                                                   \
    if (!refrag::cpu_supports(T::isa)) {                                                                 \
        refrag_test::skip((std::string("no ") + refrag::cpu_isa_name(T::isa) + " on this CPU").c_str()); \
        return;                                                                                          \
    }

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr double kEps = 0x1p-24;  // unit roundoff of fp32, round to nearest

// |computed - exact| <= gamma_n(n) * sum |terms| for n roundings one after the other (Higham, section 3.1).
inline double gamma_n(int64_t n) {
    const double x = static_cast<double>(n) * kEps;
    return x / (1.0 - x);
}

using Floats = std::vector<float>;

// Deterministic values of about [-1, 1], so that a failure can be reproduced.
inline Floats random_floats(int64_t n, uint32_t seed, float scale = 1.0f) {
    std::mt19937 random(seed);
    Floats x(static_cast<size_t>(n));
    for (float& v : x) v = scale * (static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f);
    return x;
}

// A tensor over a vector's memory (host memory is the CPU backend's memory).
inline Tensor view(Floats& x, int64_t rows, int64_t cols) {
    REQUIRE(static_cast<int64_t>(x.size()) == rows * cols);
    return {x.data(), DType::f32, rows, cols};
}

// The same bits; NaNs of any payload are the same.
inline bool same_bits(float a, float b) {
    return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}
inline bool same_bits(const Floats& a, const Floats& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
        if (!same_bits(a[i], b[i])) return false;
    }
    return true;
}

// Within the bound, or the same infinity, or both NaN.
inline bool within(float got, double expected, double bound) {
    if (std::isnan(expected)) return std::isnan(got);
    if (std::isinf(expected)) return static_cast<double>(got) == expected;
    return std::fabs(static_cast<double>(got) - expected) <= bound;
}

// x [rows, W.in_dim()] through linear or linear_gelu; an empty bias is none.
inline Floats run_linear(Backend& backend, Floats x, int64_t rows, const refrag::Matrix& w, Floats bias = {},
                         bool gelu = false) {
    Floats out(static_cast<size_t>(rows * w.out_dim()), kNan);
    const Tensor b = bias.empty() ? Tensor{} : view(bias, 1, w.out_dim());
    if (gelu) {
        backend.linear_gelu(view(out, rows, w.out_dim()), view(x, rows, w.in_dim()), w, b);
    } else {
        backend.linear(view(out, rows, w.out_dim()), view(x, rows, w.in_dim()), w, b);
    }
    return out;
}

// A weight matrix as a file would hold it, and its values as fp32 (all three dtypes widen exactly).
struct FileMatrix {
    DType dtype;
    int64_t out_dim;
    int64_t in_dim;
    std::vector<std::byte> bytes;
    Floats values;

    FileMatrix(DType d, int64_t out, int64_t in, uint32_t seed) : dtype(d), out_dim(out), in_dim(in) {
        const Floats x = random_floats(out * in, seed);
        bytes.resize(x.size() * refrag::dtype_bytes(d));
        values.resize(x.size());
        for (size_t i = 0; i < x.size(); ++i) {
            if (d == DType::f32) {
                values[i] = x[i];
                std::memcpy(&bytes[i * 4], &x[i], 4);
                continue;
            }
            // For F16 the bits of a bf16 value's top are as good as any: sign, exponent around 1, mantissa.
            uint16_t bits = refrag::f32_to_bf16(x[i]);
            if (d == DType::f16) bits = static_cast<uint16_t>((bits & 0x83ffu) | 0x3400u | (i % 4 << 10));
            if (d == DType::f16 && i % 17 == 0) bits &= 0x83ffu;  // subnormal halves too
            values[i] = d == DType::f16 ? refrag::f16_to_f32(bits) : refrag::bf16_to_f32(bits);
            std::memcpy(&bytes[i * 2], &bits, 2);
        }
    }

    std::unique_ptr<Matrix> make(Backend& backend) const {
        const size_t row_bytes = static_cast<size_t>(in_dim) * refrag::dtype_bytes(dtype);
        return backend.device().make_matrix(dtype, out_dim, in_dim, [&](int64_t row, int64_t n, void* dst) {
            std::memcpy(dst, bytes.data() + static_cast<size_t>(row) * row_bytes,
                        static_cast<size_t>(n) * row_bytes);
        });
    }
};

}  // namespace refrag_test
