// A layer of a bidirectional transformer: the encoder's, with each norm after its block, and the policy's,
// with each norm before. The norms stand with the caller.
#pragma once

#include <array>

#include "models/layers.h"
#include "ops/backend.h"

namespace refrag {

struct EncoderLayer {
    Linear q, k, v, o;    // [dim, dim]
    LayerNorm attn_norm;  // [dim]
    Linear fc1;           // [hidden_dim, dim]
    Linear fc2;           // [dim, hidden_dim]
    LayerNorm ffn_norm;   // [dim]
};

struct EncoderActivations {
    static std::array<ActivationColumn<EncoderActivations>, 7> columns(int64_t dim, int64_t hidden_dim) {
        using A = EncoderActivations;
        return {{{&A::x, dim},
                 {&A::q, dim},
                 {&A::k, dim},
                 {&A::v, dim},
                 {&A::attn, dim},
                 {&A::y, dim},
                 {&A::hidden, hidden_dim}}};
    }
    Tensor x;        // the residual stream
    Tensor q, k, v;  // of all heads
    Tensor attn;
    Tensor y;       // a block's output
    Tensor hidden;  // of the feed-forward
};

// n_heads heads of dim / n_heads numbers, as many for keys.
AttentionShape encoder_attention_shape(int32_t dim, int32_t n_heads, const EncoderLayer& layer);

// a.x += o(attention(q(h), k(h), v(h))) within each sequence of the batch. h [rows, dim].
void attend(Backend& backend, const EncoderLayer& layer, const EncoderActivations& a, Tensor h,
            const AttentionShape& shape, const Batch& batch);

// a.x += fc2(gelu(fc1(h))). h [rows, dim].
void feed_forward(Backend& backend, const EncoderLayer& layer, const EncoderActivations& a, Tensor h);

}  // namespace refrag
