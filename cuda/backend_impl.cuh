// What the files of the CUDA backend share: the device, its queue, whose ops are defined in the file of their
// family, and weight matrices.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "attention.cuh"
#include "base/int8.h"
#include "cublas.cuh"
#include "device.cuh"

namespace refrag::REFRAG_CUDA {

// F32, F16 and BF16: [out_dim, in_dim], row-major. I8: the values [out_dim, stride] with rows padded to whole
// groups of 32, then the F16 scales [out_dim, stride / 32].
class CudaMatrix : public Matrix {
  public:
    CudaMatrix(MemorySource& source, DType dtype, int64_t out_dim, int64_t in_dim);
    size_t device_bytes() const override { return buffer_.bytes(); }

    void* data() const { return buffer_.data(); }
    int64_t stride() const { return stride_; }  // elements from a row to the next
    uint16_t* scales() const {
        return reinterpret_cast<uint16_t*>(static_cast<int8_t*>(buffer_.data()) + out_dim() * stride_);
    }
    int64_t n_groups() const { return stride_ / kInt8Group; }

  private:
    int64_t stride_;
    Buffer buffer_;
};

// Pinned host memory through which uploads go, so that the caller's memory is free at once: chunks in turn,
// each reused when the copies out of it have ended.
class Staging {
  public:
    explicit Staging(cudaStream_t stream) : stream_(stream) {}
    ~Staging();
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    // Enqueues a copy to device memory; src may be reused at once.
    void upload(void* dst, const void* src, size_t bytes);

  private:
    // Memory for `bytes` <= kChunkBytes, to be filled and copied from by the stream's next work.
    void* take(size_t bytes);
    struct Chunk {
        void* data = nullptr;
        cudaEvent_t copied = nullptr;
    };
    static constexpr size_t kChunkBytes = size_t{4} << 20;
    static constexpr size_t kChunks = 4;
    cudaStream_t stream_;
    Chunk chunks_[kChunks];
    size_t current_ = 0;
    size_t used_ = 0;
};

class CudaDevice : public Device {
  public:
    explicit CudaDevice(const CudaOptions& options);
    ~CudaDevice() override;

    void* allocate(size_t bytes) override;
    void release(void* data) noexcept override;
    std::string description() const override;
    uint64_t available_bytes() const override;
    bool is_remote() const override { return true; }
    // rope.cu
    DType kv_dtype(DType weights, int32_t head_dim) const override;
    void upload(void* dst, const void* src, size_t bytes) override;
    // gemm.cu
    std::unique_ptr<Matrix> make_matrix(DType dtype, int64_t out_dim, int64_t in_dim,
                                        const RowReader& read) override;
    std::unique_ptr<Backend> make_backend() override;

    // Memory in the order of a stream's work; counted as the device's.
    void* allocate_on(cudaStream_t stream, size_t bytes);
    void release_on(cudaStream_t stream, void* data) noexcept;
    // Makes the device the calling thread's, which may be a new one or have used another since.
    void make_current() const { CUDA_CHECK(cudaSetDevice(ordinal_)); }
    void try_make_current() const noexcept { cudaSetDevice(ordinal_); }  // where errors have no place
    const CudaOptions& options() const { return options_; }

  private:
    // Enqueues a copy for loading; finish_uploads() waits until all have ended.
    void enqueue_upload(void* dst, const void* src, size_t bytes);
    void finish_uploads();

    int ordinal_;
    CudaOptions options_;
    std::string name_;
    uint64_t budget_bytes_ = 0;
    mutable std::mutex memory_mutex_;  // of the next two
    uint64_t held_bytes_ = 0;
    std::map<void*, size_t> sizes_;
    cudaStream_t stream_ = nullptr;  // of loading, and of memory that is no queue's
    std::mutex staging_mutex_;
    std::optional<Staging> staging_;
};

// Scratch of one purpose keeps its memory until more is asked for, and counts how often it has moved.
enum class ScratchUse { rounded, widened, partial, top };
inline constexpr size_t kScratchUses = 4;

struct CudaScratch {
    Buffer memory;
    uint64_t moves = 0;
};

// Work by its key. A key's first call runs as it is, so that all scratch is there; its second is recorded.
class CudaRecording : public Recording {
  public:
    CudaRecording(const CudaDevice& device, cudaStream_t stream) : device_(device), stream_(stream) {}
    ~CudaRecording() override { forget(); }
    void forget() noexcept override;

  private:
    friend class CudaBackend;
    struct Entry {
        cudaGraphExec_t graph = nullptr;
        uint64_t used = 0;
        // Where scratch was that the graph names; uses it does not name are 0.
        std::array<uint64_t, kScratchUses> scratch_moves{};
    };
    static constexpr size_t kMostEntries = 64;
    // Ends a graph, which must not run while it goes.
    void drop(Entry& entry) noexcept;

    const CudaDevice& device_;
    cudaStream_t stream_;
    std::map<uint64_t, Entry> entries_;
    uint64_t uses_ = 0;
};

class CudaBackend : public Backend {
  public:
    // kept: the device, where the queue owns it; else null.
    explicit CudaBackend(CudaDevice& device, std::unique_ptr<CudaDevice> kept = nullptr);
    ~CudaBackend() override;

    Device& device() const override { return device_; }
    void* allocate(size_t bytes) override;
    void release(void* data) noexcept override;

    void upload(void* dst, const void* src, size_t bytes) override;
    void download(void* dst, const void* src, size_t bytes) override;
    void copy(Tensor out, Tensor x) override;
    void wait() override;
    std::unique_ptr<Recording> make_recording() override;
    void replay(Recording& recording, uint64_t key, FunctionRef<void()> enqueue) override;

    // gemm.cu
    void linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) override;
    void linears(Tensor x, std::span<const Product> products) override;
    void linear_add(Tensor residual, Tensor x, const Product& y) override;
    void linear_silu_mul(Tensor x, const Product& gate, const Product& up) override;

    // embedding.cu
    void embed(Tensor out, const Matrix& table, const int32_t* source, Tensor vectors) override;
    void add_embed(Tensor x, const Matrix& table, const int32_t* ids) override;
    void gather_rows(Tensor out, Tensor x, const int32_t* index) override;

    // elementwise.cu
    void add(Tensor x, Tensor y) override;
    void gelu(Tensor x) override;
    void tanh(Tensor x) override;
    void silu_mul(Tensor gate, Tensor up) override;

    // norm.cu
    void rms_norm(Tensor out, Tensor x, Tensor weight, float eps) override;
    void layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) override;
    void l2_normalize(Tensor x) override;

    // rope.cu
    void rope_table(Tensor cos_sin, const float* position, Tensor inv_freq) override;
    void rope(Tensor x, Tensor cos_sin) override;
    void kv_append(const KvView& kv, int32_t layer, Tensor k, Tensor v, const Batch& batch) override;
    void rope_kv_append(const KvView& kv, int32_t layer, Tensor q, Tensor k, Tensor v, Tensor cos_sin,
                        const Batch& batch) override;

    // attention.cu
    void attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape, const KvView* kv,
                   int32_t layer, const Batch& batch) override;

    // reduce.cu
    void pool(Tensor out, Tensor x, const Batch& batch, Pooling pooling) override;
    void nll(Tensor out, Tensor logits, const int32_t* target) override;
    void top_logits(Tensor values, int32_t* ids, Tensor logits) override;
    void draw(int32_t* ids, Tensor logits, const TokenDraw* draws) override;

  private:
    // The n largest of each row, in scratch that goes on for `more_bytes` behind them. See reduce.cu.
    void* top_candidates(Tensor logits, int32_t n, size_t more_bytes);

    // At least `bytes` of scratch, this queue's, until its next op of the same use.
    void* scratch(ScratchUse use, size_t bytes);

    // See gemm.cu. add: out += instead of out =.
    void multiply(Tensor out, const CudaMatrix& w, Tensor bias, bool add, const void* rounded_x);
    // What cuBLAS takes activations as beside weights of `dtype`, and x as that: itself, or rounded into
    // scratch.
    static DType rounding_of(DType dtype) { return dtype == DType::i8 ? DType::bf16 : dtype; }
    const void* rounded(Tensor x, DType dtype);
    bool by_own_kernels(int64_t rows, int64_t in_dim) const;
    // At most kMaxParts products of weights of one dtype, of any number of rows.
    void own_products(Tensor x, std::span<const Product> products, Epilogue epilogue);

    // Where ops go; the calling thread's device is then this one.
    cudaStream_t stream() const {
        device_.make_current();
        return stream_;
    }

    std::unique_ptr<CudaDevice> kept_;  // destroyed last
    CudaDevice& device_;
    cudaStream_t stream_ = nullptr;
    std::optional<Staging> staging_;
    Buffer workspace_;
    std::optional<Cublas> cublas_;
    std::array<CudaScratch, kScratchUses> scratch_;
    // While work is recorded: which scratch it names.
    bool recording_ = false;
    std::array<bool, kScratchUses> named_{};
};

}  // namespace refrag::REFRAG_CUDA
