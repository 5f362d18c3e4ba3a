// The CPU backend's class. Each op family's file defines its methods: it cuts the work into tasks and calls
// the kernels of the chosen instruction set.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/function_ref.h"
#include "base/threads.h"
#include "cpu/attention.h"
#include "cpu/cpu_backend.h"
#include "cpu/kernels.h"

namespace refrag {

// fp32 scratch that one thread of the pool owns during a task; grows, never shrinks.
class Scratch {
  public:
    explicit Scratch(MemorySource& source) : source_(source) {}
    float* get(int64_t n_floats) {
        const size_t bytes = static_cast<size_t>(n_floats) * sizeof(float);
        if (buffer_.bytes() < bytes) buffer_ = Buffer(source_, bytes);
        return static_cast<float*>(buffer_.data());
    }

  private:
    MemorySource& source_;
    Buffer buffer_;
};

class CpuMatrix : public Matrix {
  public:
    // Panels are as long as in_dim up to a multiple of `k_multiple` (even), zeros beyond it.
    CpuMatrix(MemorySource& source, DType dtype, int64_t out_dim, int64_t in_dim, int64_t k_multiple = 2);
    size_t device_bytes() const override { return buffer_.bytes(); }

    int64_t n_panels() const { return n_panels_; }
    // Elements from one panel to the next.
    int64_t panel_stride() const { return panel_stride_; }
    // The panel's element (k, 0), k even.
    std::byte* panel(int64_t index, int64_t k = 0) const;
    // Writes row n of the file's matrix, in_dim elements, into its panel; or reads it, widened.
    void pack_row(int64_t n, const void* row);
    void add_row_to(float* out, int64_t n) const;   // out += row n
    void copy_row_to(float* out, int64_t n) const;  // out = row n

  private:
    int64_t n_panels_;
    int64_t panel_stride_;
    Buffer buffer_;
};

class CpuBackend : public Backend {
  public:
    CpuBackend(int n_threads, CpuIsa isa);

    void* allocate(size_t bytes) override;
    void release(void* data) noexcept override;
    std::string description() const override;

    void upload(void* dst, const void* src, size_t bytes) override;
    void download(void* dst, const void* src, size_t bytes) override;
    void copy(Tensor out, Tensor x) override;

    // gemm.cpp
    std::unique_ptr<Matrix> make_matrix(DType dtype, int64_t out_dim, int64_t in_dim,
                                        const RowReader& read) override;
    void linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) override;
    void linear_gelu(Tensor out, Tensor x, const Matrix& w, Tensor bias) override;
    // gemm_bf16.cpp
    void linears(Tensor x, std::span<const Product> products) override;
    void linear_silu_mul(Tensor x, const Product& gate, const Product& up) override;

    // embedding.cpp
    void embed(Tensor out, const Matrix& table, const int32_t* source, Tensor slots) override;
    void add_embed(Tensor x, const Matrix& table, const int32_t* ids) override;
    void gather_rows(Tensor out, Tensor x, const int32_t* index) override;

    // elementwise.cpp
    void add(Tensor x, Tensor y) override;
    void gelu(Tensor x) override;
    void tanh(Tensor x) override;
    void silu_mul(Tensor gate, Tensor up) override;

    // norm.cpp
    void rms_norm(Tensor out, Tensor x, Tensor weight, float eps) override;
    void layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) override;
    void add_rms_norm(Tensor out, Tensor x, Tensor y, Tensor weight, float eps) override;
    void add_layer_norm(Tensor out, Tensor x, Tensor y, Tensor weight, Tensor bias, float eps) override;
    void l2_normalize(Tensor x) override;

    // rope.cpp
    void rope_table(Tensor cos_sin, const float* position, Tensor inv_freq) override;
    void rope(Tensor x, Tensor cos_sin) override;
    DType kv_dtype(DType weights, int32_t head_dim) const override;
    void kv_append(const KvView& kv, int32_t layer, Tensor k, Tensor v, const Batch& batch) override;

    // attention.cpp
    void attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape, const KvView* kv,
                   int32_t layer, const Batch& batch) override;

    // reduce.cpp
    void pool(Tensor out, Tensor x, const Batch& batch, Pooling pooling) override;
    void nll(Tensor out, Tensor logits, const int32_t* target) override;

  private:
    // Calls body(begin, end) over [0, n) cut into pieces, in parallel where n items of `cost` (about one unit
    // for each element touched) are worth it. Pieces begin at multiples of `grain`.
    void parallel(int64_t n, double cost, FunctionRef<void(int64_t, int64_t)> body, int64_t grain = 1);
    void linear_act(Tensor out, Tensor x, const Matrix& w, Tensor bias, bool gelu);

    // What is done with a block of a product's results while it is in the cache.
    enum class Then { nothing, gelu, silu_mul };
    // True if W is multiplied by gemm_bf16.
    bool uses_bf16(const Matrix& w) const {
        return kernels_.gemm_bf16 != nullptr && w.dtype() == DType::bf16;
    }
    void products_bf16(Tensor x, std::span<const Product> products, Then then);
    void pack_left(Tensor x);

    void plan_attention(const AttentionCall& call);

    CpuIsa isa_;
    const CpuKernels& kernels_;
    ThreadPool threads_;
    std::mutex scratch_mutex_;      // held by ops that use scratch_
    std::vector<Scratch> scratch_;  // one for each thread of the pool
    Scratch left_;                  // x in bf16 tiles, for products_bf16
    AttentionPlan plan_;            // with scratch_; kept for its memory
    Scratch partial_;               // sums of split rows, for attention
};

}  // namespace refrag
