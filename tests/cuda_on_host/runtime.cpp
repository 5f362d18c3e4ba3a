// The device's memory, see on_host.h. Fresh memory holds NaN in every type.
#include "on_host.h"

#include <map>
#include <mutex>

namespace refrag_on_host {
namespace {

// Of all threads, as a GPU's is. Never destroyed: backends of static duration may end later.
struct Memory {
    Device device;
    std::mutex mutex;  // of what follows, and of changing the device's numbers
    std::map<void*, size_t> allocations;
};
Memory& memory() {
    static auto* const of_process = new Memory;
    return *of_process;
}

}  // namespace

Device& device() {
    return memory().device;
}

cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t stream) {
    if (stream->device != current_device()) return cudaErrorInvalidResourceHandle;
    Device& d = device();
    *data = nullptr;
    const std::lock_guard<std::mutex> lock(memory().mutex);
    if (bytes > d.total_bytes - d.used_bytes) return cudaErrorMemoryAllocation;
    // Exactly as many bytes as asked for, so that AddressSanitizer sees the first one beyond.
    if (posix_memalign(data, 256, bytes) != 0) return cudaErrorMemoryAllocation;
    std::memset(*data, 0xff, bytes);
    d.used_bytes += bytes;
    ++d.n_allocated;
    memory().allocations[*data] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* data, cudaStream_t) {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    const auto at = memory().allocations.find(data);
    if (at == memory().allocations.end()) return cudaErrorInvalidValue;
    device().used_bytes -= at->second;
    memory().allocations.erase(at);
    std::free(data);
    return cudaSuccess;
}

}  // namespace refrag_on_host
