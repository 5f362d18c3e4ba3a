// Small helpers over the vector type that more than one simd_*.inl file uses.
// Included inside the namespace of one instruction set, after its vec_*.h.

// Lanes of vector v that lie among the first n, clamped to [0, kLanes].
REFRAG_SIMD_INLINE int64_t lanes_left(int64_t n, int v) {
    const int64_t left = n - v * kLanes;
    return left < 0 ? 0 : left < kLanes ? left : kLanes;
}

// x in the first n lanes (any n), `other` in the rest.
REFRAG_SIMD_INLINE Vec keep_first(Vec x, int64_t n, float other) {
    alignas(64) static constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select(less(load(kLane), set1(static_cast<float>(n))), x, set1(other));
}
