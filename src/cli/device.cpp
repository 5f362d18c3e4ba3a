// See device.h.
#include "cli/device.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdio>
#include <utility>

#include "base/check.h"
#include "cli/numbers.h"
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

void add_device_options(CLI::App& app, DeviceOptions& options) {
    app.add_option("--device", options.device,
                   "Where to compute; auto takes the first GPU when this build and machine have one that can "
                   "be used, else "
                   "the CPU; cuda:N is the GPU number N of those visible")
        ->capture_default_str()
        ->envname("REFRAG_DEVICE")
        ->type_name("auto|cpu|cuda");
    app.add_option("-t,--threads", options.threads, "CPU threads; 0: all this process may use")
        ->capture_default_str()
        ->transform(whole_number(0, 4096))
        ->type_name("N");
    app.add_flag("--deterministic", options.deterministic,
                 "One accumulation order whatever the batch (the CPU always computes so; slow on a GPU)");
    app.add_option("--gpu-memory-fraction", options.gpu_memory_fraction,
                   "Of the GPU's free memory, how much to take at most (above 0, at most 1)")
        ->capture_default_str()
        ->transform(decimal_number())
        ->type_name("X");
    app.add_option("--weights", options.weights,
                   "Layers' matrices: as stored, or quantised to 8 bits with a scale for every 32 weights")
        ->capture_default_str()
        ->type_name("auto|int8");
    // Taken as they are: CLI11 reads "[a,b]" as a list of its own.
    app.add_option(
           "--lora",
           [&options](const CLI::results_t& results) {
               options.adapters = results;
               return true;
           },
           "Merge a PEFT adapter (adapter_config.json, adapter_model.safetensors) into the decoder while it "
           "is "
           "loaded; given several times, all of them")
        ->type_name("DIR")
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
        ->type_size(1)
        ->expected(1)
        ->allow_extra_args(false);
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

std::unique_ptr<Device> make_device(const DeviceOptions& options, std::string* choice) {
    ChosenDevice chosen = choose_device(options, own_gpu_runtime());
    if (!chosen.warning.empty()) std::fprintf(stderr, "refrag: warning: %s\n", chosen.warning.c_str());
    if (choice != nullptr) *choice = chosen.why;
    return std::move(chosen.device);
}

}  // namespace refrag
