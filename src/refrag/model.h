// A loaded model directory: tokenizers, encoder, projector, policy, decoder, and how they fit together; or a
// plain decoder, a Hugging Face directory or a GGUF file without encoder and heads, which chooses chunks and
// leaves out the others. Immutable after loading: any number of engines on any number of threads share it.
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
#include "refrag/embedding_form.h"
#include "refrag/select.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace refrag {

class DecoderFiles;
class RemoteDecoder;

// Told how far loading has come, in bytes of weights; the last call has done = total.
using LoadProgress = std::function<void(uint64_t done_bytes, uint64_t total_bytes)>;

// A model that lies in no directory: what its networks are, and its vocabularies. The caller answers for
// their fitting together as the constructor from a directory checks it.
struct ModelParts {
    RefragConfig config;
    DecoderConfig decoder;
    RobertaConfig encoder;
    Tokenizer tokenizer;                         // the decoder's
    std::optional<Tokenizer> encoder_tokenizer;  // none when the vocabulary is shared
    std::optional<int32_t> bos_id;
};

// How prompts are put into words. Without a format: a plain decoder's is recognised from its files; a model
// directory's own template (refrag.json) stands.
struct ChatOptions {
    std::optional<ChatFormat> format;
    std::optional<std::string> system;  // none: what the format says by itself; empty: no system message
};

// An adapter that was merged into the decoder: LoRA, W + (alpha / rank) B A.
struct AdapterInfo {
    std::string dir;
    int64_t rank = 0;
    double alpha = 0;
    size_t n_matrices = 0;
};

// Where a model's chat format comes from.
enum class ChatSource {
    model_directory,  // refrag.json has a template
    given,            // by the caller
    recognized,       // from the decoder's files
    none,             // the decoder's files have none: plain
    unknown,          // they have one of no format we know: plain
};

class Model {
  public:
    // Loads DIR as the model directory's README describes it; everything is checked against everything else.
    // `device` must outlive the model. Status::bad_input for whatever is wrong in the files.
    // Without refrag.json DIR is a plain decoder: config.json, safetensors, tokenizer.json; or model.gguf; or
    // DIR is a GGUF file itself. A refrag.json without encoder gives a plain decoder its template and
    // defaults. With WeightFormat::int8 the matrices of the decoder's and the encoder's layers and the
    // decoder's head are kept in 8 bits (8.5 with their scales); look-up tables and the two heads, which are
    // small, stay as stored. `adapters` are directories of PEFT adapters, merged into the decoder in this
    // order, after one that lies beside its weights.
    // With `remote` the decoder runs there: of its weights here only the table of embeddings is loaded, and
    // no adapter, which is the other side's to merge. Status::usage where `adapters` names one.
    Model(Device& device, const std::string& dir, const LoadProgress& progress = {},
          WeightFormat format = WeightFormat::as_stored, const ChatOptions& chat = {},
          const std::vector<std::string>& adapters = {},
          std::shared_ptr<const RemoteDecoder> remote = nullptr);
    // The networks' tensors are asked of `weights` in the order decoder, encoder, projector, policy.
    Model(Device& device, ModelParts parts, WeightSource& weights);

    Device& device() const { return device_; }
    const std::string& dir() const { return dir_; }
    const RefragConfig& config() const { return config_; }
    const Tokenizer& tokenizer() const { return tokenizer_; }  // the decoder's
    // False for a plain decoder, which has no encoder, projector and policy: asking for one is Status::usage,
    // with the options that work without it.
    bool has_encoder() const { return encoder_ != nullptr; }
    void require_encoder() const;
    const Roberta& encoder() const { return part(encoder_); }
    const Projector& projector() const { return part(projector_); }
    const Policy& policy() const { return part(policy_); }
    const Llama& decoder() const { return *decoder_; }
    // Null: the decoder runs here.
    const RemoteDecoder* remote_decoder() const { return remote_.get(); }
    // Positions that a prompt and its answer can take: the decoder's max_position_embeddings, or less where
    // it runs elsewhere with less.
    int64_t window() const;

    const std::vector<AdapterInfo>& adapters() const { return adapters_; }  // in the decoder's weights
    // Of a GGUF file, how many tensors of each type: "210 Q4_1, 61 F32"; else "".
    const std::string& gguf_types() const { return gguf_types_; }

    // The token that comes first, outside every chunk; none where the decoder was trained without one.
    std::optional<int32_t> bos_id() const { return bos_id_; }
    // BOS, or where there is none the first end token: what evaluation puts before a window of text.
    int32_t first_id() const;
    bool is_end(int32_t id) const;
    // All tokens that end an answer: the decoder's, and the one that ends a turn of the chat format.
    const std::vector<int32_t>& end_ids() const { return end_ids_; }
    // The end token that closes an answer in training, and in a prompt's earlier turns: the decoder's first.
    int32_t end_id() const;

    // plain: prompts follow config().prompt; else chat_segments() makes them.
    ChatFormat chat_format() const { return chat_.format; }
    ChatSource chat_source() const { return chat_source_; }
    const std::string& system_message() const { return chat_.system; }  // empty: none

    // What is done where a request does not say.
    SelectPolicy default_policy() const { return has_encoder() ? SelectPolicy::model : SelectPolicy::bm25; }
    Unexpanded default_unexpanded() const { return has_encoder() ? Unexpanded::compress : Unexpanded::drop; }

    // Of a plain decoder: chunks without encoder ids of their own.
    EncoderVocabulary encoder_vocabulary() const;
    int32_t d_enc() const { return encoder().config().dim; }

    // Names what this model makes of passages cut into chunks of chunk_len: format, encoder weights, all
    // files of tokenizers and encoder config, pooling, normalisation, special tokens, and the form that
    // embeddings are rounded to. The device is not part of it: whichever device encoded a passage, the kept
    // one is taken.
    Sha256Digest passage_maker(int32_t chunk_len, EmbeddingForm form = EmbeddingForm::f32) const;

    uint64_t parameters() const;
    uint64_t weight_bytes() const;  // in the device's memory

  private:
    template <typename Network>
    const Network& part(const std::unique_ptr<Network>& network) const {
        if (!network) require_encoder();
        return *network;
    }
    Model(Device& device, const std::string& dir, const DecoderFiles& files, const LoadProgress& progress,
          WeightFormat format, const ChatOptions& chat, const std::vector<std::string>& adapters,
          std::shared_ptr<const RemoteDecoder> remote);
    void load_encoder(const DecoderFiles& files, const LoadedBytes& loaded, WeightFormat format);
    // Which ids stand around what the encoder reads: its configuration's, or a BERT's [CLS] and [SEP].
    void read_encoder_specials(const std::string& encoder_dir);
    void choose_chat(const DecoderFiles& files, const ChatOptions& chat);

    Device& device_;
    std::string dir_;
    RefragConfig config_;
    Tokenizer tokenizer_;
    std::optional<Tokenizer> encoder_tokenizer_;  // none when the vocabulary is shared
    int32_t encoder_bos_ = 0;                     // that stand around what the encoder reads
    int32_t encoder_eos_ = 0;
    std::shared_ptr<const RemoteDecoder> remote_;
    std::unique_ptr<Llama> decoder_;
    std::unique_ptr<Roberta> encoder_;
    std::unique_ptr<Projector> projector_;
    std::unique_ptr<Policy> policy_;
    std::vector<AdapterInfo> adapters_;
    std::string gguf_types_;
    std::optional<int32_t> bos_id_;
    Sha256Digest maker_;  // of passages, but for the chunk length
    ChatTemplate chat_;
    ChatSource chat_source_ = ChatSource::model_directory;
    std::vector<int32_t> end_ids_;
};

}  // namespace refrag
