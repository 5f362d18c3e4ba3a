// The inner loops of the CPU backend, one table for each instruction set.
//
// Scalar loops live in the op family's file (gemm.cpp, norm.cpp, ...) and are the definition. The AVX2 and
// AVX-512 loops are written once over a vector type, in simd_*.inl, and compiled twice, in simd_avx2.cpp and
// simd_avx512.cpp. No kernel allocates, throws, or knows of threads. All pointers are to fp32 unless typed.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/int8.h"
#include "cpu/cpu_backend.h"

namespace refrag {

// Weights are kept in panels of 16 output columns, see gemm.cpp.
inline constexpr int64_t kPanel = 16;
// The largest tile: 6 rows x 4 panels is 24 of AVX-512's 32 registers, and leaves room for operands.
inline constexpr int kTileRows = 6;
inline constexpr int kTilePanels = 4;
// Padding between rows of scratch is to whole panels, so that vector loads stay inside.
inline int64_t panel_ceil(int64_t n) {
    return (n + kPanel - 1) / kPanel * kPanel;
}

// One output tile: c[r, n] = (accumulate ? c[r, n] : 0) + sum_k a[r, k] * b[k, n], (+ bias[n]).
// b's element (k, n) is in panel n / 16: element k * ldb + n % 16 of b + (n / 16) * panel_stride, for F32
// and F16. For BF16 two k lie side by side, (k / 2) * 2 * ldb + (n % 16) * 2 + k % 2: what AVX-512's bf16 dot
// product takes, and as cheap to widen as any other order. k begins at an even number.
// The sum is one chain of multiply-adds over ascending k, starting at c or 0; bias is added last.
struct GemmTile {
    const float* a;
    int64_t lda;
    const void* b;
    int64_t ldb;           // in elements
    int64_t panel_stride;  // in elements
    float* c;
    int64_t ldc;
    int64_t k;
    int64_t
        n_cols;  // columns to read and write, in (16 * (panels - 1), 16 * panels]; b is readable to the end
    bool accumulate;
    const float* bias;  // [n_cols] or null
};

// ---- products of bf16 by bf16, where the CPU has instructions for them ----
//
// Both operands lie in tiles of 16 x 32 bf16, 1 KB each, one behind the other along k. A tile of the left
// operand holds 32 k of 16 rows, row by row; a tile of the right operand 32 k of 16 columns, k-pair by
// k-pair: element (k, n) at k / 2 * 32 + n * 2 + k % 2, the order of a BF16 weight panel.
inline constexpr int64_t kTileK = 32;
inline constexpr int64_t kTileElements = kPanel * kTileK;
inline int64_t tile_k_ceil(int64_t k) {
    return (k + kTileK - 1) / kTileK * kTileK;
}

// s[r, n] = (start ? start[r, n] : 0) + sum_k a[r, k] b[k, n], and then c from s. Products are exact, sums
// fp32, each element in one order over k that depends on the instruction set alone: not on `rows`, on
// `n_cols`, on where a call's block begins, nor on a k cut into calls at multiples of 32. bf16 denormals
// count as 0.
struct Bf16Gemm {
    const uint16_t* a;  // row r, k: tile k / 32 of block r / 16
    int64_t a_stride;   // elements from one block of 16 rows to the next; whole blocks are readable
    const uint16_t* b;  // column n, k: tile k / 32 of panel n / 16
    int64_t b_stride;   // elements from one panel to the next; whole panels are readable
    float* c;           // [rows, ldc]
    int64_t ldc;
    int64_t rows;
    int64_t n_cols;
    int64_t k_tiles;     // k / 32
    const float* start;  // [rows, ldc], may be c; or null
    // store; or add (c += s) or silu_mul (c = silu(s) s') from kEpilogueRows rows on (of few rows the sums
    // stay in the cache anyway), where CpuKernels::gemm_bf16_epilogue says so.
    Epilogue epilogue = Epilogue::store;
    const uint16_t* up_b = nullptr;   // silu_mul: the second product's right operand, with b's stride
    const float* up_start = nullptr;  // as start
};
inline constexpr int64_t kEpilogueRows = 33;

// ---- attention in bf16 ----
//
// A page holds 32 entries as two right operands: K with the entries as columns (2 panels of dim / 32 tiles),
// then V with the dimensions as columns (dim / 16 panels of one tile). See attention_bf16.cpp.
inline constexpr int64_t kAttendRows = 32;  // rows of a call
inline constexpr int64_t kAttendPages =
    8;  // pages of a call: the running softmax goes in steps of 256 entries
inline constexpr int64_t kAttendEntries = kAttendPages * 32;

// The running softmax of `rows` rows over `n_pages` pages of entries: m, l and acc go from what they are
// before these entries to what they are after them. Scores are in units of log2: softmax is 2^(s - m) / l.
struct Bf16Attend {
    const uint16_t* q;         // left operand [rows, dim]; whole blocks of 16 rows are readable
    int64_t rows;              // 1 .. kAttendRows
    int64_t dim;               // a multiple of 32
    const uint16_t* const* k;  // [n_pages] K and
    const uint16_t* const* v;  // V of each page; entries that a row does not see must be finite in V
    int64_t n_pages;           // 1 .. kAttendPages
    const int32_t* visible;    // [rows] a row sees the first 0 .. 32 n_pages entries,
    const int32_t* hidden;     // [rows] but not the first so many of them; null: 0 for all
    float* m;     // [16 or 32] each row's shift: a whole number not below its largest score, -inf before any
    float* l;     // [16 or 32] sum of 2^(s - m)
    float* acc;   // [16 or 32, dim] sum of 2^(s - m) v, each power rounded to bf16
    float* s;     // scratch, [kAttendRows, kAttendEntries]
    uint16_t* p;  // scratch, as many elements
    const uint16_t* const* next;  // [n_next] pages to be asked for meanwhile, 64 dim elements each
    int64_t n_next;               // 0 .. kAttendPages
};

// ---- weights of 8 bits ----
//
// 32 k (a group of base/int8.h) of a panel of 16 columns. Weights are kept as q + 128, k by fours, as
// AVX-512's dot product of unsigned by signed bytes takes them.
struct Int8Block {
    uint8_t q[kInt8Group / 4][kPanel][4];  // of k, column: q[k / 4][column][k % 4]
    uint16_t scale[kPanel];                // F16
};
inline constexpr uint8_t kInt8Zero = 128;  // what q = 0 is kept as

// 32 activations x of a row, as products of bytes take them: x is about q * scale, scale = max |x| / 127, q
// rounded to nearest even. Where an x is NaN or infinite, scale is NaN and q = 0; where all |x| are below
// 2^-100, both are 0.
struct Int8Group {
    int8_t q[kInt8Group];
    float scale;
    int32_t start;  // -128 sum q: what the sum over weights that are kept as q + 128 begins with
};

// c[r, n] = (accumulate ? c[r, n] : 0) + sum over groups of (sum_k q_a[r, k] q_b[k, n]) * (scale_a scale_b).
// The sums of a group are exact, and so is their conversion to fp32; then one multiply-add for each group, in
// ascending order whatever the rows, the columns, and calls that the groups are cut into.
struct Int8Gemm {
    const Int8Group* a;  // row r, group g: a[r * a_stride + g]
    int64_t a_stride;
    const Int8Block* b;  // panel p, group g: b[p * b_stride + g]
    int64_t b_stride;
    float* c;  // [rows, ldc]
    int64_t ldc;
    int64_t rows;
    int64_t n_cols;
    int64_t n_groups;
    bool accumulate;
};

// c[r, n] = sum_k a[r, k] bf16(q_b[k, n] scale_b), as Bf16Gemm computes it with the weights widened before,
// for few rows.
inline constexpr int64_t kInt8Bf16Rows = 2 * kPanel;
struct Int8Bf16Gemm {
    const uint16_t* a;  // left operand; from one block of 16 rows to the next: a_stride
    int64_t a_stride;
    const Int8Block* b;  // panel p, block k: b[p * b_stride + k]
    int64_t b_stride;
    float* c;  // [rows, ldc]
    int64_t ldc;
    int64_t rows;  // 1 .. kInt8Bf16Rows
    int64_t n_cols;
    int64_t k_tiles;
};

struct CpuKernels {
    // rows in [1, kTileRows], panels 1, 2 or kTilePanels.
    void (*gemm_tile)(DType weights, int rows, int panels, const GemmTile& tile);
    // out[k, 16] = the first k rows of a panel of 16 columns, widened. F32, F16 or BF16; k begins even.
    void (*widen_panel)(float* out, const void* panel, DType weights, int64_t k);

    // out[k, 16] = the first k rows of the blocks' weights, q * scale, exact in fp32.
    void (*widen_int8)(float* out, const Int8Block* blocks, int64_t k);

    // Element by element, in place.
    void (*add)(float* x, const float* y, int64_t n);
    void (*gelu)(float* x, int64_t n);
    void (*tanh)(float* x, int64_t n);
    void (*silu_mul)(float* gate, const float* up, int64_t n);

    // One row of n.
    void (*rms_norm)(float* out, const float* x, const float* weight, int64_t n, float eps);
    void (*layer_norm)(float* out, const float* x, const float* weight, const float* bias, int64_t n,
                       float eps);
    void (*l2_normalize)(float* x, int64_t n);
    // One head: x [2 * half], cos_sin [2 * half].
    void (*rope)(float* x, const float* cos_sin, int64_t half);

    // The largest of n >= 1 values; any value if one is a NaN.
    float (*max)(const float* x, int64_t n);
    // sum exp(x[i] - shift), accumulated in double.
    double (*sum_exp)(const float* x, int64_t n, float shift);

    // Attention, for one block of up to 32 entries, see attention.cpp.
    // kt: two panels of 16 entries, kt[(e / 16) * dim * 16 + d * 16 + e % 16] = k[e * ldk + d], e < n; zeros
    // for the other entries.
    void (*transpose_keys)(float* kt, const float* k, int64_t ldk, int64_t n, int64_t dim);
    // For each of `rows` rows, with `visible[r]` >= 1 scores in s[r, 32]: multiplies by scale, updates the
    // running maximum m[r] and sum l[r], writes exp(s - m) to s (zeros from visible[r] on), and rescales
    // acc[r, 0 .. dim).
    void (*softmax_block)(float* s, int64_t rows, const int32_t* visible, float scale, float* m, float* l,
                          float* acc, int64_t ld_acc, int64_t dim);
    // out[i] = x[i] * factor.
    void (*scale)(float* out, const float* x, float factor, int64_t n);

    // Null where the CPU has no bf16 instructions worth using; all or none.
    // Rounds x[rows, k] (rows <= 16) to bf16, to nearest even, into one block of the left operand; zeros for
    // rows and k beyond.
    void (*pack_bf16)(uint16_t* block, const float* x, int64_t ldx, int64_t rows, int64_t k) = nullptr;
    void (*gemm_bf16)(const Bf16Gemm& g) = nullptr;
    bool gemm_bf16_epilogue = false;
    // Rounds n entries (n <= 32 - first) of K and V to bf16 and puts them at entries first, first + 1, ... of
    // a page.
    void (*pack_kv)(uint16_t* page, int64_t first, int64_t n, const float* k, int64_t ldk, const float* v,
                    int64_t ldv, int64_t dim) = nullptr;
    void (*attend_bf16)(const Bf16Attend& a) = nullptr;
    // The blocks' weights, q * scale rounded to bf16 (to nearest, ties away from 0), as tiles of the right
    // operand.
    void (*widen_int8_bf16)(uint16_t* tiles, const Int8Block* blocks, int64_t n_blocks) = nullptr;
    // May be null alone: widen_int8_bf16 and gemm_bf16 do the same.
    void (*gemm_int8_bf16)(const Int8Bf16Gemm& g) = nullptr;

    // Null where the instruction set has no dot products of bytes; both or none. A CPU may lack AVX-512's all
    // the same: cpu_supports() says.
    // x[n], n >= 0, into int8_groups(n) groups; zeros beyond n.
    void (*quantize_groups)(Int8Group* out, const float* x, int64_t n) = nullptr;
    void (*gemm_int8)(const Int8Gemm& g) = nullptr;
};

// The table of one instruction set; the CPU must support it (the scalar one always works).
const CpuKernels& cpu_kernels(CpuIsa isa);

#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const CpuKernels kAvx512Bf16Kernels;  // AVX-512's loops, and vdpbf16ps for gemm_bf16
extern const CpuKernels kAmxKernels;         // AVX-512's loops, and AMX tiles for gemm_bf16
#endif

// The scalar loops, in the files of their families.
namespace scalar {
void gemm_tile(DType weights, int rows, int panels, const GemmTile& tile);
void widen_panel(float* out, const void* panel, DType weights, int64_t k);
void widen_int8(float* out, const Int8Block* blocks, int64_t k);
void add(float* x, const float* y, int64_t n);
void gelu(float* x, int64_t n);
void tanh(float* x, int64_t n);
void silu_mul(float* gate, const float* up, int64_t n);
void rms_norm(float* out, const float* x, const float* weight, int64_t n, float eps);
void layer_norm(float* out, const float* x, const float* weight, const float* bias, int64_t n, float eps);
void l2_normalize(float* x, int64_t n);
void rope(float* x, const float* cos_sin, int64_t half);
float max(const float* x, int64_t n);
double sum_exp(const float* x, int64_t n, float shift);
void transpose_keys(float* kt, const float* k, int64_t ldk, int64_t n, int64_t dim);
void softmax_block(float* s, int64_t rows, const int32_t* visible, float scale, float* m, float* l,
                   float* acc, int64_t ld_acc, int64_t dim);
void scale(float* out, const float* x, float factor, int64_t n);
void pack_bf16(uint16_t* block, const float* x, int64_t ldx, int64_t rows, int64_t k);
void gemm_bf16(const Bf16Gemm& g);
void pack_kv(uint16_t* page, int64_t first, int64_t n, const float* k, int64_t ldk, const float* v,
             int64_t ldv, int64_t dim);
void attend_bf16(const Bf16Attend& a);
void widen_int8_bf16(uint16_t* tiles, const Int8Block* blocks, int64_t n_blocks);
void quantize_groups(Int8Group* out, const float* x, int64_t n);
void gemm_int8(const Int8Gemm& g);
}  // namespace scalar

}  // namespace refrag
