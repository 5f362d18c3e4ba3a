// The CPU's device and queue. Each op family's file defines its methods: it cuts the work into tasks and
// calls the kernels of the chosen instruction set.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/function_ref.h"
#include "base/threads.h"
#include "cpu/attention.h"
#include "cpu/cpu_backend.h"
#include "cpu/kernels.h"

namespace refrag {

// The k and the panels of one task of a packed product.
inline constexpr int64_t kTaskK = 1024;
inline constexpr int64_t kMaxTaskPanels = 16;

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

// A weight matrix in panels of 16 output columns, whatever its dtype.
class PackedMatrix : public Matrix {
  public:
    PackedMatrix(DType dtype, int64_t out_dim, int64_t in_dim)
        : Matrix(dtype, out_dim, in_dim), n_panels_((out_dim + kPanel - 1) / kPanel) {}
    int64_t n_panels() const { return n_panels_; }
    // Writes row n of the file's matrix, as RowReader gives it, into its panel; or reads it, widened.
    virtual void pack_row(int64_t n, const void* row) = 0;
    virtual void add_row_to(float* out, int64_t n) const = 0;   // out += row n
    virtual void copy_row_to(float* out, int64_t n) const = 0;  // out = row n

  private:
    int64_t n_panels_;
};

// F32, F16 and BF16 weights.
class CpuMatrix : public PackedMatrix {
  public:
    // Panels are as long as in_dim up to a multiple of `k_multiple` (even), zeros beyond it.
    CpuMatrix(MemorySource& source, DType dtype, int64_t out_dim, int64_t in_dim, int64_t k_multiple = 2);
    size_t device_bytes() const override { return buffer_.bytes(); }

    // Elements from one panel to the next.
    int64_t panel_stride() const { return panel_stride_; }
    // The panel's element (k, 0), k even.
    std::byte* panel(int64_t index, int64_t k = 0) const;
    void pack_row(int64_t n, const void* row) override;
    void add_row_to(float* out, int64_t n) const override;
    void copy_row_to(float* out, int64_t n) const override;

  private:
    int64_t panel_stride_;
    Buffer buffer_;
};

// I8 weights, see gemm_int8.cpp.
class Int8Matrix : public PackedMatrix {
  public:
    Int8Matrix(MemorySource& source, int64_t out_dim, int64_t in_dim);
    size_t device_bytes() const override { return buffer_.bytes(); }

    int64_t n_groups() const { return int8_groups(in_dim()); }
    // The panel's block that begins at k, a multiple of 32; the blocks of later k follow it.
    Int8Block* panel(int64_t index, int64_t k = 0) const {
        return static_cast<Int8Block*>(buffer_.data()) + index * n_groups() + k / kInt8Group;
    }
    void pack_row(int64_t n, const void* row) override;
    void add_row_to(float* out, int64_t n) const override;
    void copy_row_to(float* out, int64_t n) const override;

  private:
    Buffer buffer_;
};

// The device: the threads, which queues take turns with, and what decides how weights are packed.
class CpuDevice : public Device {
  public:
    CpuDevice(int n_threads, CpuIsa isa, CpuInt8 int8);

    void* allocate(size_t bytes) override;
    void release(void* data) noexcept override;
    std::string description() const override;
    void upload(void* dst, const void* src, size_t bytes) override;
    std::unique_ptr<Backend> make_backend() override;
    // gemm.cpp
    std::unique_ptr<Matrix> make_matrix(DType dtype, int64_t out_dim, int64_t in_dim,
                                        const RowReader& read) override;
    // attention.cpp
    DType kv_dtype(DType weights, int32_t head_dim) const override;

    // The dtype of weights whose products round activations as those of `weights` do: attention rounds
    // likewise.
    DType rounding_of(DType weights) const {
        return weights == DType::i8 && int8_ != CpuInt8::widen ? DType::bf16 : weights;
    }
    CpuInt8 int8() const { return int8_; }
    const CpuKernels& kernels() const { return kernels_; }
    ThreadPool& threads() { return threads_; }

  private:
    CpuIsa isa_;
    CpuInt8 int8_;
    const CpuKernels& kernels_;
    ThreadPool threads_;
};

// A queue: ops run at once, on the device's threads. All scratch is the queue's own, that of the threads
// too: between an op's measuring it and the op's end another queue may have its turn.
class CpuBackend : public Backend {
  public:
    // kept: the device, where the queue owns it; else null.
    explicit CpuBackend(CpuDevice& device, std::unique_ptr<CpuDevice> kept = nullptr);

    Device& device() const override { return device_; }
    void* allocate(size_t bytes) override { return device_.allocate(bytes); }
    void release(void* data) noexcept override { device_.release(data); }

    void upload(void* dst, const void* src, size_t bytes) override;
    void download(void* dst, const void* src, size_t bytes) override;
    void copy(Tensor out, Tensor x) override;
    void wait() override {}

    // gemm.cpp
    void linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) override;
    void linear_gelu(Tensor out, Tensor x, const Matrix& w, Tensor bias) override;
    // gemm_bf16.cpp
    void linears(Tensor x, std::span<const Product> products) override;
    void linear_silu_mul(Tensor x, const Product& gate, const Product& up) override;
    void linear_add(Tensor residual, Tensor x, const Product& y) override;
    void linears_rope_kv_append(const KvView& kv, int32_t layer, Tensor x, std::span<const Product, 3> qkv,
                                Tensor cos_sin, const Batch& batch) override;

    // embedding.cpp
    void embed(Tensor out, const Matrix& table, const int32_t* source, Tensor vectors) override;
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
    void l2_normalize(Tensor x) override;

    // rope.cpp
    void rope_table(Tensor cos_sin, const float* position, Tensor inv_freq) override;
    void rope(Tensor x, Tensor cos_sin) override;
    void rope_kv_append(const KvView& kv, int32_t layer, Tensor q, Tensor k, Tensor v, Tensor cos_sin,
                        const Batch& batch) override;
    void kv_append(const KvView& kv, int32_t layer, Tensor k, Tensor v, const Batch& batch) override;

    // attention.cpp
    void attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape, const KvView* kv,
                   int32_t layer, const Batch& batch) override;

    // reduce.cpp
    void pool(Tensor out, Tensor x, const Batch& batch, Pooling pooling) override;
    void nll(Tensor out, Tensor logits, const int32_t* target) override;
    void top_logits(Tensor values, int32_t* ids, Tensor logits) override;

  private:
    // Calls body(begin, end) over [0, n) cut into pieces, in parallel where n items of `cost` (about one unit
    // for each element touched) are worth it. Pieces begin at multiples of `grain`.
    void parallel(int64_t n, double cost, FunctionRef<void(int64_t, int64_t)> body, int64_t grain = 1);
    void rotate(std::span<const Tensor> tensors, Tensor cos_sin);

    // gemm.cpp: products whose x stays as it is.
    struct LinearPlan;
    LinearPlan plan_linear(Tensor out, Tensor x, const Matrix& w, Tensor bias, Epilogue epilogue) const;
    void widen_panels(const LinearPlan& plan, int64_t panel, int64_t n_panels, int64_t k_begin, int64_t k,
                      float* wide) const;
    void run_linear(const LinearPlan& plan, int64_t task, int thread);
    void linear_as_is(Tensor out, Tensor x, const Matrix& w, Tensor bias, Epilogue epilogue);

    // gemm_bf16.cpp: products whose x is packed first.
    // What x is made into before it meets W: bf16 tiles, groups of bytes, or nothing (linear_as_is).
    enum class Left { as_is, bf16, int8 };
    Left left_for(const Matrix& w) const;
    // The part of a product that one task computes.
    struct Part {
        int64_t row, n_rows, column, n_cols;
    };
    struct PackedPlan;
    // other: the residual (add) or cos_sin (rope).
    PackedPlan plan_packed(Tensor x, Left left, std::span<const Product> products, Epilogue epilogue,
                           Tensor other) const;
    void pack_left(const PackedPlan& plan);
    void run_packed(const PackedPlan& plan, int64_t task, int thread);
    void sum_packed(const PackedPlan& plan, const Product& product, const Part& part, int thread);
    void end_packed(const PackedPlan& plan, const Product& product, const Part& part);
    void products_packed(Tensor x, Left left, std::span<const Product> products, Epilogue epilogue,
                         Tensor other = {});
    void pack_bf16(Tensor x);
    void multiply_bf16(const Product& product, const Part& part, Epilogue epilogue, const Product* up,
                       Tensor residual);
    // gemm_int8.cpp
    void pack_int8(Tensor x);
    void multiply_int8(const Product& product, const Part& part);
    void multiply_int8_bf16(const Product& product, const Part& part, int thread);

    void plan_attention(const AttentionCall& call);

    std::unique_ptr<CpuDevice> kept_;  // destroyed last
    CpuDevice& device_;
    const CpuKernels& kernels_;
    ThreadPool& threads_;
    std::vector<Scratch> scratch_;  // one for each thread of the pool
    Scratch left_;                  // x as products_packed has it made
    AttentionPlan plan_;            // kept for its memory
    Scratch partial_;               // sums of split rows, for attention
};

}  // namespace refrag
