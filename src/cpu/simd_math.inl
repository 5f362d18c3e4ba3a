// exp, tanh and the exact GELU on vectors: scalar_math.h's arithmetic with fused multiply-adds. A tail goes
// through the same vectors as the rest, so an element's result does not depend on where it stands.
// Included inside the namespace of one instruction set, after its vec_*.h.

template <int N>
REFRAG_SIMD_INLINE Vec horner(const float (&c)[N], Vec x) {
    Vec sum = set1(c[N - 1]);
    REFRAG_UNROLL
    for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, set1(c[i]));
    return sum;
}

REFRAG_SIMD_INLINE Vec exp(Vec x) {
    // min and max give their second operand where one is a NaN, so a NaN passes.
    const Vec clamped = max(set1(math::kExpMin), min(set1(math::kExpMax), x));
    const Vec n = round(mul(clamped, set1(math::kLog2e)));
    const Vec r = fma_neg(n, set1(math::kLn2Lo), fma_neg(n, set1(math::kLn2Hi), clamped));
    const Vec p = add(set1(1.0f), fma(mul(r, r), horner(math::kExpQ, r), r));
    return scale_pow2(p, n);
}

REFRAG_SIMD_INLINE Vec tanh_vec(Vec x) {
    const Vec a = abs(x);
    const Vec s = mul(a, a);
    const Vec small = fma(a, mul(s, horner(math::kTanhT, s)), a);
    const Vec large = sub(set1(1.0f), div(set1(2.0f), add(exp(add(a, a)), set1(1.0f))));
    return copy_sign(select(less(a, set1(math::kTanhSmall)), small, large), x);
}

REFRAG_SIMD_INLINE Vec gelu_vec(Vec x) {
    const Vec z = min(set1(math::kPhiMax), abs(x));
    const Vec high = mul(z, z);
    const Vec low = fma_minus(z, z, high);
    const Vec e = exp(mul(set1(-0.5f), high));
    const Vec shift = set1(math::kPhiShift);
    const Vec g = horner(math::kPhiG, div(sub(z, shift), add(z, shift)));
    const Vec tail = mul(fma_neg(e, mul(set1(0.5f), low), e), g);
    return mul(x, select(greater_equal(x, zero()), sub(set1(1.0f), tail), tail));
}

REFRAG_SIMD_INLINE Vec silu_mul_vec(Vec gate, Vec up) {
    return mul(div(gate, add(set1(1.0f), exp(sub(zero(), gate)))), up);
}

REFRAG_SIMD void gelu(float* x, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, gelu_vec(load(x + i)));
    if (i < n) store_n(x + i, gelu_vec(load_n(x + i, n - i)), n - i);
}

REFRAG_SIMD void tanh(float* x, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, tanh_vec(load(x + i)));
    if (i < n) store_n(x + i, tanh_vec(load_n(x + i, n - i)), n - i);
}

REFRAG_SIMD void silu_mul(float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(gate + i, silu_mul_vec(load(gate + i), load(up + i)));
    if (i < n) store_n(gate + i, silu_mul_vec(load_n(gate + i, n - i), load_n(up + i, n - i)), n - i);
}

REFRAG_SIMD float max(const float* x, int64_t n) {
    Vec largest = set1(x[0]);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) largest = max(load(x + i), largest);
    float result = max_lanes(largest);
    for (; i < n; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

REFRAG_SIMD double sum_exp(const float* x, int64_t n, float shift) {
    const Vec s = set1(shift);
    DoubleSum sum = double_zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add_to(sum, exp(sub(load(x + i), s)));
    if (i < n) {
        // Lanes beyond the end get exp(-inf) = 0.
        float lanes[kLanes];
        store(lanes, set1(-std::numeric_limits<float>::infinity()));
        store_n(lanes, sub(load_n(x + i, n - i), s), n - i);
        add_to(sum, exp(load(lanes)));
    }
    return total(sum);
}
