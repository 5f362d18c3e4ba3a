// Row loops on vectors: sums, norms, RoPE. Each has one order of summation for a given length: lane by lane
// over the row, then the lanes together, the tail's lanes last.
// Included inside the namespace of one instruction set, after its vec_*.h.

REFRAG_SIMD void add(float* x, const float* y, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, add(load(x + i), load(y + i)));
    if (i < n) store_n(x + i, add(load_n(x + i, n - i), load_n(y + i, n - i)), n - i);
}

REFRAG_SIMD void scale(float* out, const float* x, float factor, int64_t n) {
    const Vec f = set1(factor);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, mul(load(x + i), f));
    if (i < n) store_n(out + i, mul(load_n(x + i, n - i), f), n - i);
}

// Two chains of sums hide half of the addition's latency.
REFRAG_SIMD_INLINE float sum_squares(const float* x, int64_t n) {
    Vec a = zero(), b = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const Vec u = load(x + i), v = load(x + i + kLanes);
        a = fma(u, u, a);
        b = fma(v, v, b);
    }
    for (; i < n; i += kLanes) {
        const Vec u = load_n(x + i, n - i < kLanes ? n - i : kLanes);
        a = fma(u, u, a);
    }
    return sum_lanes(add(a, b));
}

REFRAG_SIMD void rms_norm(float* out, const float* x, const float* weight, int64_t n, float eps) {
    const float inverse = 1.0f / std::sqrt(sum_squares(x, n) / static_cast<float>(n) + eps);
    const Vec factor = set1(inverse);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
    if (i < n) {
        store_n(out + i, mul(mul(load_n(x + i, n - i), factor), load_n(weight + i, n - i)), n - i);
    }
}

REFRAG_SIMD void layer_norm(float* out, const float* x, const float* weight, const float* bias, int64_t n,
                            float eps) {
    Vec a = zero(), b = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        a = add(a, load(x + i));
        b = add(b, load(x + i + kLanes));
    }
    for (; i < n; i += kLanes) a = add(a, load_n(x + i, n - i < kLanes ? n - i : kLanes));
    const Vec mean = set1(sum_lanes(add(a, b)) / static_cast<float>(n));

    a = zero();
    b = zero();
    for (i = 0; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const Vec u = sub(load(x + i), mean), v = sub(load(x + i + kLanes), mean);
        a = fma(u, u, a);
        b = fma(v, v, b);
    }
    for (; i < n; i += kLanes) {
        // Lanes beyond the end must add nothing: they hold 0, not the mean.
        const int64_t left = n - i < kLanes ? n - i : kLanes;
        float lanes[kLanes];
        store(lanes, zero());
        store_n(lanes, sub(load_n(x + i, left), mean), left);
        const Vec u = load(lanes);
        a = fma(u, u, a);
    }
    const float variance = sum_lanes(add(a, b)) / static_cast<float>(n);
    const Vec factor = set1(1.0f / std::sqrt(variance + eps));

    for (i = 0; i + kLanes <= n; i += kLanes) {
        const Vec centred = mul(sub(load(x + i), mean), factor);
        store(out + i, fma(centred, load(weight + i), load(bias + i)));
    }
    if (i < n) {
        const Vec centred = mul(sub(load_n(x + i, n - i), mean), factor);
        store_n(out + i, fma(centred, load_n(weight + i, n - i), load_n(bias + i, n - i)), n - i);
    }
}

REFRAG_SIMD void l2_normalize(float* x, int64_t n) {
    const float length = std::sqrt(sum_squares(x, n));
    const Vec divisor = set1(length < 1e-12f ? 1e-12f : length);  // a NaN stays
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, div(load(x + i), divisor));
    if (i < n) store_n(x + i, div(load_n(x + i, n - i), divisor), n - i);
}

REFRAG_SIMD void rope(float* x, const float* cos_sin, int64_t half) {
    for (int64_t m = 0; m < half; m += kLanes) {
        const int64_t n = half - m < kLanes ? half - m : kLanes;
        const Vec first = load_n(x + m, n), second = load_n(x + half + m, n);
        const Vec c = load_n(cos_sin + m, n), s = load_n(cos_sin + half + m, n);
        store_n(x + m, fma_minus(first, c, mul(second, s)), n);
        store_n(x + half + m, fma(second, c, mul(first, s)), n);
    }
}
