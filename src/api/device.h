// Which device computes, and why: the CPU, or a GPU that can be used.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ops/backend.h"

namespace refrag {

struct DeviceOptions {
    std::string device = "auto";  // auto, cpu, cuda, cuda:N
    int threads = 0;              // 0: all CPUs this process may use
    bool deterministic = false;
    std::string weights = "auto";  // auto, int8
    double gpu_memory_fraction = 0.9;
    std::vector<std::string> adapters;  // directories of PEFT adapters
};

// The GPU that a word for --device names, 0 for auto and cuda; -1 for cpu. Status::usage for any other word.
int gpu_number(const std::string& device);

// A CUDA backend (cuda/cuda_backend.h), or none.
struct GpuRuntime {
    std::function<bool()> present;
    std::function<std::string(int device)> unavailable;
    // Called where unavailable() gives "".
    std::function<std::unique_ptr<Device>(int device, double memory_fraction, bool deterministic)> open;
};
// This build's.
GpuRuntime own_gpu_runtime();

struct ChosenDevice {
    std::unique_ptr<Device> device;
    std::string why;      // in a few words
    std::string warning;  // for the user; "" where all is as expected
};
// auto takes GPU 0, and the CPU where that one cannot be used or opened. Status::usage for a word that is no
// device, Status::runtime for a GPU that was asked for and cannot be used.
ChosenDevice choose_device(const DeviceOptions& options, const GpuRuntime& gpu);

}  // namespace refrag
