// See device.h.
#include "api/device.h"

#include <charconv>
#include <utility>

#include "base/check.h"
#include "cpu/cpu_backend.h"
#include "io/file.h"
#if defined(REFRAG_WITH_CUDA)
#include "cuda/cuda_backend.h"
#endif

namespace refrag {

GpuRuntime own_gpu_runtime() {
#if defined(REFRAG_WITH_CUDA)
    return {[] { return cuda::cuda_present(); }, [](int device) { return cuda::cuda_unavailable(device); },
            [](int device, double memory_fraction, bool deterministic) {
                return cuda::make_cuda_device({device, memory_fraction, deterministic});
            }};
#else
    return {[] { return false; }, [](int) { return std::string("this build has no CUDA backend"); }, {}};
#endif
}

int gpu_number(const std::string& device) {
    if (device == "auto" || device == "cuda") return 0;
    if (device == "cpu") return -1;
    constexpr std::string_view kPrefix = "cuda:";
    int number = -1;
    if (device.starts_with(kPrefix)) {
        const char* const begin = device.data() + kPrefix.size();
        const char* const end = device.data() + device.size();
        const auto [at, error] = std::from_chars(begin, end, number);
        if (error != std::errc() || at != end) number = -1;
    }
    REFRAG_CHECK(number >= 0, Status::usage, "--device: expected auto, cpu, cuda or cuda:N; found \"",
                 printable(device, 60), "\"");
    return number;
}

ChosenDevice choose_device(const DeviceOptions& options, const GpuRuntime& gpu) {
    const int number = gpu_number(options.device);
    REFRAG_CHECK(options.gpu_memory_fraction > 0.0 && options.gpu_memory_fraction <= 1.0, Status::usage,
                 "--gpu-memory-fraction: expected a number above 0, at most 1; found ",
                 options.gpu_memory_fraction);
    if (number < 0) return {make_cpu_device(options.threads), "asked for", ""};
    const bool automatic = options.device == "auto";
    std::string why = gpu.unavailable(number);
    if (why.empty()) {
        try {
            return {gpu.open(number, options.gpu_memory_fraction, options.deterministic),
                    automatic ? "a GPU is there" : "asked for", ""};
        } catch (const Error& error) {
            // It may be another process' alone, or full.
            if (!automatic) throw;
            why = error.what();
        }
    }
    REFRAG_CHECK(automatic, Status::runtime, "--device ", options.device, ": ", why, "; use --device cpu");
    std::string warning;
    if (gpu.present()) warning = str("a GPU is there and cannot be used: ", why, "; computing on the CPU");
    return {make_cpu_device(options.threads), std::move(why), std::move(warning)};
}

}  // namespace refrag
