// A device that hands everything on to another one, and whose queues fail on demand: at the n-th op of a
// network's pass that reads a certain token, or of every pass. A pass goes from `embed` to the next download
// (what reads the logits) or the next `embed`. It also counts the rows that passes take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "ops/backend.h"
#include "tap_backend.h"

namespace refrag_test {

class FaultyDevice : public refrag::Device {
  public:
    explicit FaultyDevice(refrag::Device& inner) : inner_(inner) {}

    static constexpr const char* message = "the device failed";
    int32_t poison = -1;       // token; a pass that reads it fails
    bool all_fail = false;     // every pass does
    int64_t fail_at = -1;      // at which of its ops, counted from 0; -1: at none
    int64_t n_failed = 0;      // passes that did
    int64_t longest_pass = 0;  // ops of one that was to fail
    int64_t rows = 0;          // that passes took

    void* allocate(size_t bytes) override { return inner_.allocate(bytes); }
    void release(void* data) noexcept override { inner_.release(data); }
    std::string description() const override { return inner_.description(); }
    uint64_t available_bytes() const override { return inner_.available_bytes(); }
    refrag::DType kv_dtype(refrag::DType weights, int32_t head_dim) const override {
        return inner_.kv_dtype(weights, head_dim);
    }
    void upload(void* dst, const void* src, size_t bytes) override { inner_.upload(dst, src, bytes); }
    std::unique_ptr<refrag::Matrix> make_matrix(refrag::DType dtype, int64_t out_dim, int64_t in_dim,
                                                const refrag::RowReader& read) override {
        return inner_.make_matrix(dtype, out_dim, in_dim, read);
    }
    std::unique_ptr<refrag::Backend> make_backend() override;

  private:
    refrag::Device& inner_;
};

class FaultyBackend : public TapBackend {
  public:
    FaultyBackend(std::unique_ptr<refrag::Backend> inner, FaultyDevice& device)
        : TapBackend(*inner), owned_(std::move(inner)), device_(device) {}

    refrag::Device& device() const override { return device_; }
    void embed(Tensor out, const Matrix& table, const int32_t* source, Tensor slots) override {
        device_.rows += out.rows;
        guilty_ = device_.all_fail || (device_.poison >= 0 && std::find(source, source + out.rows,
                                                                        device_.poison) != source + out.rows);
        n_ops_ = 0;
        op();
        inner_.embed(out, table, source, slots);
    }
    void download(void* dst, const void* src, size_t bytes) override {
        op();
        guilty_ = false;
        inner_.download(dst, src, bytes);
    }
    void gather_rows(Tensor out, Tensor x, const int32_t* index) override {
        op();
        inner_.gather_rows(out, x, index);
    }
    void linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) override {
        op();
        inner_.linear(out, x, w, bias);
    }
    void linear_add(Tensor residual_stream, Tensor x, const refrag::Product& y) override {
        refrag::Backend::linear_add(residual_stream, x, y);
    }
    void rms_norm(Tensor out, Tensor x, Tensor weight, float eps) override {
        op();
        inner_.rms_norm(out, x, weight, eps);
    }
    void layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) override {
        op();
        inner_.layer_norm(out, x, weight, bias, eps);
    }
    void kv_append(const refrag::KvView& kv, int32_t layer, Tensor k, Tensor v,
                   const refrag::Batch& batch) override {
        op();
        inner_.kv_append(kv, layer, k, v, batch);
    }
    void attention(Tensor out, Tensor q, Tensor k, Tensor v, const refrag::AttentionShape& shape,
                   const refrag::KvView* kv, int32_t layer, const refrag::Batch& batch) override {
        op();
        inner_.attention(out, q, k, v, shape, kv, layer, batch);
    }

  private:
    void op() {
        if (!guilty_) return;
        device_.longest_pass = std::max(device_.longest_pass, n_ops_ + 1);
        if (n_ops_++ != device_.fail_at) return;
        ++device_.n_failed;
        refrag::fail(refrag::Status::runtime, FaultyDevice::message);
    }

    std::unique_ptr<refrag::Backend> owned_;
    FaultyDevice& device_;
    bool guilty_ = false;  // the pass under way
    int64_t n_ops_ = 0;    // of it
};

inline std::unique_ptr<refrag::Backend> FaultyDevice::make_backend() {
    return std::make_unique<FaultyBackend>(inner_.make_backend(), *this);
}

}  // namespace refrag_test
