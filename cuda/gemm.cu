// Matrix products on a GPU. Many rows go to cuBLAS; a few, as in generating, through the kernels below, which
// read the weights once and are bound by that; I8 weights of many rows are widened to bf16 for cuBLAS.
// With CudaOptions::deterministic all rows go through the kernels, a few at a time.
#include <algorithm>
#include <cstring>

#include "backend_impl.cuh"

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

// How a lane reads 8 neighbouring weights of a row (16 bytes of 16-bit weights), widened. k is a multiple
// of 8.
struct WeightsF32 {
    const float* data;
    int64_t stride;

    __device__ __forceinline__ void load(float (&w)[8], int64_t n, int64_t k) const {
        for (int i = 0; i < 8; ++i) w[i] = data[n * stride + k + i];
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

// out[r, n] (+)= sum_k x[r, k] w[n, k] + bias[n], r < rows <= kRows.
// Mapping: a warp for kColumns output columns, a lane for 8 neighbouring k of every 256; blocks of 8 warps.
// Reduction order: a lane's k in ascending order, then warp_sum; whatever kRows is.
// Shared memory bytes: 0. Alignment: 16 bytes of 16-bit weights where the row's length allows.
// Bound by: reading the weights; x comes from the caches.
template <int kRows, typename Weights>
__global__ void __launch_bounds__(kThreads)
    matvec_kernel(float* out, const float* x, Weights w, const float* bias, int64_t rows, int64_t out_dim,
                  int64_t in_dim, bool add) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kColumns;
    if (first >= out_dim) return;
    float sum[kRows][kColumns] = {};
    const int64_t whole = in_dim / 8 * 8;
    for (int64_t k = lane * 8; k < whole; k += kWarp * 8) {
        float weights[kColumns][8];
        for (int c = 0; c < kColumns; ++c) w.load(weights[c], min(first + c, out_dim - 1), k);
        for (int r = 0; r < kRows; ++r) {
            if (r >= rows) break;
            const float* const from = x + r * in_dim + k;
            for (int i = 0; i < 8; ++i) {
                const float value = from[i];
                for (int c = 0; c < kColumns; ++c) sum[r][c] += value * weights[c][i];
            }
        }
    }
    // The last in_dim % 8, a lane each.
    if (whole + lane < in_dim) {
        for (int r = 0; r < kRows; ++r) {
            if (r >= rows) break;
            for (int c = 0; c < kColumns; ++c) {
                sum[r][c] += x[r * in_dim + whole + lane] * w.at(min(first + c, out_dim - 1), whole + lane);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        for (int c = 0; c < kColumns; ++c) {
            const float total = warp_sum(sum[r][c]);
            if (lane != 0 || first + c >= out_dim) continue;
            float result = total;
            if (bias != nullptr) result += bias[first + c];
            float& to = out[r * out_dim + first + c];
            to = add ? to + result : result;
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

struct MatvecCall {
    float* out;
    const float* x;
    const float* bias;
    int64_t rows;
    int64_t out_dim;
    int64_t in_dim;
    bool add;
    cudaStream_t stream;
};

template <int kRows, typename Weights>
void launch_matvec(const MatvecCall& c, const Weights& w) {
    const auto blocks = static_cast<unsigned>(ceil_div(c.out_dim, int64_t{kWarps} * kColumns));
    CUDA_CHECK(launch(matvec_kernel<kRows, Weights>, dim3(blocks), dim3(kThreads), 0, c.stream, c.out, c.x, w,
                      c.bias, c.rows, c.out_dim, c.in_dim, c.add));
}

template <typename Weights>
void matvec(const MatvecCall& call, const Weights& w) {
    for (int64_t r = 0; r < call.rows; r += kFewRows) {
        MatvecCall c = call;
        c.rows = std::min<int64_t>(kFewRows, call.rows - r);
        c.out += r * call.out_dim;
        c.x += r * call.in_dim;
        if (c.rows == 1)
            launch_matvec<1>(c, w);
        else if (c.rows == 2)
            launch_matvec<2>(c, w);
        else if (c.rows <= 4)
            launch_matvec<4>(c, w);
        else
            launch_matvec<kFewRows>(c, w);
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

std::unique_ptr<Matrix> CudaBackend::make_matrix(DType dtype, int64_t out_dim, int64_t in_dim,
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
            upload(static_cast<std::byte*>(matrix->data()) + static_cast<size_t>(begin) * row_bytes,
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
        upload(static_cast<int8_t*>(matrix->data()) + begin * matrix->stride(), values.data(),
               static_cast<size_t>(n) * stride);
        upload(matrix->scales() + begin * matrix->n_groups(), scales.data(),
               static_cast<size_t>(n) * groups * 2);
    }
    return matrix;
}

// ---- products -------------------------------------------------------------------------------------------

bool CudaBackend::few_rows(int64_t rows) const {
    return rows <= kFewRows || options_.deterministic;
}

const void* CudaBackend::rounded(Tensor x, DType dtype) {
    if (dtype == DType::f32) return x.data;
    auto* const out = static_cast<uint16_t*>(scratch(rounded_, static_cast<size_t>(x.size()) * 2));
    const auto kernel = dtype == DType::f16 ? round_kernel<F16> : round_kernel<Bf16>;
    CUDA_CHECK(launch(kernel, blocks_for(x.size()), dim3(kThreads), 0, stream_, out,
                      static_cast<const float*>(x.f32()), x.size()));
    return out;
}

void CudaBackend::multiply(Tensor out, Tensor x, const CudaMatrix& w, Tensor bias, bool add,
                           const void* rounded_x) {
    const int64_t rows = x.rows, in_dim = w.in_dim(), out_dim = w.out_dim();
    REFRAG_DCHECK(x.cols == in_dim && out.cols == out_dim && out.rows == rows);
    REFRAG_DCHECK(bias.empty() || bias.size() == out_dim);
    if (rows == 0 || out_dim == 0) return;
    const float* const bias_data = bias.empty() ? nullptr : bias.f32();
    if (few_rows(rows) || in_dim == 0) {
        const MatvecCall call{out.f32(), x.f32(), bias_data, rows, out_dim, in_dim, add, stream_};
        if (w.dtype() == DType::f32)
            return matvec(call, WeightsF32{static_cast<const float*>(w.data()), in_dim});
        if (w.dtype() == DType::i8) return matvec(call, int8_weights(w));
        const auto* const data = static_cast<const uint16_t*>(w.data());
        if (w.dtype() == DType::f16) return matvec(call, Weights16<F16>{data, in_dim});
        return matvec(call, Weights16<Bf16>{data, in_dim});
    }
    const float beta = add ? 1.0f : 0.0f;
    if (w.dtype() == DType::i8) {
        // In pieces of whole rows of W, which are columns of out.
        const int64_t piece = std::clamp<int64_t>(kWidenedBytes / (2 * in_dim), 1, out_dim);
        auto* const wide = static_cast<uint16_t*>(scratch(widened_, static_cast<size_t>(piece * in_dim) * 2));
        for (int64_t n = 0; n < out_dim; n += piece) {
            const int64_t size = std::min(piece, out_dim - n);
            CUDA_CHECK(launch(widen_int8_kernel, blocks_for(size * in_dim), dim3(kThreads), 0, stream_, wide,
                              int8_weights(w), n, size * in_dim, in_dim));
            cublas_->multiply(out.f32() + n, rounded_x, wide, DType::bf16, rows, size, in_dim, beta, out_dim);
        }
    } else {
        cublas_->multiply(out.f32(), rounded_x, w.data(), w.dtype(), rows, out_dim, in_dim, beta, out_dim);
    }
    if (bias_data != nullptr) {
        CUDA_CHECK(launch(add_bias_kernel, blocks_for(out.size()), dim3(kThreads), 0, stream_, out.f32(),
                          bias_data, out.size(), out_dim));
    }
}

void CudaBackend::linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) {
    const Product product{out, &w, bias};
    linears(x, {&product, 1});
}

// Products of weights that round alike share the rounding.
void CudaBackend::linears(Tensor x, std::span<const Product> products) {
    if (x.rows == 0) return;
    const auto takes = [](DType dtype) { return dtype == DType::i8 ? DType::bf16 : dtype; };
    std::optional<DType> prepared;
    const void* prepared_x = nullptr;
    for (const Product& p : products) {
        if (!few_rows(x.rows) && !x.empty() && prepared != takes(p.w->dtype())) {
            prepared = takes(p.w->dtype());
            prepared_x = rounded(x, *prepared);
        }
        multiply(p.out, x, static_cast<const CudaMatrix&>(*p.w), p.bias, false, prepared_x);  // NOLINT
    }
}

void CudaBackend::linear_add(Tensor residual, Tensor x, const Product& y) {
    if (x.rows == 0) return;
    const auto& w = static_cast<const CudaMatrix&>(*y.w);  // NOLINT: made by make_matrix
    const DType takes = w.dtype() == DType::i8 ? DType::bf16 : w.dtype();
    const void* const prepared = few_rows(x.rows) || x.empty() ? nullptr : rounded(x, takes);
    multiply(residual, x, w, y.bias, true, prepared);
}

}  // namespace refrag::REFRAG_CUDA
