// exp, tanh and the normal distribution in fp32: the polynomials, and the plain functions over them.
// simd_math.inl is the same arithmetic on vectors. The coefficients are Chebyshev interpolants computed for
// this file in 40-digit arithmetic and rounded to fp32; tests/test_ops_rows.cpp holds the bounds below.
//
//   exp    within 2 ulp everywhere, subnormal results included; exp(-inf) = 0, exp(x > 88.73) = inf
//   tanh   within 3 ulp
//   gelu   x * Phi(x), within 1e-6 relative where x > -6 and within 1e-13 absolute below (Phi is evaluated
//          directly in the tail, so nothing cancels there as it does in 1 + erf)
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace refrag::math {

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; exp(r) = 1 + r + r^2 q(r), q within 1.1e-8.
inline constexpr float kExpMin = -104.5f;  // rounds to 0
inline constexpr float kExpMax = 89.0f;    // overflows to inf
inline constexpr float kLog2e = 0x1.715476p+0f;
inline constexpr float kLn2Hi = 0.693359375f;  // 355 / 512: n * kLn2Hi is exact
inline constexpr float kLn2Lo = -0x1.bd0106p-13f;
inline constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds
inline constexpr float kExpQ[5] = {0x1p-1f, 0x1.5554dcp-3f, 0x1.555518p-5f, 0x1.120be2p-7f, 0x1.6d117cp-10f};

// tanh(x) = x + x^3 t(x^2) for |x| < 0.625, t within 1.8e-8 relative to tanh(x); else 1 - 2 / (exp(2x) + 1).
inline constexpr float kTanhSmall = 0.625f;
inline constexpr float kTanhT[5] = {-0x1.555552p-2f, 0x1.110e1cp-3f, -0x1.b9258ap-5f, 0x1.58048ep-6f,
                                    -0x1.8f8de4p-8f};

// Phi(-z) = exp(-z^2 / 2) g((z - 4) / (z + 4)) for 0 <= z <= 14.5, where it underflows; g within 5.1e-8.
inline constexpr float kPhiMax = 14.5f;
inline constexpr float kPhiShift = 4.0f;
inline constexpr float kPhiG[11] = {0x1.82b4bcp-4f,   -0x1.5cf97cp-3f,  0x1.fd7518p-4f,  -0x1.25b65cp-4f,
                                    0x1.f9b13ap-6f,   -0x1.165cb6p-7f,  0x1.08ab26p-11f, 0x1.543a06p-11f,
                                    -0x1.6cd1b8p-13f, -0x1.d8480cp-15f, 0x1.dc2d8ep-18f};

template <int N>
inline float horner(const float (&c)[N], float x) {
    float sum = c[N - 1];
    for (int i = N - 2; i >= 0; --i) sum = sum * x + c[i];
    return sum;
}

// 2^n for n in [-126, 127].
inline float pow2(int32_t n) {
    return std::bit_cast<float>((n + 127) << 23);
}

inline float exp(float x) {
    // Written so that a NaN fails both comparisons and passes through.
    const float clamped = x < kExpMin ? kExpMin : x > kExpMax ? kExpMax : x;
    const float n = (clamped * kLog2e + kRoundMagic) - kRoundMagic;
    const float r = (clamped - n * kLn2Hi) - n * kLn2Lo;
    const float p = 1.0f + (r + r * r * horner(kExpQ, r));
    if (!(n == n)) return x;
    // In two steps: 2^n alone may be out of range where p * 2^n is not.
    const auto whole = static_cast<int32_t>(n);
    const int32_t half = whole >> 1;
    return p * pow2(half) * pow2(whole - half);
}

inline float tanh(float x) {
    const float a = std::fabs(x);
    const float s = a * a;
    const float magnitude =
        a < kTanhSmall ? a + a * (s * horner(kTanhT, s)) : 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
    return std::copysign(magnitude, x);
}

inline float gelu(float x) {
    const float a = std::fabs(x);
    const float z = a > kPhiMax ? kPhiMax : a;
    // The rounding of z^2 / 2, up to 105, would come out of exp magnified: keep what it lost.
    const double square = static_cast<double>(z) * static_cast<double>(z);
    const auto high = static_cast<float>(square);
    const auto low = static_cast<float>(square - static_cast<double>(high));
    const float e = exp(-0.5f * high);
    const float tail = (e - e * (0.5f * low)) * horner(kPhiG, (z - kPhiShift) / (z + kPhiShift));
    return x * (x >= 0.0f ? 1.0f - tail : tail);
}

}  // namespace refrag::math
