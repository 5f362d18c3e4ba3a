// Where a model's decoder lies, and what its files say beside the weights: configuration, vocabulary, first
// token, chat template. A Hugging Face directory, a directory with model.gguf, or a GGUF file alone.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/sha256.h"
#include "io/gguf.h"
#include "models/stored_weights.h"
#include "models/transformer_config.h"
#include "text/tokenizer.h"

namespace refrag {

class DecoderFiles {
  public:
    // `model`: what the user named. A directory with refrag.json has its decoder in decoder/; any other
    // directory and a file are a plain decoder. Opens and checks model.gguf where that is the weights' file;
    // both kinds of weights in one directory are refused.
    explicit DecoderFiles(const std::string& model);

    // Refuses a path with no model: neither a file nor a directory with refrag.json, config.json or
    // model.gguf.
    static void check_model(const std::string& model);

    bool is_plain() const { return is_plain_; }
    // The directory or the GGUF file: how messages name the decoder.
    const std::string& path() const { return path_; }
    const GgufFile* gguf() const { return gguf_.get(); }  // null for safetensors

    // A directory's own files (tokenizer.json, tokenizer_config.json, generation_config.json,
    // chat_template.jinja) go before what a GGUF file says; a config.json beside model.gguf is not read.
    Tokenizer tokenizer() const;
    // Where neither file of the network names an end token, tokenizer_config.json's "eos_token" is one.
    DecoderConfig config(const Tokenizer& tokenizer) const;
    std::optional<int32_t> bos_id(const Tokenizer& tokenizer, const DecoderConfig& config) const;
    std::optional<std::string> chat_template() const;
    // Where an end token was looked for, for the message that there is none.
    std::string end_token_places() const;

    std::unique_ptr<StoredWeights> weights(Device& device, const DecoderConfig& config, LoadedBytes loaded,
                                           WeightFormat format) const;
    // How many tensors of each type a GGUF file has, the most frequent first: "210 Q4_1, 61 F32"; "" for
    // safetensors.
    std::string gguf_types() const;
    // The directory, where a PEFT adapter lies beside the weights; "" where there is none.
    std::string adapter_dir() const;
    // Sizes of the weights' files together; 0 where that cannot be known.
    uint64_t weight_file_bytes() const;
    // All that says how a text becomes ids.
    void add_text_identity(Sha256& hash) const;

  private:
    bool has_own_tokenizer() const;

    bool is_plain_ = false;
    std::string path_;
    std::string directory_;  // of files beside the weights; "" for a file alone
    std::shared_ptr<const GgufFile> gguf_;
};

// Where the decoder of a model lies: DIR/decoder, or DIR itself, or the file.
std::string decoder_path_of(const std::string& model);

// The files of a directory that say how a text becomes ids, and its config.
void add_text_files(Sha256& hash, const std::string& dir);

}  // namespace refrag
