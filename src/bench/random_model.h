// Models that lie in no directory, for measuring: published shapes by name, random weights, and a vocabulary
// made up on the spot. Nothing here answers a question; speed and memory are those of a trained model of the
// same shape.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "refrag/model.h"

namespace refrag {

// Shapes as published: llama-160m, tinyllama-1.1b, llama-3.2-3b, llama-2-7b, llama-3.1-8b; roberta-base,
// roberta-large. Status::usage naming the known ones for any other. A decoder's window is opened to 2^20
// positions, because random weights know no position better than another.
DecoderConfig decoder_shape(const std::string& name);
RobertaConfig encoder_shape(const std::string& name);
std::string decoder_shape_names();  // "llama-160m|tinyllama-1.1b|..."
std::string encoder_shape_names();

// A byte-level BPE of 10460 tokens whose text is easy to make: every word of two syllables after a space
// (" badu") is one token of 5 bytes.
Tokenizer syllable_tokenizer();

// Encoder and decoder with heads between them: a policy of 2 layers as wide as the encoder (its heads, hidden
// 4 times the width) that sees the question, mean pooling, an empty template. Both networks have the syllable
// vocabulary, but each its own copy, so that passages are tokenised twice, as with a stock pair.
// Status::usage where a shape's vocabulary cannot hold it.
ModelParts random_model_parts(DecoderConfig decoder, RobertaConfig encoder);

// Bytes that the networks' weights will take, BF16 matrices (or I8 ones, as `format` says) and F32 vectors,
// without a device's padding.
uint64_t random_weight_bytes(const ModelParts& parts, WeightFormat format = WeightFormat::as_stored);

// Makes the weights and the model; `progress` as in loading. `device` must outlive the model.
std::unique_ptr<Model> make_random_model(Device& device, ModelParts parts, uint64_t seed,
                                         const LoadProgress& progress = {},
                                         WeightFormat format = WeightFormat::as_stored);

// Texts to measure with: words of a vocabulary, drawn by a seed.
class WordTexts {
  public:
    // Status::runtime where the vocabulary has no token that is a space and small letters.
    explicit WordTexts(const Tokenizer& tokenizer);
    // A text of exactly n_tokens tokens. Status::runtime where the vocabulary allows none.
    std::string text(int64_t n_tokens, uint64_t seed) const;

  private:
    Tokenizer tokenizer_;
    std::vector<std::string> words_;
};

}  // namespace refrag
