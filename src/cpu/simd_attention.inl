// Attention's block steps on vectors: K transposed to panels, and the running softmax.
// Included inside the namespace of one instruction set, after its vec_*.h and simd_math.inl.

REFRAG_SIMD void transpose_keys(float* kt, const float* k, int64_t ldk, int64_t n, int64_t dim) {
    for (int64_t e = 0; e < kPageEntries; e += kLanes) {
        float* to = kt + e / kPanel * dim * kPanel + e % kPanel;
        for (int64_t d = 0; d < dim; d += kLanes) {
            const int64_t left = dim - d < kLanes ? dim - d : kLanes;
            Vec block[kLanes];
            if (left == kLanes && e + kLanes <= n) {
                REFRAG_UNROLL
                for (int i = 0; i < kLanes; ++i) block[i] = load(k + (e + i) * ldk + d);
            } else {
                REFRAG_UNROLL
                for (int i = 0; i < kLanes; ++i) {
                    block[i] = e + i < n ? load_n(k + (e + i) * ldk + d, left) : zero();
                }
            }
            transpose(block);
            REFRAG_UNROLL
            for (int i = 0; i < kLanes; ++i) {
                if (i < left) store(to + (d + i) * kPanel, block[i]);
            }
        }
    }
}

REFRAG_SIMD void softmax_block(float* s, int64_t rows, const int32_t* visible, float scale, float* m,
                               float* l, float* acc, int64_t ld_acc, int64_t dim) {
    constexpr int kVecs = kPageEntries / kLanes;
    const float none = -std::numeric_limits<float>::infinity();
    for (int64_t r = 0; r < rows; ++r, s += kPageEntries, acc += ld_acc) {
        Vec x[kVecs];
        Vec largest = set1(m[r]);
        REFRAG_UNROLL
        for (int i = 0; i < kVecs; ++i) {
            x[i] = mul(load(s + i * kLanes), set1(scale));
            if (visible[r] < kPageEntries) x[i] = keep_first(x[i], visible[r] - i * kLanes, none);
            largest = max(x[i], largest);
        }
        const float new_max = max_lanes(largest);
        // While all scores are -inf, subtracting their maximum would make NaN of what may still become
        // finite.
        const float shift = new_max == none ? 0.0f : new_max;
        Vec sum = zero();
        REFRAG_UNROLL
        for (int i = 0; i < kVecs; ++i) {
            x[i] = exp(sub(x[i], set1(shift)));
            store(s + i * kLanes, x[i]);
            sum = add(sum, x[i]);
        }
        const bool same = m[r] == shift;
        const float keep = same ? 1.0f : first_lane(exp(set1(m[r] - shift)));
        l[r] = std::fma(l[r], keep, sum_lanes(sum));
        m[r] = new_max;
        if (same) continue;
        for (int64_t d = 0; d < dim; d += kLanes) {
            const int64_t left = dim - d < kLanes ? dim - d : kLanes;
            store_n(acc + d, mul(load_n(acc + d, left), set1(keep)), left);
        }
    }
}
