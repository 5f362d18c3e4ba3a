// A loaded model directory: tokenizers, encoder, projector, policy, decoder, and how they fit together.
// Immutable after loading: any number of engines on any number of threads share it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/sha256.h"
#include "models/llama.h"
#include "models/policy.h"
#include "models/projector.h"
#include "models/refrag_config.h"
#include "models/roberta.h"
#include "refrag/chunker.h"
#include "text/tokenizer.h"

namespace refrag {

// Told how far loading has come, in bytes of weights; the last call has done = total.
using LoadProgress = std::function<void(uint64_t done_bytes, uint64_t total_bytes)>;

// A model that lies in no directory: what its networks are, and its vocabularies. The caller answers for
// their fitting together as the constructor from a directory checks it.
struct ModelParts {
    RefragConfig config;
    LlamaConfig decoder;
    RobertaConfig encoder;
    Tokenizer tokenizer;                         // the decoder's
    std::optional<Tokenizer> encoder_tokenizer;  // none when the vocabulary is shared
    std::optional<int32_t> bos_id;
};

class Model {
  public:
    // Loads DIR as the model directory's README describes it; everything is checked against everything else.
    // `device` must outlive the model. Status::bad_input for whatever is wrong in the files.
    // With WeightFormat::int8 the matrices of the decoder's and the encoder's layers and the decoder's head
    // are kept in 8 bits (8.5 with their scales); look-up tables and the two heads, which are small, stay as
    // stored.
    Model(Device& device, const std::string& dir, const LoadProgress& progress = {},
          WeightFormat format = WeightFormat::as_stored);
    // The networks' tensors are asked of `weights` in the order decoder, encoder, projector, policy.
    Model(Device& device, ModelParts parts, WeightSource& weights);

    Device& device() const { return device_; }
    const std::string& dir() const { return dir_; }
    const RefragConfig& config() const { return config_; }
    const Tokenizer& tokenizer() const { return tokenizer_; }  // the decoder's
    const Roberta& encoder() const { return *encoder_; }
    const Projector& projector() const { return *projector_; }
    const Policy& policy() const { return *policy_; }
    const Llama& decoder() const { return *decoder_; }

    // The token that comes first, outside every chunk; none where the decoder was trained without one.
    std::optional<int32_t> bos_id() const { return bos_id_; }
    // BOS, or where there is none the first end token: what evaluation puts before a window of text.
    int32_t first_id() const;
    bool is_end(int32_t id) const;
    // The end token that closes an answer in training, and in a prompt's earlier turns: the decoder's first.
    int32_t end_id() const;

    EncoderVocabulary encoder_vocabulary() const;
    int32_t d_enc() const { return encoder_->config().dim; }

    // Names what this model makes of passages cut into chunks of chunk_len: format, encoder weights, all
    // files of tokenizers and encoder config, pooling, normalisation, special tokens. The device is not part
    // of it: a name holds for one device's memory, or for what is rounded alike everywhere.
    Sha256Digest passage_maker(int32_t chunk_len) const;

    uint64_t parameters() const;
    uint64_t weight_bytes() const;  // in the device's memory

  private:
    Device& device_;
    std::string dir_;
    RefragConfig config_;
    Tokenizer tokenizer_;
    std::optional<Tokenizer> encoder_tokenizer_;  // none when the vocabulary is shared
    std::unique_ptr<Llama> decoder_;
    std::unique_ptr<Roberta> encoder_;
    std::unique_ptr<Projector> projector_;
    std::unique_ptr<Policy> policy_;
    std::optional<int32_t> bos_id_;
    Sha256Digest maker_;  // of passages, but for the chunk length
};

}  // namespace refrag
