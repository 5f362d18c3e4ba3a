// See encoder_layer.h.
#include "models/encoder_layer.h"

#include <cmath>

namespace refrag {

AttentionShape encoder_attention_shape(int32_t dim, int32_t n_heads, const EncoderLayer& layer) {
    const int32_t head_dim = dim / n_heads;
    return {n_heads, n_heads, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim)),
            layer.k.weight->dtype()};
}

void attend(Backend& backend, const EncoderLayer& layer, const EncoderActivations& a, Tensor h,
            const AttentionShape& shape, const Batch& batch) {
    backend.linears(h, std::array{layer.q.into(a.q), layer.k.into(a.k), layer.v.into(a.v)});
    backend.attention(a.attn, a.q, a.k, a.v, shape, nullptr, 0, batch);
    backend.linear_add(a.x, a.attn, layer.o.into(a.y));
}

void feed_forward(Backend& backend, const EncoderLayer& layer, const EncoderActivations& a, Tensor h) {
    backend.linear_gelu(a.hidden, h, *layer.fc1.weight, layer.fc1.bias.view());
    backend.linear_add(a.x, a.hidden, layer.fc2.into(a.y));
}

}  // namespace refrag
