// The CUDA backend over the executor, for tests that are compiled as ordinary C++.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "ops/backend.h"

namespace refrag_on_host {

struct OpenOptions {
    uint64_t seed = 1;  // of the order in which threads run
    bool deterministic = false;
    double memory_fraction = 0.9;
    uint64_t memory_bytes = uint64_t{1} << 32;  // of the device
    int device = 0;
    bool plain_attention = false;
    int own_product_rows = 8;
};
// The machine that the backend finds, for all who open it from here on; {} is one good device.
struct Machine {
    int n_devices = 1;
    bool has_driver = true;
    bool has_pools = true;
    bool has_cublas = true;
    bool opens = true;  // not where another process has the device for itself
    int capability = 9;
};
void set_machine(const Machine& machine);
// cuda/cuda_backend.h's of that machine.
bool present();
std::string unavailable(int device = 0);
std::unique_ptr<refrag::Device> open_device(const OpenOptions& options = {});
// A device with one queue, which owns it.
std::unique_ptr<refrag::Backend> open_backend(const OpenOptions& options = {});
// Kernels launched so far by this thread.
uint64_t kernels_launched();
// Allocations of device memory so far, of all threads.
uint64_t allocations_made();

}  // namespace refrag_on_host
