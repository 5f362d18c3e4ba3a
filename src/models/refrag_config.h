// refrag.json: how encoder, projector, policy and decoder of a model directory fit together. Strict: an
// unknown key, a wrong type or an impossible value is refused with file, key, expected and found.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "models/roberta.h"

namespace refrag {

// The texts around passages and question. Each is a segment of its own, tokenised alone, always tokens.
struct PromptTemplate {
    std::string before;
    std::string passage_prefix;
    std::string passage_suffix;
    std::string question_prefix;
    std::string question_suffix;
};

struct PolicyConfig {
    int32_t n_layers = 2;
    int32_t n_heads = 0;
    int32_t dim = 0;
    int32_t hidden_dim = 0;
    float norm_eps = 1e-5f;
    bool sees_question = false;
};

enum class SegmentOrder { passages_first, question_first };

struct RefragConfig {
    // Encoder, projector and policy come together or not at all: refrag.json may have none of their sections.
    bool has_encoder = true;
    int32_t chunk_len = 16;           // k, in decoder tokens
    std::vector<int32_t> chunk_lens;  // the k the model was trained for; holds chunk_len
    bool shared_vocabulary = false;   // a chunk's encoder ids are its decoder ids
    bool encoder_special_tokens = true;
    ChunkPooling pooling = ChunkPooling::cls;
    bool normalize = false;
    PolicyConfig policy;
    double expand_fraction = 0.1;  // p
    PromptTemplate prompt;
    SegmentOrder order = SegmentOrder::passages_first;
};

// What stands in for refrag.json where there is a decoder alone: k = 16, p = 0.25, passages and question in
// plain words.
RefragConfig plain_decoder_config();

// Reads DIR/refrag.json.
RefragConfig load_refrag_config(const std::string& dir);

}  // namespace refrag
