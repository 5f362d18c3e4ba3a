// A backend that hands every op on to another one and keeps the rows at a network's named checkpoints: what
// `embed` and `layer_norm` gave, and the residual stream after each fused step. It overrides no fused op but
// to tap it, so a network that runs over it runs the ops' unfused definitions of ops/backend.h.
#pragma once

#include <vector>

#include "golden.h"
#include "ops/backend.h"

namespace refrag_test {

class TapBackend : public refrag::Backend {
  public:
    using Tensor = refrag::Tensor;
    using Matrix = refrag::Matrix;

    explicit TapBackend(refrag::Backend& inner) : inner_(inner) {}

    std::vector<std::vector<float>> embedded;  // out of embed
    std::vector<std::vector<float>> normed;    // out of layer_norm
    std::vector<std::vector<float>> residual;  // after each addition of whole rows

    void* allocate(size_t bytes) override { return inner_.allocate(bytes); }
    void release(void* data) noexcept override { inner_.release(data); }
    refrag::Device& device() const override { return inner_.device(); }
    void upload(void* dst, const void* src, size_t bytes) override { inner_.upload(dst, src, bytes); }
    void download(void* dst, const void* src, size_t bytes) override { inner_.download(dst, src, bytes); }
    void copy(Tensor out, Tensor x) override { inner_.copy(out, x); }
    void wait() override { inner_.wait(); }

    void embed(Tensor out, const Matrix& table, const int32_t* source, Tensor vectors) override {
        inner_.embed(out, table, source, vectors);
        embedded.push_back(refrag_test::download(inner_, out));
    }
    void add_embed(Tensor x, const Matrix& table, const int32_t* ids) override {
        inner_.add_embed(x, table, ids);
    }
    void gather_rows(Tensor out, Tensor x, const int32_t* index) override {
        inner_.gather_rows(out, x, index);
    }
    void linear(Tensor out, Tensor x, const Matrix& w, Tensor bias) override {
        inner_.linear(out, x, w, bias);
    }
    void linear_add(Tensor residual_stream, Tensor x, const refrag::Product& y) override {
        Backend::linear_add(residual_stream, x, y);
    }
    void add(Tensor x, Tensor y) override {
        inner_.add(x, y);
        if (y.rows == x.rows) residual.push_back(refrag_test::download(inner_, x));
    }
    void gelu(Tensor x) override { inner_.gelu(x); }
    void tanh(Tensor x) override { inner_.tanh(x); }
    void silu_mul(Tensor gate, Tensor up) override { inner_.silu_mul(gate, up); }
    void rms_norm(Tensor out, Tensor x, Tensor weight, float eps) override {
        inner_.rms_norm(out, x, weight, eps);
    }
    void layer_norm(Tensor out, Tensor x, Tensor weight, Tensor bias, float eps) override {
        inner_.layer_norm(out, x, weight, bias, eps);
        normed.push_back(refrag_test::download(inner_, out));
    }
    void l2_normalize(Tensor x) override { inner_.l2_normalize(x); }
    void rope_table(Tensor cos_sin, const float* position, Tensor inv_freq) override {
        inner_.rope_table(cos_sin, position, inv_freq);
    }
    void rope(Tensor x, Tensor cos_sin) override { inner_.rope(x, cos_sin); }
    void kv_append(const refrag::KvView& kv, int32_t layer, Tensor k, Tensor v,
                   const refrag::Batch& batch) override {
        inner_.kv_append(kv, layer, k, v, batch);
    }
    void attention(Tensor out, Tensor q, Tensor k, Tensor v, const refrag::AttentionShape& shape,
                   const refrag::KvView* kv, int32_t layer, const refrag::Batch& batch) override {
        inner_.attention(out, q, k, v, shape, kv, layer, batch);
    }
    void pool(Tensor out, Tensor x, const refrag::Batch& batch, refrag::Pooling pooling) override {
        inner_.pool(out, x, batch, pooling);
    }
    void nll(Tensor out, Tensor logits, const int32_t* target) override { inner_.nll(out, logits, target); }
    void top_logits(Tensor values, int32_t* ids, Tensor logits) override {
        inner_.top_logits(values, ids, logits);
    }

  protected:
    refrag::Backend& inner_;
};

}  // namespace refrag_test
