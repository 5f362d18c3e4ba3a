// See projector.h.
#include "models/projector.h"

#include "io/file.h"

namespace refrag {

Projector::Projector(Device& device, const std::string& dir, int32_t d_enc, int32_t d_dec,
                     const LoadedBytes& loaded)
    : d_dec_(d_dec) {
    WeightLoader weights(device, path_join(dir, "projector.safetensors"), "", loaded);
    load(weights, d_enc);
}

Projector::Projector(int32_t d_enc, int32_t d_dec, WeightSource& weights) : d_dec_(d_dec) {
    load(weights, d_enc);
}

void Projector::load(WeightSource& weights, int32_t d_enc) {
    const uint64_t given_before = weights.parameters(), held_before = weights.held_bytes();
    fc1_ = weights.matrix("fc1.weight", d_dec_, d_enc);
    fc1_bias_ = weights.vector("fc1.bias", d_dec_);
    fc2_ = weights.matrix("fc2.weight", d_dec_, d_dec_);
    fc2_bias_ = weights.vector("fc2.bias", d_dec_);
    weights.finish({});
    parameters_ = weights.parameters() - given_before;
    weight_bytes_ = weights.held_bytes() - held_before;
}

void Projector::forward(Backend& backend, Tensor out, Tensor chunk_emb, Arena& arena) const {
    const ArenaScope scratch(arena);
    const Tensor hidden = arena.tensor(chunk_emb.rows, d_dec_);
    backend.linear_gelu(hidden, chunk_emb, *fc1_, fc1_bias_.view());
    backend.linear(out, hidden, *fc2_, fc2_bias_.view());
}

}  // namespace refrag
