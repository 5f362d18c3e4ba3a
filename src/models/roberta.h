// The chunk encoder: RoBERTa (post-norm transformer, learned positions), as Hugging Face's RobertaModel
// computes it. Each chunk is a sequence of its own and sees nothing of the others (paper, section 2), so
// thousands of short chunks are stacked into one ragged call without padding. Immutable after loading: any
// number of threads may call it, each with a queue and an Arena of its own.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/device_batch.h"
#include "models/transformer_config.h"
#include "models/weights.h"

namespace refrag {

// How a chunk's row outputs become one embedding. `pooler`: the first row through RoBERTa's dense + tanh.
enum class ChunkPooling { cls, mean, pooler };

class Roberta {
  public:
    // Loads DIR/config.json and DIR/model*.safetensors; the pooler's weights only for ChunkPooling::pooler.
    Roberta(Device& device, const std::string& dir, ChunkPooling pooling, bool normalize,
            const LoadedBytes& loaded = {}, WeightFormat format = WeightFormat::as_stored);
    // The same network with weights from elsewhere.
    Roberta(RobertaConfig config, ChunkPooling pooling, bool normalize, WeightSource& weights);

    const RobertaConfig& config() const { return config_; }
    uint64_t parameters() const { return parameters_; }
    uint64_t weight_bytes() const { return weight_bytes_; }  // in the device's memory
    const std::vector<std::string>& unused_tensors() const { return unused_; }
    // Of all weights, as the source gave them (WeightSource::begin_digest).
    const Sha256Digest& weights_digest() const { return weights_digest_; }

    // Chunk embeddings c_i [sequences.size(), dim] into `out` (device memory), on `backend`. A sequence is
    // its token ids, special tokens included, 1 to config().max_seq_len() of them. Runs in groups of about
    // 2048 rows, which bounds memory.
    void encode(Backend& backend, std::span<const std::vector<int32_t>> sequences, Tensor out,
                Arena& arena) const;

    // The last layer's output for every row, [total rows, dim] in `arena`; for tests and tools.
    Tensor hidden_states(Backend& backend, std::span<const std::vector<int32_t>> sequences,
                         Arena& arena) const;

  private:
    struct Layer {
        std::unique_ptr<Matrix> q, k, v, o;  // [dim, dim]
        DeviceVector q_bias, k_bias, v_bias, o_bias;
        DeviceVector attn_norm, attn_norm_bias;  // [dim]
        std::unique_ptr<Matrix> fc1;             // [hidden_dim, dim]
        std::unique_ptr<Matrix> fc2;             // [dim, hidden_dim]
        DeviceVector fc1_bias, fc2_bias;
        DeviceVector ffn_norm, ffn_norm_bias;  // [dim]
    };
    void load(WeightSource& weights);
    Layer load_layer(WeightSource& weights, int32_t index) const;
    Tensor run(Backend& backend, const BatchPlan& plan, const Batch& batch,
               std::span<const std::vector<int32_t>> sequences, Arena& arena) const;

    RobertaConfig config_;
    ChunkPooling pooling_;
    bool normalize_;
    std::unique_ptr<Matrix> word_;      // [vocab_size, dim]
    std::unique_ptr<Matrix> position_;  // [max_positions, dim]
    std::unique_ptr<Matrix> type_;      // [type_vocab_size, dim]; row 0 is used
    DeviceVector norm_, norm_bias_;
    std::vector<Layer> layers_;
    std::unique_ptr<Matrix> pooler_;  // [dim, dim]
    DeviceVector pooler_bias_;
    uint64_t parameters_ = 0;
    uint64_t weight_bytes_ = 0;
    Sha256Digest weights_digest_;
    std::vector<std::string> unused_;
};

}  // namespace refrag
