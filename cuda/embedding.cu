// Embedding look-ups on a GPU.
#include "backend_impl.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kThreads = 256;

// A row of a weight matrix, element by element, widened.
struct Table {
    const void* data;
    const uint16_t* scales;  // I8
    DType dtype;
    int64_t stride;

    __device__ float at(int64_t row, int64_t i) const {
        const int64_t index = row * stride + i;
        switch (dtype) {
            case DType::bf16:
                return widen_bf16(static_cast<const uint16_t*>(data)[index]);
            case DType::f16:
                return widen_f16(static_cast<const uint16_t*>(data)[index]);
            case DType::i8:
                return static_cast<float>(static_cast<const int8_t*>(data)[index]) *
                       widen_f16(scales[index / kInt8Group]);
            default:
                return static_cast<const float*>(data)[index];
        }
    }
};

Table table_of(const Matrix& w) {
    const auto& matrix = static_cast<const CudaMatrix&>(w);  // NOLINT: made by make_matrix
    return {matrix.data(), w.dtype() == DType::i8 ? matrix.scales() : nullptr, w.dtype(), matrix.stride()};
}

// Mapping: a block for each row, threads along it. Bound by: memory.
__global__ void embed_kernel(float* out, Table table, const int32_t* source, const float* vectors,
                             int64_t dim) {
    const int64_t r = blockIdx.x;
    const int64_t from = source[r];
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
        out[r * dim + i] = from >= 0 ? table.at(from, i) : vectors[(-1 - from) * dim + i];
    }
}

// Mapping: as embed_kernel.
__global__ void add_embed_kernel(float* x, Table table, const int32_t* ids, int64_t dim) {
    const int64_t r = blockIdx.x;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) x[r * dim + i] += table.at(ids[r], i);
}

// Mapping: as embed_kernel.
__global__ void gather_rows_kernel(float* out, const float* x, const int32_t* index, int64_t dim) {
    const int64_t r = blockIdx.x;
    const float* const from = x + index[r] * dim;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) out[r * dim + i] = from[i];
}

}  // namespace

void CudaBackend::embed(Tensor out, const Matrix& table, const int32_t* source, Tensor vectors) {
    REFRAG_DCHECK(table.in_dim() == out.cols);
    if (out.empty()) return;
    const float* const given = vectors.empty() ? nullptr : vectors.f32();
    CUDA_CHECK(launch(embed_kernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream(),
                      out.f32(), table_of(table), source, given, out.cols));
}

void CudaBackend::add_embed(Tensor x, const Matrix& table, const int32_t* ids) {
    REFRAG_DCHECK(table.in_dim() == x.cols);
    if (x.empty()) return;
    CUDA_CHECK(launch(add_embed_kernel, dim3(static_cast<unsigned>(x.rows)), dim3(kThreads), 0, stream(),
                      x.f32(), table_of(table), ids, x.cols));
}

void CudaBackend::gather_rows(Tensor out, Tensor x, const int32_t* index) {
    REFRAG_DCHECK(out.cols == x.cols);
    if (out.empty()) return;
    CUDA_CHECK(launch(gather_rows_kernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream(),
                      out.f32(), x.f32(), index, x.cols));
}

}  // namespace refrag::REFRAG_CUDA
