// Matrix products on a GPU. Many rows go to cuBLAS; a few, as in generating, through the kernels below, which
// read the weights once and are bound by that; I8 weights of many rows are widened to bf16 for cuBLAS.
// With CudaOptions::deterministic 16-bit and I8 weights go through gemm_tiles.cu, whatever the number of
// rows; F32 weights, which no tensor core takes, through the kernels below, 8 rows at a time.
#include <algorithm>
#include <cstring>

#include "backend_impl.cuh"
#include "gemm.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 4096;
// Rows that one pass over the weights takes in the kernels.
constexpr int kFewRows = 8;
// Output columns of a warp: each element of x that is read serves so many.
constexpr int kColumns = 2;
// I8 weights widened at a time for cuBLAS.
constexpr int64_t kWidenedBytes = int64_t{64} << 20;
constexpr size_t kReadBlockBytes = size_t{4} << 20;

// 8 floats in a row; aligned: to 16 bytes.
__device__ __forceinline__ void load_8(float (&x)[8], const float* from, bool aligned) {
    if (!aligned) {
        for (int i = 0; i < 8; ++i) x[i] = from[i];
        return;
    }
    for (int i = 0; i < 8; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        x[i] = four.x;
        x[i + 1] = four.y;
        x[i + 2] = four.z;
        x[i + 3] = four.w;
    }
}

// How a lane reads 8 neighbouring weights of a row (16 bytes of 16-bit weights), widened. k is a multiple
// of 8.
struct WeightsF32 {
    const float* data;
    int64_t stride;

    __device__ __forceinline__ void load(float (&w)[8], int64_t n, int64_t k) const {
        load_8(w, data + n * stride + k, stride % 4 == 0);
    }
    __device__ __forceinline__ float at(int64_t n, int64_t k) const { return data[n * stride + k]; }
};

template <typename Type>
struct Weights16 {
    const uint16_t* data;
    int64_t stride;

    __device__ __forceinline__ void load(float (&w)[8], int64_t n, int64_t k) const {
        const uint16_t* const from = data + n * stride + k;
        if (stride % 8 != 0) {
            for (int i = 0; i < 8; ++i) w[i] = Type::widen(from[i]);
            return;
        }
        const uint4 bits = *reinterpret_cast<const uint4*>(from);
        const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
        for (int i = 0; i < 4; ++i) {
            w[2 * i] = Type::widen(static_cast<uint16_t>(pairs[i]));
            w[2 * i + 1] = Type::widen(static_cast<uint16_t>(pairs[i] >> 16));
        }
    }
    __device__ __forceinline__ float at(int64_t n, int64_t k) const {
        return Type::widen(data[n * stride + k]);
    }
};

// q * scale, exact in fp32 (7 bits times 11). The row's stride is a multiple of 32.
struct WeightsI8 {
    const int8_t* data;
    const uint16_t* scales;
    int64_t stride;

    __device__ __forceinline__ void load(float (&w)[8], int64_t n, int64_t k) const {
        const uint2 bits = *reinterpret_cast<const uint2*>(data + n * stride + k);
        const float scale = widen_f16(scales[(n * stride + k) / kInt8Group]);
        const uint32_t fours[2] = {bits.x, bits.y};
        for (int i = 0; i < 8; ++i) {
            w[i] = static_cast<float>(static_cast<int8_t>(fours[i / 4] >> 8 * (i % 4))) * scale;
        }
    }
    __device__ __forceinline__ float at(int64_t n, int64_t k) const {
        return static_cast<float>(data[n * stride + k]) * widen_f16(scales[(n * stride + k) / kInt8Group]);
    }
};

// Products of one x: sums s[r, n] = sum_k x[r, k] w[n, k] + bias[n], and out = s, out += s, or, of two
// products of the same shape, the first's out = silu(s) * the second's s.
template <typename Weights>
struct Matvec {
    struct Part {
        Weights w;
        float* out;
        const float* bias;
        int64_t out_dim;
        unsigned first_block;
    };
    const float* x;
    int64_t rows;
    int64_t in_dim;
    Epilogue epilogue;
    int n_parts;
    Part parts[kMaxParts];
};

// Mapping: a warp for two output columns of a part (silu_mul: the same column of both parts), a lane for 8
// neighbouring k of every 256; blocks of 8 warps, a part's blocks behind the other's. rows <= kRows.
// Reduction order: a lane's k in ascending order, each product added in one rounding, then warp_sum; whatever
// kRows is, so that rows of a batch have the bits that they have alone.
// Shared memory bytes: 0. Alignment: 16 bytes of 16-bit weights where the row's length allows.
// Bound by: reading the weights; x comes from the caches.
template <int kRows, typename Weights>
__global__ void __launch_bounds__(kThreads) matvec_kernel(Matvec<Weights> a) {
    using Part = typename Matvec<Weights>::Part;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const bool paired = a.epilogue == Epilogue::silu_mul;
    int p = 0;
    while (!paired && p + 1 < a.n_parts && blockIdx.x >= a.parts[p + 1].first_block) ++p;
    const int64_t warp =
        static_cast<int64_t>(blockIdx.x - a.parts[p].first_block) * kWarps + threadIdx.x / kWarp;
    const int64_t first = paired ? warp : warp * kColumns;
    if (first >= a.parts[p].out_dim) return;
    const Part& one = a.parts[p];
    const Part& other = a.parts[paired ? 1 : p];
    // A column beyond the last is computed as the last, and not written.
    const int64_t columns[kColumns] = {first, paired ? first : min(first + 1, one.out_dim - 1)};

    float sum[kRows][kColumns] = {};
    const int64_t whole = a.in_dim / 8 * 8;
    const bool aligned = a.in_dim % 4 == 0;
    [[maybe_unused]] constexpr int kTurns = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;  // more would cost warps
    REFRAG_UNROLL_TURNS
    for (int64_t k = lane * 8; k < whole; k += kWarp * 8) {
        float weights[kColumns][8];
        one.w.load(weights[0], columns[0], k);
        other.w.load(weights[1], columns[1], k);
        for (int r = 0; r < kRows; ++r) {
            if (r >= a.rows) break;
            float values[8];
            load_8(values, a.x + r * a.in_dim + k, aligned);
            for (int i = 0; i < 8; ++i) {
                for (int c = 0; c < kColumns; ++c) sum[r][c] = __fmaf_rn(values[i], weights[c][i], sum[r][c]);
            }
        }
    }
    // The last in_dim % 8, a lane each.
    if (whole + lane < a.in_dim) {
        for (int r = 0; r < kRows; ++r) {
            if (r >= a.rows) break;
            const float value = a.x[r * a.in_dim + whole + lane];
            sum[r][0] = __fmaf_rn(value, one.w.at(columns[0], whole + lane), sum[r][0]);
            sum[r][1] = __fmaf_rn(value, other.w.at(columns[1], whole + lane), sum[r][1]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        if (r >= a.rows) break;
        float total[kColumns];
        for (int c = 0; c < kColumns; ++c) total[c] = warp_sum(sum[r][c]);
        if (lane != 0) continue;
        if (one.bias != nullptr) total[0] += one.bias[columns[0]];
        if (other.bias != nullptr) total[1] += other.bias[columns[1]];
        float* const out = one.out + r * one.out_dim + first;
        if (paired) {
            *out = total[0] / (1.0f + expf(-total[0])) * total[1];
            continue;
        }
        for (int c = 0; c < kColumns && first + c < one.out_dim; ++c) {
            out[c] = a.epilogue == Epilogue::add ? out[c] + total[c] : total[c];
        }
    }
}

// Mapping: a thread for each element, blocks going round. Bound by: memory.
template <typename Type>
__global__ void round_kernel(uint16_t* out, const float* x, int64_t n) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] = Type::round(x[i]);
    }
}

// x [rows, in_dim] as out [rows, stride], with zeros behind each row. Mapping: as round_kernel.
template <typename Type>
__global__ void round_rows_kernel(uint16_t* out, const float* x, int64_t n, int64_t in_dim, int64_t stride) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        const int64_t row = i / stride, k = i % stride;
        out[i] = k < in_dim ? Type::round(x[row * in_dim + k]) : uint16_t{0};
    }
}

// Rows [row, row + n / in_dim) of I8 weights, rounded to bf16, dense. Mapping: as round_kernel.
__global__ void widen_int8_kernel(uint16_t* out, WeightsI8 w, int64_t row, int64_t n, int64_t in_dim) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] = round_bf16(w.at(row + i / in_dim, i % in_dim));
    }
}

// x[r, n] += bias[n]. Mapping: as round_kernel.
__global__ void add_bias_kernel(float* x, const float* bias, int64_t n, int64_t cols) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        x[i] += bias[i % cols];
    }
}

dim3 blocks_for(int64_t n) {
    return dim3(static_cast<unsigned>(std::min(kMaxBlocks, ceil_div(n, kThreads))));
}

template <int kRows, typename Weights>
void launch_matvec(const Matvec<Weights>& a, unsigned blocks, cudaStream_t stream) {
    CUDA_CHECK(launch(matvec_kernel<kRows, Weights>, dim3(blocks), dim3(kThreads), 0, stream, a));
}

// All rows, kFewRows at a time; `a` with every part's w, out, bias and out_dim.
template <typename Weights>
void matvec(const Matvec<Weights>& call, cudaStream_t stream) {
    Matvec<Weights> a = call;
    unsigned blocks = 0;
    const int64_t columns = a.epilogue == Epilogue::silu_mul ? 1 : kColumns;
    for (int p = 0; p < a.n_parts; ++p) {
        a.parts[p].first_block = a.epilogue == Epilogue::silu_mul ? 0 : blocks;
        const auto own = static_cast<unsigned>(ceil_div(a.parts[p].out_dim, kWarps * columns));
        blocks = a.epilogue == Epilogue::silu_mul ? own : blocks + own;
    }
    if (blocks == 0) return;
    for (int64_t left = call.rows; left > 0; left -= kFewRows) {
        a.rows = std::min<int64_t>(kFewRows, left);
        if (a.rows == 1)
            launch_matvec<1>(a, blocks, stream);
        else if (a.rows == 2)
            launch_matvec<2>(a, blocks, stream);
        else if (a.rows <= 4)
            launch_matvec<4>(a, blocks, stream);
        else
            launch_matvec<kFewRows>(a, blocks, stream);
        a.x += kFewRows * a.in_dim;
        for (auto& part : a.parts) part.out += part.out == nullptr ? 0 : kFewRows * part.out_dim;
    }
}

WeightsI8 int8_weights(const CudaMatrix& w) {
    return {static_cast<const int8_t*>(w.data()), w.scales(), w.stride()};
}

}  // namespace

// ---- weights --------------------------------------------------------------------------------------------

CudaMatrix::CudaMatrix(MemorySource& source, DType dtype, int64_t out_dim, int64_t in_dim)
    : Matrix(dtype, out_dim, in_dim),
      stride_(dtype == DType::i8 ? int8_groups(in_dim) * kInt8Group : in_dim),
      buffer_(source, static_cast<size_t>(out_dim * stride_) * dtype_bytes(dtype) +
                          (dtype == DType::i8 ? static_cast<size_t>(out_dim * int8_groups(in_dim)) * 2 : 0)) {
}

std::unique_ptr<Matrix> CudaDevice::make_matrix(DType dtype, int64_t out_dim, int64_t in_dim,
                                                const RowReader& read) {
    REFRAG_CHECK(dtype != DType::i32, Status::runtime, "a weight matrix cannot have dtype I32");
    REFRAG_CHECK(out_dim >= 0 && in_dim >= 0, Status::runtime, "a weight matrix cannot be [", out_dim, ", ",
                 in_dim, "]");
    auto matrix = std::make_unique<CudaMatrix>(*this, dtype, out_dim, in_dim);
    const bool int8 = dtype == DType::i8;
    const size_t row_bytes = int8 ? int8_row_bytes(in_dim) : static_cast<size_t>(in_dim) * dtype_bytes(dtype);
    if (out_dim == 0 || in_dim == 0) return matrix;
    const auto block_rows = std::max<int64_t>(1, static_cast<int64_t>(kReadBlockBytes / row_bytes));
    std::vector<std::byte> rows(static_cast<size_t>(std::min(block_rows, out_dim)) * row_bytes);
    // Of I8 rows: values and scales apart.
    std::vector<int8_t> values(int8 ? rows.size() / row_bytes * static_cast<size_t>(matrix->stride()) : 0);
    std::vector<uint16_t> scales(values.size() / kInt8Group);
    for (int64_t begin = 0; begin < out_dim; begin += block_rows) {
        const int64_t n = std::min(block_rows, out_dim - begin);
        read(begin, n, rows.data());
        if (!int8) {
            enqueue_upload(static_cast<std::byte*>(matrix->data()) + static_cast<size_t>(begin) * row_bytes,
                           rows.data(), static_cast<size_t>(n) * row_bytes);
            continue;
        }
        const auto stride = static_cast<size_t>(matrix->stride()), groups = stride / kInt8Group;
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
            const std::byte* const row = rows.data() + i * row_bytes;
            std::copy_n(int8_row_scales(row), groups, &scales[i * groups]);
            std::fill_n(&values[i * stride], stride, int8_t{0});
            std::copy_n(int8_row_values(row, in_dim), in_dim, &values[i * stride]);
        }
        enqueue_upload(static_cast<int8_t*>(matrix->data()) + begin * matrix->stride(), values.data(),
                       static_cast<size_t>(n) * stride);
        enqueue_upload(matrix->scales() + begin * matrix->n_groups(), scales.data(),
                       static_cast<size_t>(n) * groups * 2);
    }
    finish_uploads();
    return matrix;
}

// ---- products -------------------------------------------------------------------------------------------

bool CudaBackend::by_own_kernels(int64_t rows, int64_t in_dim) const {
    return rows <= device_.options().own_product_rows || in_dim == 0 || device_.options().deterministic;
}

namespace {

template <typename Weights, typename WeightsOf>
void few_products(Tensor x, std::span<const Product> products, Epilogue epilogue, cudaStream_t stream,
                  const WeightsOf& weights_of) {
    Matvec<Weights> a{};
    a.x = x.f32();
    a.rows = x.rows;
    a.in_dim = x.cols;
    a.epilogue = epilogue;
    a.n_parts = static_cast<int>(products.size());
    for (size_t p = 0; p < products.size(); ++p) {
        const auto& w = static_cast<const CudaMatrix&>(*products[p].w);  // NOLINT: made by make_matrix
        a.parts[p] = {weights_of(w), products[p].out.f32(),
                      products[p].bias.empty() ? nullptr : products[p].bias.f32(), w.out_dim(), 0};
    }
    matvec(a, stream);
}

// At most kMaxParts products of weights of one dtype.
void few_products(Tensor x, std::span<const Product> products, Epilogue epilogue, cudaStream_t stream) {
    const auto bits = [](const CudaMatrix& w) { return static_cast<const uint16_t*>(w.data()); };
    switch (products[0].w->dtype()) {
        case DType::bf16:
            return few_products<Weights16<Bf16>>(x, products, epilogue, stream, [&](const CudaMatrix& w) {
                return Weights16<Bf16>{bits(w), w.stride()};
            });
        case DType::f16:
            return few_products<Weights16<F16>>(x, products, epilogue, stream, [&](const CudaMatrix& w) {
                return Weights16<F16>{bits(w), w.stride()};
            });
        case DType::i8:
            return few_products<WeightsI8>(x, products, epilogue, stream, int8_weights);
        default:
            return few_products<WeightsF32>(x, products, epilogue, stream, [](const CudaMatrix& w) {
                return WeightsF32{static_cast<const float*>(w.data()), w.stride()};
            });
    }
}

void check_shapes([[maybe_unused]] Tensor x, std::span<const Product> products) {
    for ([[maybe_unused]] const Product& p : products) {
        REFRAG_DCHECK(p.w->in_dim() == x.cols && p.out.cols == p.w->out_dim() && p.out.rows == x.rows);
        REFRAG_DCHECK(p.bias.empty() || p.bias.size() == p.w->out_dim());
    }
}

bool of_one_dtype(std::span<const Product> products) {
    return std::all_of(products.begin(), products.end(),
                       [&](const Product& p) { return p.w->dtype() == products[0].w->dtype(); });
}

}  // namespace

const void* CudaBackend::rounded(Tensor x, DType dtype) {
    if (dtype == DType::f32) return x.data;
    auto* const out = static_cast<uint16_t*>(scratch(ScratchUse::rounded, static_cast<size_t>(x.size()) * 2));
    const auto kernel = dtype == DType::f16 ? round_kernel<F16> : round_kernel<Bf16>;
    CUDA_CHECK(launch(kernel, blocks_for(x.size()), dim3(kThreads), 0, stream(), out,
                      static_cast<const float*>(x.f32()), x.size()));
    return out;
}

void CudaBackend::own_products(Tensor x, std::span<const Product> products, Epilogue epilogue) {
    const DType weights = products[0].w->dtype();
    if (!device_.options().deterministic || weights == DType::f32 || x.cols == 0) {
        return few_products(x, products, epilogue, stream());
    }
    TileProducts a{};
    a.rows = x.rows;
    a.in_dim = x.cols;
    a.x_stride = ceil_div(x.cols, kTileDepth) * kTileDepth;
    a.epilogue = epilogue;
    a.n_parts = static_cast<int>(products.size());
    for (size_t p = 0; p < products.size(); ++p) {
        const auto& w = static_cast<const CudaMatrix&>(*products[p].w);  // NOLINT: made by make_matrix
        a.parts[p] = {w.data(),
                      weights == DType::i8 ? w.scales() : nullptr,
                      w.stride(),
                      products[p].out.f32(),
                      products[p].bias.empty() ? nullptr : products[p].bias.f32(),
                      w.out_dim(),
                      0};
    }
    const int64_t n = a.rows * a.x_stride;
    auto* const rounded_x =
        static_cast<uint16_t*>(scratch(ScratchUse::rounded, static_cast<size_t>(n) * sizeof(uint16_t)));
    const auto kernel = weights == DType::f16 ? round_rows_kernel<F16> : round_rows_kernel<Bf16>;
    CUDA_CHECK(launch(kernel, blocks_for(n), dim3(kThreads), 0, stream(), rounded_x,
                      static_cast<const float*>(x.f32()), n, a.in_dim, a.x_stride));
    a.x = rounded_x;
    multiply_in_tiles(a, weights, stream());
}

// Many rows.
void CudaBackend::multiply(Tensor out, const CudaMatrix& w, Tensor bias, bool add, const void* rounded_x) {
    const int64_t rows = out.rows, in_dim = w.in_dim(), out_dim = w.out_dim();
    if (out_dim == 0) return;
    device_.make_current();  // cuBLAS asks for it
    const float beta = add ? 1.0f : 0.0f;
    if (w.dtype() == DType::i8) {
        // In pieces of whole rows of W, which are columns of out.
        const int64_t piece = std::clamp<int64_t>(kWidenedBytes / (2 * in_dim), 1, out_dim);
        auto* const wide =
            static_cast<uint16_t*>(scratch(ScratchUse::widened, static_cast<size_t>(piece * in_dim) * 2));
        for (int64_t n = 0; n < out_dim; n += piece) {
            const int64_t size = std::min(piece, out_dim - n);
            CUDA_CHECK(launch(widen_int8_kernel, blocks_for(size * in_dim), dim3(kThreads), 0, stream(), wide,
                              int8_weights(w), n, size * in_dim, in_dim));
            cublas_->multiply(out.f32() + n, rounded_x, wide, DType::bf16, rows, size, in_dim, beta, out_dim);
        }
    } else {
        cublas_->multiply(out.f32(), rounded_x, w.data(), w.dtype(), rows, out_dim, in_dim, beta, out_dim);
    }
    if (!bias.empty()) {
        CUDA_CHECK(launch(add_bias_kernel, blocks_for(out.size()), dim3(kThreads), 0, stream(), out.f32(),
                          static_cast<const float*>(bias.f32()), out.size(), out_dim));
    }
}

void CudaBackend::linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) {
    const Product product{out, &w, bias};
    linears(x, {&product, 1});
}

// The backend's own kernels: all in one launch. cuBLAS: products of weights that round alike share the
// rounding.
void CudaBackend::linears(Tensor x, std::span<const Product> products) {
    check_shapes(x, products);
    if (x.rows == 0 || products.empty()) return;
    if (by_own_kernels(x.rows, x.cols)) {
        if (products.size() <= kMaxParts && of_one_dtype(products)) {
            return own_products(x, products, Epilogue::store);
        }
        for (const Product& p : products) own_products(x, {&p, 1}, Epilogue::store);
        return;
    }
    std::optional<DType> prepared;
    const void* prepared_x = nullptr;
    for (const Product& p : products) {
        const DType takes = rounding_of(p.w->dtype());
        if (prepared != takes) prepared_x = rounded(x, takes);
        prepared = takes;
        multiply(p.out, static_cast<const CudaMatrix&>(*p.w), p.bias, false, prepared_x);  // NOLINT
    }
}

void CudaBackend::linear_silu_mul(Tensor x, const Product& gate, const Product& up) {
    const Product both[] = {gate, up};
    check_shapes(x, both);
    if (x.rows == 0) return;
    if (by_own_kernels(x.rows, x.cols) && of_one_dtype(both) && gate.out.cols == up.out.cols) {
        return own_products(x, both, Epilogue::silu_mul);
    }
    linears(x, both);
    silu_mul(gate.out, up.out);
}

void CudaBackend::linear_add(Tensor residual, Tensor x, const Product& y) {
    const Product sum{residual, y.w, y.bias};
    check_shapes(x, {&sum, 1});
    if (x.rows == 0) return;
    if (by_own_kernels(x.rows, x.cols)) return own_products(x, {&sum, 1}, Epilogue::add);
    multiply(residual, static_cast<const CudaMatrix&>(*y.w), y.bias, true,  // NOLINT
             rounded(x, rounding_of(y.w->dtype())));
}

}  // namespace refrag::REFRAG_CUDA
