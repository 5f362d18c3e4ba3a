// A stand-in for cuda/cublas.cu: the product as its formula reads. Compiled like a .cu file, see on_host.h.
#include "cublas.cuh"

namespace refrag::REFRAG_CUDA {

std::string cublas_unavailable() {
    return refrag_on_host::device().has_cublas ? "" : "cannot open cuBLAS";
}

Cublas::Cublas(cudaStream_t stream, void*, size_t) : handle_(stream) {}
Cublas::~Cublas() = default;

void Cublas::multiply(float* out, const void* x, const void* w, DType dtype, int64_t rows, int64_t out_dim,
                      int64_t in_dim, float beta, int64_t ld_out) {
    const auto value = [dtype](const void* data, int64_t i) {
        if (dtype == DType::f32) return static_cast<const float*>(data)[i];
        const uint16_t bits = static_cast<const uint16_t*>(data)[i];
        return dtype == DType::bf16 ? widen_bf16(bits) : widen_f16(bits);
    };
    enqueue(static_cast<cudaStream_t>(handle_), [=] {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t n = 0; n < out_dim; ++n) {
                float sum = 0.0f;
                for (int64_t k = 0; k < in_dim; ++k) {
                    sum += value(x, r * in_dim + k) * value(w, n * in_dim + k);
                }
                float& to = out[r * ld_out + n];
                to = beta == 0.0f ? sum : sum + to;
            }
        }
    });
}

}  // namespace refrag::REFRAG_CUDA
