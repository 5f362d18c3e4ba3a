// The policy pi_theta: a two-layer transformer over the chunk embeddings that gives each chunk one logit; the
// chunks with the largest logits are expanded to tokens (paper, section 2 and A.1). With `sees_question` the
// pieces of the question follow the chunks, marked by a type vector; they are seen and never selected (our
// addition).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/refrag_config.h"
#include "models/weights.h"

namespace refrag {

class Policy {
  public:
    // Loads DIR/policy.safetensors; shapes as `config` says.
    Policy(Device& device, const std::string& dir, const PolicyConfig& config, int32_t d_enc,
           const LoadedBytes& loaded = {});
    // The same network with weights from elsewhere.
    Policy(const PolicyConfig& config, int32_t d_enc, WeightSource& weights);

    const PolicyConfig& config() const { return config_; }
    uint64_t parameters() const { return parameters_; }
    uint64_t weight_bytes() const { return weight_bytes_; }  // in the device's memory

    // One logit for each row of chunk_emb [n_chunks, d_enc], read back to the host. question_emb [n_pieces,
    // d_enc] is empty when there is no question or the policy does not see it. Chunks are at positions 0 ..
    // L-1, question pieces at L, L+1, ... Both in device memory; on `backend`. Any number of threads may call
    // it, each with a queue and an arena of its own.
    std::vector<float> logits(Backend& backend, Tensor chunk_emb, Tensor question_emb, Arena& arena) const;

  private:
    struct Layer {
        DeviceVector norm1, norm1_bias, norm2, norm2_bias;  // [dim]
        std::unique_ptr<Matrix> q, k, v, o;                 // [dim, dim]
        DeviceVector q_bias, k_bias, v_bias, o_bias;
        std::unique_ptr<Matrix> fc1;  // [hidden_dim, dim]
        std::unique_ptr<Matrix> fc2;  // [dim, hidden_dim]
        DeviceVector fc1_bias, fc2_bias;
    };

    void load(WeightSource& weights, int32_t d_enc);

    PolicyConfig config_;
    std::unique_ptr<Matrix> in_proj_;  // [dim, d_enc]
    DeviceVector in_proj_bias_;
    std::vector<Layer> layers_;
    DeviceVector norm_, norm_bias_;
    std::unique_ptr<Matrix> head_;  // [1, dim]
    DeviceVector head_bias_;
    DeviceVector question_type_;  // [dim]; empty unless sees_question
    uint64_t parameters_ = 0;
    uint64_t weight_bytes_ = 0;
};

}  // namespace refrag
