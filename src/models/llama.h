// The decoder: LLaMA (RMSNorm, RoPE, grouped-query attention, SwiGLU) and its relatives, as Hugging Face's
// LlamaForCausalLM and the others compute them; DecoderConfig says how they differ. Its rows are token
// embeddings or projected chunks: REFRAG adds no parameter here (paper, section 2). Immutable after loading:
// any number of threads may call it, each with a queue, a KvCache and an Arena of its own.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "models/device_batch.h"
#include "models/kv_cache.h"
#include "models/layers.h"
#include "models/transformer_config.h"

namespace refrag {

class Llama;

struct LlamaLayer {
    DeviceVector attention_norm;  // [dim]: NormPlace::before: of what the block reads; after: of its output
    Linear q;                     // [n_heads * head_dim, dim]
    Linear k, v;                  // [n_kv_heads * head_dim, dim]
    DeviceVector q_norm, k_norm;  // QkNorm: [head_dim], or the width of q and of k; else empty
    Linear o;                     // [dim, n_heads * head_dim]
    DeviceVector ffn_norm;        // [dim]
    Linear gate, up;              // [hidden_dim, dim]
    Linear down;                  // [dim, hidden_dim]
};

struct LlamaWeights {
    std::unique_ptr<Matrix> embedding;  // [vocab_size, dim]
    std::vector<LlamaLayer> layers;
    DeviceVector norm;             // [dim]
    std::unique_ptr<Matrix> head;  // [vocab_size, dim]; null when tied to the embedding
};

// What the layers write while rows pass, [rows, ...] F32; h, their result, is apart.
struct LlamaActivations {
    LlamaActivations(Arena& arena, const DecoderConfig& config, int64_t rows);
    static std::array<ActivationColumn<LlamaActivations>, 9> columns(const DecoderConfig& config);
    // Those of the first n rows.
    LlamaActivations first(int64_t n) const;
    Tensor x;        // [rows, dim] the residual stream
    Tensor q;        // [rows, n_heads * head_dim]
    Tensor k;        // [rows, n_kv_heads * head_dim]
    Tensor v;        // [rows, n_kv_heads * head_dim]
    Tensor attn;     // [rows, n_heads * head_dim]
    Tensor y;        // [rows, dim] a block's output
    Tensor gate;     // [rows, hidden_dim]
    Tensor up;       // [rows, hidden_dim]
    Tensor cos_sin;  // [rows, head_dim]
};

// Told of each layer's q [n_rows, n_heads * head_dim] and k [n_rows, n_kv_heads * head_dim] of the rows that
// pass, both rotated: F32 in the backend's memory, valid during the call.
using AttentionTap = std::function<void(int32_t layer, Tensor q, Tensor k)>;

// What decode steps of up to n_sequences sequences work in: memory that stays where it is, so that a backend
// may record a step and do it again, whatever requests come and go. One engine's, and ends before its queue.
class DecodeWorkspace {
  public:
    int64_t n_sequences() const { return h_.rows; }
    size_t device_bytes() const { return memory_.held_bytes(); }
    const Recording::Counts& counts() const { return recording_->counts(); }

  private:
    friend class Llama;
    DecodeWorkspace(const Llama& llama, Backend& backend, int32_t n_sequences);

    const Llama* llama_;
    Arena memory_;  // of all that follows; never given back
    LlamaActivations activations_;
    Tensor h_;       // [n_sequences, dim]
    Tensor logits_;  // [n_sequences, vocab_size]
    BatchArrays batch_;
    int32_t* tokens_;  // [n_sequences]
    KvView kv_;        // that recorded steps name
    std::unique_ptr<Recording> recording_;
};

class Llama {
  public:
    // Loads DIR/config.json and DIR/model*.safetensors.
    Llama(Device& device, const std::string& dir, const LoadedBytes& loaded = {},
          WeightFormat format = WeightFormat::as_stored);
    // The same network with weights from elsewhere. table_only: of them the table of embeddings, no more;
    // then embed() is all that it can do, and whatever else there is among the weights is not looked at.
    Llama(Device& device, DecoderConfig config, WeightSource& weights, bool table_only = false);

    const DecoderConfig& config() const { return config_; }
    uint64_t parameters() const { return footprint_.parameters; }
    uint64_t weight_bytes() const { return footprint_.bytes; }  // in the device's memory
    // Bytes of weights that a decode step reads: every matrix that it multiplies with. Of the embedding it
    // reads one row, unless the head is tied to it.
    uint64_t step_bytes() const { return step_bytes_; }
    const std::vector<std::string>& unused_tensors() const { return unused_; }
    // What in the directory contradicts itself and how it was read; a line each, for the user.
    const std::vector<std::string>& warnings() const { return warnings_; }

    // Runs the network on `backend`, a queue of device(), over the rows of a batch whose sequences all have a
    // KV slot (with room reserved), appends their K and V, and returns the normed hidden states [n_rows, dim]
    // in `arena`. source [n_rows]: a token id, or -1 - i for row i of `chunk_rows` [n, dim] (empty when no
    // source is negative). `tap` may be empty.
    Tensor forward(Backend& backend, const BatchPlan& plan, const std::vector<int32_t>& source,
                   Tensor chunk_rows, KvCache& kv, Arena& arena, const AttentionTap& tap = {}) const;

    // What rows are before the first layer: [source.size(), dim] F32 in `arena`, of token ids and rows of
    // chunk_rows as in forward.
    Tensor embed(Backend& backend, const std::vector<int32_t>& source, Tensor chunk_rows, Arena& arena) const;

    DecodeWorkspace make_decode_workspace(Backend& backend, int32_t n_sequences) const {
        return DecodeWorkspace(*this, backend, n_sequences);
    }
    // The same for a step in which each of up to workspace.n_sequences() sequences brings one row, a token:
    // tokens [n_rows]. Returns their logits [n_rows, vocab_size], in the workspace and valid until the next
    // call. `backend` made the workspace. Steps of the same number of sequences are recorded and replayed
    // where the backend can, anew where `kv` is another or has moved.
    Tensor decode(Backend& backend, DecodeWorkspace& workspace, const BatchPlan& plan,
                  const std::vector<int32_t>& tokens, KvCache& kv) const;

    // Logits [hidden.rows, vocab_size] in `arena`.
    Tensor logits(Backend& backend, Tensor hidden, Arena& arena) const;

    // n_blocks: of its pool (KvCache).
    KvCache make_kv_cache(Backend& backend, int32_t n_slots, int64_t max_entries, int64_t n_blocks = 0) const;
    DType kv_dtype() const;  // of the caches it makes
    Device& device() const { return device_; }

    // Every parameter of a decoder of this shape, in order; `weights` has config.n_layers layers.
    static void describe(LlamaWeights& weights, const DecoderConfig& config, ParameterVisitor& visit);
    static WeightCount count(const DecoderConfig& config);
    // What a row takes while it passes, in floats; its result and its logits are apart.
    static int64_t activation_floats(const DecoderConfig& config);

  private:
    void load(WeightSource& weights);
    void load_table(WeightSource& weights);
    // Enqueues the whole network: h [n_rows, dim] becomes the normed hidden states.
    void run(Backend& backend, const LlamaActivations& a, Tensor h, const int32_t* source, Tensor chunk_rows,
             const KvView& kv, const Batch& batch, const AttentionTap& tap = {}) const;
    // q, k, v of the rows, q and k normed and rotated where the layer does, k and v in the cache.
    void attention_input(Backend& backend, const LlamaActivations& a, int32_t index, Tensor x,
                         const KvView& kv, const Batch& batch) const;
    void head(Backend& backend, Tensor logits, Tensor hidden) const;

    Device& device_;
    DecoderConfig config_;
    LlamaWeights weights_;
    DeviceVector inv_freq_;  // [head_dim / 2]
    Footprint footprint_;
    uint64_t step_bytes_ = 0;
    std::vector<std::string> unused_;
    std::vector<std::string> warnings_;
};

}  // namespace refrag
