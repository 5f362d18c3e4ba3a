// The few functions of cuBLAS that products need. The library is opened when a device is (dlopen), so that
// the binary starts where it is not installed. tests/cuda_on_host/ has a stand-in of plain loops.
#pragma once

#include "device.cuh"

namespace refrag::REFRAG_CUDA {

// Why the library cannot be opened, naming the files tried, or empty. Never throws.
std::string cublas_unavailable();

// A handle of the library, bound to a stream, with a workspace of its own, so that calls can be captured.
class Cublas {
  public:
    // Throws Status::runtime naming the libraries tried, where none can be opened.
    // workspace: `workspace_bytes` of device memory, aligned to 256, which must outlive the handle.
    Cublas(cudaStream_t stream, void* workspace, size_t workspace_bytes);
    ~Cublas();
    Cublas(const Cublas&) = delete;
    Cublas& operator=(const Cublas&) = delete;

    // out[r, n] = sum_k x[r, k] w[n, k] + beta out[r, n]; x [rows, in_dim] and w [out_dim, in_dim] of `dtype`
    // (F32, BF16 or F16), out F32 with its rows ld_out elements apart, beta 0 or 1. Sums in fp32; never in
    // TF32.
    void multiply(float* out, const void* x, const void* w, DType dtype, int64_t rows, int64_t out_dim,
                  int64_t in_dim, float beta, int64_t ld_out);

  private:
    void* handle_ = nullptr;
};

// What Cublas takes for its products; 32 MiB is what cuBLAS asks for on Hopper.
inline constexpr size_t kCublasWorkspaceBytes = size_t{32} << 20;

}  // namespace refrag::REFRAG_CUDA
