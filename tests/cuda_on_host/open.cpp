// See open.h.
#include "open.h"

#include "cuda_backend.h"

namespace refrag_on_host {

namespace {

refrag::cuda_on_host::CudaOptions prepared(const OpenOptions& options) {
    set_seed(options.seed);
    device().total_bytes = device().used_bytes + options.memory_bytes;
    refrag::cuda_on_host::CudaOptions cuda;
    cuda.deterministic = options.deterministic;
    cuda.memory_fraction = options.memory_fraction;
    cuda.device = options.device;
    cuda.plain_attention = options.plain_attention;
    cuda.own_product_rows = options.own_product_rows;
    return cuda;
}

}  // namespace

std::unique_ptr<refrag::Device> open_device(const OpenOptions& options) {
    return refrag::cuda_on_host::make_cuda_device(prepared(options));
}

std::unique_ptr<refrag::Backend> open_backend(const OpenOptions& options) {
    return refrag::cuda_on_host::make_cuda_backend(prepared(options));
}

void set_machine(const Machine& machine) {
    Device& d = device();
    d.n_devices = machine.n_devices;
    d.has_driver = machine.has_driver;
    d.has_pools = machine.has_pools;
    d.has_cublas = machine.has_cublas;
    d.opens = machine.opens;
    d.capability = machine.capability;
}

bool present() {
    return refrag::cuda_on_host::cuda_present();
}

std::string unavailable(int device) {
    return refrag::cuda_on_host::cuda_unavailable(device);
}

uint64_t kernels_launched() {
    return launches();
}

uint64_t allocations_made() {
    return device().n_allocated;
}

}  // namespace refrag_on_host
