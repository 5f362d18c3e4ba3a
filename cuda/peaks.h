// The limits of the GPU, measured: matrix products through the library that the backend uses, and plain
// kernels that read or copy a buffer well past the L2 cache. Measure them in the run that they judge. The
// mirror of cpu/peaks.h.
#pragma once

#include <string>

#include "cuda_backend.h"

namespace refrag::REFRAG_CUDA {

struct GpuPeaks {
    double bf16_gflops = 0.0;  // bf16 factors, fp32 sums and results; 2 operations a multiply-add
    double fp32_gflops = 0.0;  // fp32 throughout, TF32 off
    double read_gbs = 0.0;     // 1e9 bytes a second
    double copy_gbs = 0.0;     // the same, counting what is read and what is written
};

// Takes about a second and up to 4 GiB of device memory, beside whatever a backend holds; less of both where
// memory is short. Products are of random numbers: zeros would run faster than data does. Throws as
// make_cuda_backend does, and Status::out_of_memory when not even 64 MiB can be had.
GpuPeaks measure_gpu_peaks(int device = 0);

struct GpuInfo {
    std::string name;     // "NVIDIA H200"
    std::string driver;   // the newest CUDA version that the driver can run: "13.0"
    std::string runtime;  // the CUDA version of the runtime library: "13.0"
};
// Throws as make_cuda_backend does.
GpuInfo gpu_info(int device = 0);

}  // namespace refrag::REFRAG_CUDA
