// Every backend that this machine has: the CPU's instruction sets, the CUDA kernels run on the CPU, and a
// GPU.
#pragma once

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cuda_on_host/open.h"
#include "ops/backend.h"

#if defined(REFRAG_WITH_CUDA)
#include "cuda/cuda_backend.h"
#endif

namespace refrag_test {

// Whether the CUDA backend of this build can be used here.
inline bool has_gpu() {
#if defined(REFRAG_WITH_CUDA)
    return refrag::cuda::cuda_unavailable().empty();
#else
    return false;
#endif
}

inline std::unique_ptr<refrag::Backend> open_gpu(bool deterministic) {
#if defined(REFRAG_WITH_CUDA)
    return refrag::cuda::make_cuda_backend({.deterministic = deterministic});
#else
    (void)deterministic;
    return nullptr;
#endif
}

// Opened once. The CPU's plain loops come first. Two threads there, so that the division of work is under
// test too. `deterministic`: with CUDA's deterministic option; the CPU is so always.
inline std::span<const std::unique_ptr<refrag::Backend>> every_backend(bool deterministic = false) {
    const auto open = [](bool cuda_deterministic) {
        std::vector<std::unique_ptr<refrag::Backend>> list;
        for (const auto isa : {refrag::CpuIsa::scalar, refrag::CpuIsa::avx2, refrag::CpuIsa::avx512,
                               refrag::CpuIsa::avx512_bf16, refrag::CpuIsa::amx}) {
            if (refrag::cpu_supports(isa)) list.push_back(refrag::make_cpu_backend(2, isa));
        }
        list.push_back(refrag_on_host::open_backend({.seed = 3, .deterministic = cuda_deterministic}));
        if (has_gpu()) list.push_back(open_gpu(cuda_deterministic));
        return list;
    };
    static const auto backends = open(false), deterministic_ones = open(true);
    return deterministic ? deterministic_ones : backends;
}

}  // namespace refrag_test
