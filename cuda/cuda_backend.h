// The CUDA backend: the same ops as src/cpu/, on one NVIDIA GPU. Plain C++, for whoever makes a backend.
#pragma once

#include <memory>
#include <string>

#include "ops/backend.h"

#if defined(REFRAG_CUDA_ON_HOST)
#define REFRAG_CUDA cuda_on_host
#else
#define REFRAG_CUDA cuda
#endif

namespace refrag::REFRAG_CUDA {

struct CudaOptions {
    int device = 0;  // among the visible ones (CUDA_VISIBLE_DEVICES)
    // Of the memory that is free on the device when it is opened, what this process may take at most.
    double memory_fraction = 0.9;
    // Every row's result then does not depend on the batch it is in, bit for bit. What it costs, as counted:
    // products of 16-bit and I8 weights read the weights again for every 64 rows, on mma.sync instead of
    // cuBLAS' wgmma, with activations rounded to 16 bits in single rows too; products of F32 weights read
    // them again for every 8 rows. Attention is the same with it as without.
    bool deterministic = false;
    // For tests and measurements. Attention through the plain kernel alone, which is the definition:
    bool plain_attention = false;
    // Products of at most so many rows go to the kernels that read the weights once, others to cuBLAS.
    int own_product_rows = 8;
};

// Is there a driver, and a device that it shows? Never throws, and works where there is neither driver nor
// toolkit.
bool cuda_present();
// Why this device cannot be used ("no NVIDIA driver is installed", "cuda:1: 1 device is visible", "cannot
// open cuBLAS ..."), or empty where it can. Throws and needs as little.
std::string cuda_unavailable(int device = 0);

// Opens a device. Throws Status::runtime with the reason where it cannot be used. Every call of the device
// and of its queues makes it the calling thread's current one.
std::unique_ptr<Device> make_cuda_device(const CudaOptions& options = {});
// A device with one queue, which owns it.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options = {});

}  // namespace refrag::REFRAG_CUDA
