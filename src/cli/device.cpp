// See device.h.
#include "cli/device.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <utility>

#include "cli/numbers.h"

namespace refrag {

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

std::unique_ptr<Device> make_device(const DeviceOptions& options, std::string* choice) {
    ChosenDevice chosen = choose_device(options, own_gpu_runtime());
    if (!chosen.warning.empty()) std::fprintf(stderr, "refrag: warning: %s\n", chosen.warning.c_str());
    if (choice != nullptr) *choice = chosen.why;
    return std::move(chosen.device);
}

}  // namespace refrag
