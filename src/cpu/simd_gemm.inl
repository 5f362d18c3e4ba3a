// The matrix product's tile on vectors: rows x panels of 16 columns, all sums in registers.
// Included inside the namespace of one instruction set, after its vec_*.h. See GemmTile for the contract.

inline constexpr int kPanelVecs = static_cast<int>(kPanel) / kLanes;

// How one k (or, for BF16, two) of a panel's vector is read and widened.
struct F32Weights {
    using Element = float;
    static constexpr int kStep = 1;
    static REFRAG_SIMD_INLINE void get(const float* p, Vec (&b)[1]) { b[0] = load(p); }
};
struct F16Weights {
    using Element = uint16_t;
    static constexpr int kStep = 1;
    static REFRAG_SIMD_INLINE void get(const uint16_t* p, Vec (&b)[1]) { b[0] = load_f16(p); }
};
struct Bf16Weights {
    using Element = uint16_t;
    static constexpr int kStep = 2;
    static REFRAG_SIMD_INLINE void get(const uint16_t* p, Vec (&b)[2]) { load_bf16_pairs(p, b[0], b[1]); }
};

template <typename W, int R, int V>
REFRAG_SIMD void tile(const GemmTile& t, int first_panel) {
    constexpr int S = W::kStep;
    using Element = typename W::Element;
    const Element* b[V];
    REFRAG_UNROLL
    for (int v = 0; v < V; ++v) {
        b[v] = static_cast<const Element*>(t.b) + (first_panel + v / kPanelVecs) * t.panel_stride +
               v % kPanelVecs * kLanes * S;
    }
    float* const c = t.c + first_panel * kPanel;
    const int64_t n_cols = t.n_cols - first_panel * kPanel;
    const bool whole = n_cols >= V * kLanes;

    Vec sum[R][V];
    REFRAG_UNROLL
    for (int r = 0; r < R; ++r) {
        REFRAG_UNROLL
        for (int v = 0; v < V; ++v) {
            if (!t.accumulate) {
                sum[r][v] = zero();
            } else if (whole) {
                sum[r][v] = load(c + r * t.ldc + v * kLanes);
            } else {
                sum[r][v] = load_n(c + r * t.ldc + v * kLanes, lanes_left(n_cols, v));
            }
        }
    }

    const float* const a = t.a;
    const int64_t lda = t.lda, ldb = t.ldb * S, whole_k = t.k - t.k % S;
    for (int64_t k = 0; k < whole_k; k += S) {
        Vec w[V][S];
        REFRAG_UNROLL
        for (int v = 0; v < V; ++v) {
            W::get(b[v], w[v]);
            b[v] += ldb;
        }
        REFRAG_UNROLL
        for (int i = 0; i < S; ++i) {
            REFRAG_UNROLL
            for (int r = 0; r < R; ++r) {
                const Vec x = set1(a[r * lda + k + i]);
                REFRAG_UNROLL
                for (int v = 0; v < V; ++v) sum[r][v] = fma(x, w[v][i], sum[r][v]);
            }
        }
    }
    if constexpr (S == 2) {
        if (whole_k < t.k) {
            REFRAG_UNROLL
            for (int v = 0; v < V; ++v) {
                Vec w[S];
                W::get(b[v], w);
                REFRAG_UNROLL
                for (int r = 0; r < R; ++r) sum[r][v] = fma(set1(a[r * lda + whole_k]), w[0], sum[r][v]);
            }
        }
    }

    REFRAG_UNROLL
    for (int v = 0; v < V; ++v) {
        const int64_t left = lanes_left(n_cols, v);
        const Vec bias =
            t.bias == nullptr ? zero() : load_n(t.bias + first_panel * kPanel + v * kLanes, left);
        REFRAG_UNROLL
        for (int r = 0; r < R; ++r) {
            const Vec result = t.bias == nullptr ? sum[r][v] : add(sum[r][v], bias);
            if (whole) {
                store(c + r * t.ldc + v * kLanes, result);
            } else {
                store_n(c + r * t.ldc + v * kLanes, result, left);
            }
        }
    }
}

// As many panels at once as R rows leave registers for.
template <typename W, int R>
REFRAG_SIMD void tile_rows(int panels, const GemmTile& t) {
    constexpr int fit = kAccumulators / (R * kPanelVecs);
    constexpr int unit = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
    for (int p = 0; p < panels;) {
        const int n = panels - p < unit ? panels - p : unit;
        if constexpr (unit >= 4) {
            if (n == 4) tile<W, R, 4 * kPanelVecs>(t, p);
        }
        if constexpr (unit >= 2) {
            if (n == 2) tile<W, R, 2 * kPanelVecs>(t, p);
        }
        if (n == 1) tile<W, R, kPanelVecs>(t, p);
        p += n;
    }
}

template <typename W>
REFRAG_SIMD void tile_of(int rows, int panels, const GemmTile& t) {
    switch (rows) {
        case 1:
            return tile_rows<W, 1>(panels, t);
        case 2:
            return tile_rows<W, 2>(panels, t);
        case 3:
            return tile_rows<W, 3>(panels, t);
        case 4:
            return tile_rows<W, 4>(panels, t);
        case 5:
            return tile_rows<W, 5>(panels, t);
        default:
            return tile_rows<W, 6>(panels, t);
    }
}

REFRAG_SIMD void gemm_tile(DType weights, int rows, int panels, const GemmTile& t) {
    switch (weights) {
        case DType::f32:
            return tile_of<F32Weights>(rows, panels, t);
        case DType::f16:
            return tile_of<F16Weights>(rows, panels, t);
        case DType::bf16:
            return tile_of<Bf16Weights>(rows, panels, t);
        case DType::i32:
        case DType::i8:
            break;
    }
}

template <typename W>
REFRAG_SIMD void widen(float* out, const void* panel, int64_t k) {
    const auto* from = static_cast<const typename W::Element*>(panel);
    for (int64_t i = 0; i < k; i += W::kStep, from += W::kStep * kPanel) {
        for (int v = 0; v < kPanelVecs; ++v) {
            Vec w[W::kStep];
            W::get(from + v * kLanes * W::kStep, w);
            for (int j = 0; j < W::kStep && i + j < k; ++j) {
                store(out + (i + j) * kPanel + v * kLanes, w[j]);
            }
        }
    }
}

REFRAG_SIMD void widen_panel(float* out, const void* panel, DType weights, int64_t k) {
    switch (weights) {
        case DType::f32:
            return widen<F32Weights>(out, panel, k);
        case DType::f16:
            return widen<F16Weights>(out, panel, k);
        case DType::bf16:
            return widen<Bf16Weights>(out, panel, k);
        case DType::i32:
        case DType::i8:
            break;
    }
}

// (q + 128) s - 128 s is exact: 8 bits by 11, and one rounding that has nothing to round.
REFRAG_SIMD void widen_int8(float* out, const Int8Block* blocks, int64_t k) {
    for (; k > 0; k -= kInt8Group, out += kInt8Group * kPanel, ++blocks) {
        const int64_t fours = (k < kInt8Group ? k + 3 : kInt8Group) / 4;
        for (int v = 0; v < kPanelVecs; ++v) {
            const Vec scale = load_f16(blocks->scale + v * kLanes);
            const Vec zero_point = mul(scale, set1(-static_cast<float>(kInt8Zero)));
            for (int64_t i = 0; i < fours; ++i) {
                Vec w[4];
                load_bytes4(blocks->q[i][v * kLanes], w);
                for (int64_t j = 0; j < 4 && i * 4 + j < k; ++j) {
                    store(out + (i * 4 + j) * kPanel + v * kLanes, fma(w[j], scale, zero_point));
                }
            }
        }
    }
}
