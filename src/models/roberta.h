// The chunk encoder: RoBERTa (post-norm transformer, learned positions), as Hugging Face's RobertaModel,
// XLMRobertaModel and BertModel compute it. Each chunk is a sequence of its own and sees nothing of the
// others (paper, section 2), so thousands of short chunks are stacked into one ragged call without padding.
// Immutable after loading: any number of threads may call it, each with a queue and an Arena of its own.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/device_batch.h"
#include "models/encoder_layer.h"
#include "models/transformer_config.h"

namespace refrag {

// How a chunk's row outputs become one embedding. `pooler`: the first row through RoBERTa's dense + tanh.
enum class ChunkPooling { cls, mean, pooler };

struct RobertaWeights {
    std::unique_ptr<Matrix> word;      // [vocab_size, dim]
    std::unique_ptr<Matrix> position;  // [max_positions, dim]
    std::unique_ptr<Matrix> type;      // [type_vocab_size, dim]; row 0 is used
    LayerNorm norm;                    // [dim]
    std::vector<EncoderLayer> layers;
    Linear pooler;  // [dim, dim]; empty unless ChunkPooling::pooler
};

class Roberta {
  public:
    // Loads DIR/config.json and DIR/model*.safetensors; the pooler's weights only for ChunkPooling::pooler.
    Roberta(Device& device, const std::string& dir, ChunkPooling pooling, bool normalize,
            const LoadedBytes& loaded = {}, WeightFormat format = WeightFormat::as_stored);
    // The same network with weights from elsewhere.
    Roberta(RobertaConfig config, ChunkPooling pooling, bool normalize, WeightSource& weights);

    const RobertaConfig& config() const { return config_; }
    uint64_t parameters() const { return footprint_.parameters; }
    uint64_t weight_bytes() const { return footprint_.bytes; }  // in the device's memory
    const std::vector<std::string>& unused_tensors() const { return unused_; }
    // Of all weights, as the source gave them (WeightSource::begin_digest).
    const Sha256Digest& weights_digest() const { return weights_digest_; }

    // Chunk embeddings c_i [sequences.size(), dim] into `out` (device memory), on `backend`. A sequence is
    // its token ids, special tokens included, 1 to config().max_seq_len() of them. Runs in groups of about
    // group_rows rows, which bounds memory.
    void encode(Backend& backend, std::span<const std::vector<int32_t>> sequences, Tensor out,
                Arena& arena) const;

    // The last layer's output for every row, [total rows, dim] in `arena`; for tests and tools.
    Tensor hidden_states(Backend& backend, std::span<const std::vector<int32_t>> sequences,
                         Arena& arena) const;

    // Every parameter of an encoder of this shape, in order; `weights` has config.n_layers layers.
    static void describe(RobertaWeights& weights, const RobertaConfig& config, ChunkPooling pooling,
                         ParameterVisitor& visit);
    static WeightCount count(const RobertaConfig& config, ChunkPooling pooling);
    // What a row takes while it passes, in floats; and the most rows that encode() lets pass at once.
    static int64_t activation_floats(const RobertaConfig& config);
    static constexpr int64_t group_rows = 2048;  // fills the matrix kernels, stays near the caches

  private:
    void load(WeightSource& weights);
    Tensor run(Backend& backend, const BatchPlan& plan, const Batch& batch,
               std::span<const std::vector<int32_t>> sequences, Arena& arena) const;

    RobertaConfig config_;
    ChunkPooling pooling_;
    bool normalize_;
    RobertaWeights weights_;
    Footprint footprint_;
    Sha256Digest weights_digest_;
    std::vector<std::string> unused_;
};

}  // namespace refrag
