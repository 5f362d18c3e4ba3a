// Every backend that this machine has: the CPU's instruction sets, the CUDA kernels run on the CPU, and a
// GPU. REFRAG_TEST_BACKENDS=cuda leaves the CPU's plain loops, which are the reference, and the GPU: for the
// few minutes that one has on a card.
#pragma once

#include <cstdlib>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
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

// Of a GPU, or of the kernels run on the CPU.
struct CudaBackendOptions {
    bool deterministic = false;
    bool plain_attention = false;
    int own_product_rows = 8;
};

inline std::unique_ptr<refrag::Backend> open_gpu(const CudaBackendOptions& options) {
#if defined(REFRAG_WITH_CUDA)
    return refrag::cuda::make_cuda_backend({.deterministic = options.deterministic,
                                            .plain_attention = options.plain_attention,
                                            .own_product_rows = options.own_product_rows});
#else
    (void)options;
    return nullptr;
#endif
}
inline std::unique_ptr<refrag::Backend> open_on_host(const CudaBackendOptions& options) {
    return refrag_on_host::open_backend({.seed = 3,
                                         .deterministic = options.deterministic,
                                         .plain_attention = options.plain_attention,
                                         .own_product_rows = options.own_product_rows});
}

// What REFRAG_TEST_BACKENDS says: whether the GPU alone is wanted beside the reference.
inline bool gpu_alone() {
    const char* const wanted = std::getenv("REFRAG_TEST_BACKENDS");
    if (wanted == nullptr || *wanted == 0) return false;
    if (std::string_view(wanted) != "cuda")
        throw std::runtime_error("REFRAG_TEST_BACKENDS: expected cuda, found " + std::string(wanted));
    if (!has_gpu()) throw std::runtime_error("REFRAG_TEST_BACKENDS=cuda: no GPU can be used here");
    return true;
}

// Opened once. The CPU's plain loops come first. Two threads there, so that the division of work is under
// test too. `deterministic`: with CUDA's deterministic option; the CPU is so always.
inline std::span<const std::unique_ptr<refrag::Backend>> every_backend(bool deterministic = false) {
    const auto open = [](bool cuda_deterministic) {
        std::vector<std::unique_ptr<refrag::Backend>> list;
        list.push_back(refrag::make_cpu_backend(2, refrag::CpuIsa::scalar));
        const CudaBackendOptions options{.deterministic = cuda_deterministic};
        if (!gpu_alone()) {
            for (const auto isa : {refrag::CpuIsa::avx2, refrag::CpuIsa::avx512, refrag::CpuIsa::avx512_bf16,
                                   refrag::CpuIsa::amx}) {
                if (refrag::cpu_supports(isa)) list.push_back(refrag::make_cpu_backend(2, isa));
            }
            list.push_back(open_on_host(options));
        }
        if (has_gpu()) list.push_back(open_gpu(options));
        return list;
    };
    static const auto backends = open(false), deterministic_ones = open(true);
    return deterministic ? deterministic_ones : backends;
}

}  // namespace refrag_test
