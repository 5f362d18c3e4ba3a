// The CUDA backend itself: the device and its memory; a queue, its copies, and work that is recorded once and
// replayed.
#include "cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "backend_impl.cuh"

namespace refrag::REFRAG_CUDA {
namespace {

// The oldest compute capability that the kernels are compiled for.
constexpr int kOldestMajor = 8;

std::string mib(uint64_t bytes) {
    return str(bytes, " bytes (", bytes >> 20, " MiB)");
}

}  // namespace

bool cuda_present() {
    int driver = 0, count = 0;
    // The version is 0 where there is no driver at all.
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return false;
    const bool some = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
    cudaGetLastError();  // so that no later call reports it again
    return some;
}

std::string cuda_unavailable(int device) {
    int driver = 0, count = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return "no NVIDIA driver is installed";
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return str("no CUDA device can be used: ", cudaGetErrorString(error));
    }
    if (count == 0) return "no CUDA device is visible";
    const std::string name = str("cuda:", device, ": ");
    if (device < 0 || device >= count)
        return str(name, count, count == 1 ? " device is" : " devices are", " visible, cuda:0",
                   count == 1 ? "" : str(" to cuda:", count - 1));
    int major = 0, minor = 0, pools = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, device) != cudaSuccess) {
        cudaGetLastError();
        return name + "it does not say what it can do";
    }
    if (major < kOldestMajor)
        return str(name, "it has compute capability ", major, ".", minor, "; at least ", kOldestMajor,
                   ".0 is needed");
    // Some virtual GPUs have none.
    if (pools == 0) return name + "it has no memory pools (cudaMallocAsync), which are needed";
    return cublas_unavailable();
}

namespace {

std::unique_ptr<CudaDevice> new_cuda_device(const CudaOptions& options) {
    const std::string why = cuda_unavailable(options.device);
    REFRAG_CHECK(why.empty(), Status::runtime, why);
    return std::make_unique<CudaDevice>(options);
}

}  // namespace

std::unique_ptr<Device> make_cuda_device(const CudaOptions& options) {
    return new_cuda_device(options);
}

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
    std::unique_ptr<CudaDevice> device = new_cuda_device(options);
    CudaDevice& of = *device;
    return std::make_unique<CudaBackend>(of, std::move(device));
}

// ---- the device -----------------------------------------------------------------------------------------

CudaDevice::CudaDevice(const CudaOptions& options) : ordinal_(options.device), options_(options) {
    REFRAG_CHECK(options.memory_fraction > 0.0 && options.memory_fraction <= 1.0, Status::usage,
                 "GPU memory fraction: expected a number above 0, at most 1, found ",
                 options.memory_fraction);
    make_current();
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal_));
    name_ = properties.name;
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    budget_bytes_ = static_cast<uint64_t>(static_cast<double>(free_bytes) * options.memory_fraction);
    // Memory that is given back stays with this process, so that taking it again costs nothing.
    cudaMemPool_t pool = nullptr;
    uint64_t keep = UINT64_MAX;
    CUDA_CHECK(cudaDeviceGetDefaultMemPool(&pool, ordinal_));
    CUDA_CHECK(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    staging_.emplace(stream_);
}

CudaDevice::~CudaDevice() {
    try_make_current();
    cudaStreamSynchronize(stream_);
    staging_.reset();
    cudaStreamDestroy(stream_);
}

std::string CudaDevice::description() const {
    return str("cuda", ordinal_ == 0 ? "" : str(":", ordinal_), ": ", name_,
               options_.deterministic ? ", deterministic" : "");
}

std::unique_ptr<Backend> CudaDevice::make_backend() {
    return std::make_unique<CudaBackend>(*this);
}

uint64_t CudaDevice::available_bytes() const {
    const std::lock_guard<std::mutex> lock(memory_mutex_);
    return budget_bytes_ - held_bytes_;
}

void* CudaDevice::allocate_on(cudaStream_t stream, size_t bytes) {
    make_current();
    const std::lock_guard<std::mutex> lock(memory_mutex_);
    const uint64_t left = budget_bytes_ - held_bytes_;
    REFRAG_CHECK(bytes <= left, Status::out_of_memory, "GPU memory: ", mib(bytes), " needed, ", mib(left),
                 " left of the ", mib(budget_bytes_), " that this process may take");
    void* data = nullptr;
    const cudaError_t error = cudaMallocAsync(&data, bytes, stream);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        size_t free_bytes = 0, total_bytes = 0;
        cudaMemGetInfo(&free_bytes, &total_bytes);
        fail(Status::out_of_memory, "GPU memory: ", mib(bytes), " needed, ", mib(free_bytes),
             " free on the device (other processes use it too)");
    }
    CUDA_CHECK(error);
    try {
        sizes_.emplace(data, bytes);
    } catch (...) {
        cudaFreeAsync(data, stream);
        throw;
    }
    held_bytes_ += bytes;
    return data;
}

void CudaDevice::release_on(cudaStream_t stream, void* data) noexcept {
    if (data == nullptr) return;
    try_make_current();
    const std::lock_guard<std::mutex> lock(memory_mutex_);
    const auto at = sizes_.find(data);
    held_bytes_ -= at->second;
    sizes_.erase(at);
    cudaFreeAsync(data, stream);
}

void* CudaDevice::allocate(size_t bytes) {
    void* const data = allocate_on(stream_, bytes);
    // From here on it is any stream's.
    const cudaError_t error = cudaStreamSynchronize(stream_);
    if (error != cudaSuccess) release_on(stream_, data);
    CUDA_CHECK(error);
    return data;
}

void CudaDevice::release(void* data) noexcept {
    release_on(stream_, data);
}

void CudaDevice::enqueue_upload(void* dst, const void* src, size_t bytes) {
    make_current();
    const std::lock_guard<std::mutex> lock(staging_mutex_);
    staging_->upload(dst, src, bytes);
}

void CudaDevice::finish_uploads() {
    make_current();
    CUDA_CHECK(cudaStreamSynchronize(stream_));
}

void CudaDevice::upload(void* dst, const void* src, size_t bytes) {
    enqueue_upload(dst, src, bytes);
    finish_uploads();
}

Staging::~Staging() {
    for (const Chunk& chunk : chunks_) {
        if (chunk.copied != nullptr) cudaEventDestroy(chunk.copied);
        if (chunk.data != nullptr) cudaFreeHost(chunk.data);
    }
}

void* Staging::take(size_t bytes) {
    constexpr size_t kAlignment = 64;
    if (chunks_[current_].data != nullptr && kChunkBytes - used_ < bytes) {
        CUDA_CHECK(cudaEventRecord(chunks_[current_].copied, stream_));
        current_ = (current_ + 1) % kChunks;
        used_ = 0;
        if (chunks_[current_].data != nullptr) CUDA_CHECK(cudaEventSynchronize(chunks_[current_].copied));
    }
    Chunk& chunk = chunks_[current_];
    if (chunk.copied == nullptr) CUDA_CHECK(cudaEventCreateWithFlags(&chunk.copied, cudaEventDisableTiming));
    if (chunk.data == nullptr) CUDA_CHECK(cudaMallocHost(&chunk.data, kChunkBytes));
    void* const at = static_cast<std::byte*>(chunk.data) + used_;
    used_ = std::min(kChunkBytes, used_ + (bytes + kAlignment - 1) / kAlignment * kAlignment);
    return at;
}

void Staging::upload(void* dst, const void* src, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const size_t n = std::min(bytes - done, kChunkBytes);
        void* const staged = take(n);
        std::memcpy(staged, static_cast<const std::byte*>(src) + done, n);
        CUDA_CHECK(
            cudaMemcpyAsync(static_cast<std::byte*>(dst) + done, staged, n, cudaMemcpyHostToDevice, stream_));
        done += n;
    }
}

// ---- a queue --------------------------------------------------------------------------------------------

CudaBackend::CudaBackend(CudaDevice& device, std::unique_ptr<CudaDevice> kept)
    : kept_(std::move(kept)), device_(device) {
    device_.make_current();
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    try {
        staging_.emplace(stream_);
        workspace_ = Buffer(*this, kCublasWorkspaceBytes);
        cublas_.emplace(stream_, workspace_.data(), workspace_.bytes());
    } catch (...) {
        workspace_ = Buffer{};
        staging_.reset();
        cudaStreamDestroy(stream_);
        throw;
    }
}

CudaBackend::~CudaBackend() {
    device_.try_make_current();
    cudaStreamSynchronize(stream_);
    for (CudaScratch& scratch : scratch_) scratch.memory = Buffer{};
    cublas_.reset();
    workspace_ = Buffer{};
    staging_.reset();
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
}

void* CudaBackend::allocate(size_t bytes) {
    return device_.allocate_on(stream_, bytes);
}

void CudaBackend::release(void* data) noexcept {
    device_.release_on(stream_, data);
}

void* CudaBackend::scratch(ScratchUse use, size_t bytes) {
    const auto index = static_cast<size_t>(use);
    CudaScratch& held = scratch_[index];
    if (recording_) named_[index] = true;
    if (bytes <= held.memory.bytes()) return held.memory.data();
    REFRAG_CHECK(!recording_, Status::runtime, "GPU memory taken while work is recorded");
    ++held.moves;  // what is recorded with it is not done again (replay)
    held.memory = Buffer{};
    held.memory = Buffer(*this, bytes + bytes / 4);
    return held.memory.data();
}

void CudaBackend::upload(void* dst, const void* src, size_t bytes) {
    REFRAG_DCHECK(!recording_);
    device_.make_current();
    staging_->upload(dst, src, bytes);
}

void CudaBackend::download(void* dst, const void* src, size_t bytes) {
    REFRAG_DCHECK(!recording_);
    // Even of nothing: what download() promises is that all work has ended.
    if (bytes > 0) CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, stream()));
    wait();
}

void CudaBackend::wait() {
    CUDA_CHECK(cudaStreamSynchronize(stream()));
}

void CudaBackend::copy(Tensor out, Tensor x) {
    REFRAG_DCHECK(out.rows == x.rows && out.cols == x.cols && out.dtype == x.dtype);
    if (x.empty()) return;
    CUDA_CHECK(cudaMemcpyAsync(out.data, x.data, x.bytes(), cudaMemcpyDeviceToDevice, stream()));
}

// ---- recorded work --------------------------------------------------------------------------------------

void CudaRecording::drop(Entry& entry) noexcept {
    if (entry.graph == nullptr) return;
    device_.try_make_current();
    cudaStreamSynchronize(stream_);
    cudaGraphExecDestroy(entry.graph);
    entry.graph = nullptr;
}

void CudaRecording::forget() noexcept {
    for (auto& [key, entry] : entries_) drop(entry);
    entries_.clear();
}

std::unique_ptr<Recording> CudaBackend::make_recording() {
    return std::make_unique<CudaRecording>(device_, stream_);
}

void CudaBackend::replay(Recording& recording, uint64_t key, FunctionRef<void()> enqueue) {
    auto& r = static_cast<CudaRecording&>(recording);  // NOLINT: made by make_recording
    auto at = r.entries_.find(key);
    // A graph that names scratch which has moved since is as if it had never been.
    const auto moved = [&](const CudaRecording::Entry& entry) {
        for (size_t i = 0; i < kScratchUses; ++i) {
            if (entry.scratch_moves[i] != 0 && entry.scratch_moves[i] != scratch_[i].moves) return true;
        }
        return false;
    };
    if (at != r.entries_.end() && moved(at->second)) {
        r.drop(at->second);
        r.entries_.erase(at);
        at = r.entries_.end();
    }
    if (at == r.entries_.end()) {
        ++r.counts_.run;
        enqueue();
        if (r.entries_.size() >= CudaRecording::kMostEntries) {
            const auto oldest =
                std::min_element(r.entries_.begin(), r.entries_.end(),
                                 [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
            r.drop(oldest->second);
            r.entries_.erase(oldest);
        }
        r.entries_.emplace(key, CudaRecording::Entry{nullptr, ++r.uses_, {}});
        return;
    }
    CudaRecording::Entry& entry = at->second;
    entry.used = ++r.uses_;
    if (entry.graph == nullptr) {
        ++r.counts_.recorded;
        cudaGraph_t graph = nullptr;
        named_ = {};
        CUDA_CHECK(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal));
        recording_ = true;
        try {
            enqueue();
        } catch (...) {
            recording_ = false;
            cudaStreamEndCapture(stream_, &graph);
            if (graph != nullptr) cudaGraphDestroy(graph);
            cudaGetLastError();
            throw;
        }
        recording_ = false;
        CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
        const cudaError_t error = cudaGraphInstantiate(&entry.graph, graph, 0);
        cudaGraphDestroy(graph);
        CUDA_CHECK(error);
        for (size_t i = 0; i < kScratchUses; ++i) entry.scratch_moves[i] = named_[i] ? scratch_[i].moves : 0;
    } else {
        ++r.counts_.replayed;
    }
    CUDA_CHECK(cudaGraphLaunch(entry.graph, stream()));
}

}  // namespace refrag::REFRAG_CUDA
