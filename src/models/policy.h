// The policy pi_theta: a two-layer transformer over the chunk embeddings that gives each chunk one logit; the
// chunks with the largest logits are expanded to tokens (paper, section 2 and A.1). With `sees_question` the
// pieces of the question follow the chunks, marked by a type vector; they are seen and never selected (our
// addition).
#pragma once

#include <string>
#include <vector>

#include "models/encoder_layer.h"
#include "models/refrag_config.h"

namespace refrag {

struct PolicyWeights {
    Linear in_proj;  // [dim, d_enc]
    std::vector<EncoderLayer> layers;
    LayerNorm norm;              // [dim]
    Linear head;                 // [1, dim]
    DeviceVector question_type;  // [dim]; empty unless sees_question
};

class Policy {
  public:
    // Loads DIR/policy.safetensors; shapes as `config` says.
    Policy(Device& device, const std::string& dir, const PolicyConfig& config, int32_t d_enc,
           const LoadedBytes& loaded = {});
    // The same network with weights from elsewhere.
    Policy(const PolicyConfig& config, int32_t d_enc, WeightSource& weights);

    const PolicyConfig& config() const { return config_; }
    uint64_t parameters() const { return footprint_.parameters; }
    uint64_t weight_bytes() const { return footprint_.bytes; }  // in the device's memory

    // One logit for each row of chunk_emb [n_chunks, d_enc], read back to the host. question_emb [n_pieces,
    // d_enc] is empty when there is no question or the policy does not see it. Chunks are at positions 0 ..
    // L-1, question pieces at L, L+1, ... Both in device memory; on `backend`. Any number of threads may call
    // it, each with a queue and an arena of its own.
    std::vector<float> logits(Backend& backend, Tensor chunk_emb, Tensor question_emb, Arena& arena) const;

    // Every parameter of a policy of this shape, in order; `weights` has config.n_layers layers.
    static void describe(PolicyWeights& weights, const PolicyConfig& config, int32_t d_enc,
                         ParameterVisitor& visit);
    static WeightCount count(const PolicyConfig& config, int32_t d_enc);
    // What a row (a chunk or a piece of the question) takes while it passes, in floats.
    static int64_t activation_floats(const PolicyConfig& config);

  private:
    void load(WeightSource& weights, int32_t d_enc);

    PolicyConfig config_;
    PolicyWeights weights_;
    Footprint footprint_;
};

}  // namespace refrag
