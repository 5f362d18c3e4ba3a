// See peaks.h. Not compiled for the host: what it measures is a GPU's clock.
#include "peaks.h"

#include <algorithm>
#include <cstdint>

#include "base/arena.h"
#include "cublas.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

constexpr int kThreads = 512;
// 16-byte accesses of a thread that are under way at once.
constexpr int kInFlight = 8;
constexpr size_t kMost = size_t{4} << 30, kLeast = size_t{64} << 20;
constexpr int64_t kProduct = 8192;       // rows, columns and depth
constexpr int64_t kSmallProduct = 2048;  // where memory is short

struct Stream {
    cudaStream_t handle = nullptr;
    Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(handle); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
};

struct Event {
    cudaEvent_t handle = nullptr;
    Event() { CUDA_CHECK(cudaEventCreate(&handle)); }
    ~Event() { cudaEventDestroy(handle); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
};

// Device memory from the pool that a backend's memory comes from, so that what it has given back serves here.
class PoolMemory : public MemorySource {
  public:
    explicit PoolMemory(cudaStream_t stream) : stream_(stream) {}
    void* allocate(size_t bytes) override {
        void* data = nullptr;
        const cudaError_t error = cudaMallocAsync(&data, bytes, stream_);
        if (error != cudaSuccess) cudaGetLastError();
        CUDA_CHECK(error);
        return data;
    }
    void release(void* data) noexcept override { cudaFreeAsync(data, stream_); }

  private:
    cudaStream_t stream_;
};

// As much as can be had of `most` bytes, halving.
Buffer as_much(PoolMemory& memory, size_t most) {
    for (;; most /= 2) {
        try {
            return {memory, most};
        } catch (const Error& error) {
            if (error.status() != Status::out_of_memory || most / 2 < kLeast) throw;
        }
    }
}

// Bits that look drawn, of the element's number (splitmix64's finisher).
__device__ __forceinline__ uint32_t drawn(uint64_t z) {
    z = (z + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(z >> 32);
}

// Numbers in [-1, 1). Mapping: a thread for each element, blocks going round. Bound by: memory.
__global__ void fill_bf16_kernel(uint16_t* out, int64_t n) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] =
            round_bf16(static_cast<float>(static_cast<int32_t>(drawn(static_cast<uint64_t>(i)))) * 0x1p-31f);
    }
}
__global__ void fill_fp32_kernel(float* out, int64_t n) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] = static_cast<float>(static_cast<int32_t>(drawn(static_cast<uint64_t>(i)))) * 0x1p-31f;
    }
}

// Mapping: a block for each kThreads * kInFlight vectors, which its threads take side by side. `never`: what
// or-ing 32 drawn words will not give (0); without the comparison nothing would be read. Alignment: 16 bytes.
// Bound by: memory.
__global__ void __launch_bounds__(kThreads) read_kernel(uint32_t* out, const uint4* in, uint32_t never) {
    const uint4* const from = in + static_cast<int64_t>(blockIdx.x) * kThreads * kInFlight + threadIdx.x;
    uint4 seen[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) seen[i] = __ldcs(from + i * kThreads);
    uint32_t mix = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) mix |= seen[i].x | seen[i].y | seen[i].z | seen[i].w;
    if (mix == never) *out = mix;
}

// Mapping and alignment: as read_kernel.
__global__ void __launch_bounds__(kThreads) copy_kernel(uint4* out, const uint4* in) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kInFlight + threadIdx.x;
    uint4 seen[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) seen[i] = __ldcs(in + first + i * kThreads);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) __stcs(out + first + i * kThreads, seen[i]);
}

// Seconds of one call of `enqueue`, the best of `batches` batches of `calls`, after one that warms up.
template <typename Enqueue>
double best_seconds(cudaStream_t stream, int batches, int calls, const Enqueue& enqueue) {
    const Event began, ended;
    double best = 0.0;
    for (int batch = 0; batch <= batches; ++batch) {
        CUDA_CHECK(cudaEventRecord(began.handle, stream));
        for (int i = 0; i < calls; ++i) enqueue();
        CUDA_CHECK(cudaEventRecord(ended.handle, stream));
        CUDA_CHECK(cudaEventSynchronize(ended.handle));
        float ms = 0.0f;
        CUDA_CHECK(cudaEventElapsedTime(&ms, began.handle, ended.handle));
        const double seconds = ms * 1e-3 / calls;
        if (batch > 0 && (batch == 1 || seconds < best)) best = seconds;
    }
    return best;
}

template <typename Element, typename Fill>
double product_gflops(cudaStream_t stream, PoolMemory& memory, Cublas& cublas, DType dtype, int calls,
                      Fill fill) {
    for (int64_t n = kProduct;; n /= 2) {
        try {
            const auto elements = static_cast<size_t>(n * n);
            // Two factors and the fp32 result.
            const Buffer x(memory, elements * sizeof(Element)), w(memory, elements * sizeof(Element)),
                out(memory, elements * sizeof(float));
            for (const Buffer* factor : {&x, &w}) {
                CUDA_CHECK(launch(fill, dim3(4096), dim3(kThreads), 0, stream,
                                  static_cast<Element*>(factor->data()), n * n));
            }
            const double seconds = best_seconds(stream, 6, calls, [&] {
                cublas.multiply(static_cast<float*>(out.data()), x.data(), w.data(), dtype, n, n, n, 0.0f, n);
            });
            const auto side = static_cast<double>(n);
            return 2.0 * side * side * side / seconds * 1e-9;
        } catch (const Error& error) {
            if (error.status() != Status::out_of_memory || n / 2 < kSmallProduct) throw;
        }
    }
}

}  // namespace

GpuPeaks measure_gpu_peaks(int device) {
    const std::string why = cuda_unavailable(device);
    REFRAG_CHECK(why.empty(), Status::runtime, why);
    CUDA_CHECK(cudaSetDevice(device));
    const Stream stream;
    PoolMemory memory(stream.handle);
    GpuPeaks peaks;
    {
        const Buffer workspace(memory, kCublasWorkspaceBytes);
        CUDA_CHECK(cudaStreamSynchronize(stream.handle));
        Cublas cublas(stream.handle, workspace.data(), workspace.bytes());
        peaks.bf16_gflops =
            product_gflops<uint16_t>(stream.handle, memory, cublas, DType::bf16, 5, fill_bf16_kernel);
        peaks.fp32_gflops =
            product_gflops<float>(stream.handle, memory, cublas, DType::f32, 1, fill_fp32_kernel);
        CUDA_CHECK(cudaStreamSynchronize(stream.handle));
    }
    const Buffer buffer = as_much(memory, kMost);
    CUDA_CHECK(launch(fill_fp32_kernel, dim3(4096), dim3(kThreads), 0, stream.handle,
                      static_cast<float*>(buffer.data()),
                      static_cast<int64_t>(buffer.bytes() / sizeof(float))));
    constexpr size_t kBlockBytes = size_t{kThreads} * kInFlight * sizeof(uint4);
    const auto* const from = static_cast<const uint4*>(buffer.data());
    const size_t half = buffer.bytes() / 2;  // whole blocks: the sizes are powers of two
    auto* const to = reinterpret_cast<uint4*>(static_cast<std::byte*>(buffer.data()) + half);
    const double read_s = best_seconds(stream.handle, 10, 2, [&] {
        CUDA_CHECK(launch(read_kernel, dim3(static_cast<unsigned>(buffer.bytes() / kBlockBytes)),
                          dim3(kThreads), 0, stream.handle, static_cast<uint32_t*>(buffer.data()), from, 0u));
    });
    const double copy_s = best_seconds(stream.handle, 10, 2, [&] {
        CUDA_CHECK(launch(copy_kernel, dim3(static_cast<unsigned>(half / kBlockBytes)), dim3(kThreads), 0,
                          stream.handle, to, from));
    });
    peaks.read_gbs = static_cast<double>(buffer.bytes()) / read_s * 1e-9;
    peaks.copy_gbs = 2.0 * static_cast<double>(half) / copy_s * 1e-9;
    return peaks;
}

GpuInfo gpu_info(int device) {
    const std::string why = cuda_unavailable(device);
    REFRAG_CHECK(why.empty(), Status::runtime, why);
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    const auto version = [](int number) { return str(number / 1000, ".", number % 1000 / 10); };
    int driver = 0, runtime = 0;
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    return {properties.name, version(driver), version(runtime)};
}

}  // namespace refrag::REFRAG_CUDA
