// What a request does with its chunks: its options, and where they say nothing the model's defaults.
#pragma once

#include <cstdint>

#include "refrag/answer.h"
#include "refrag/model.h"

namespace refrag {

struct Choice {
    SelectPolicy policy = SelectPolicy::model;
    Unexpanded unexpanded = Unexpanded::compress;
    double expand_fraction = 0.0;  // p; policies none and all overrule it
    int32_t chunk_len = 0;         // k
};

// Whether the policy asks the decoder for each chunk's perplexity.
bool reads_chunks_alone(SelectPolicy policy);

Choice choice_of(const Model& model, const AnswerOptions& options);

// Status::usage where the choice needs an encoder and the model is a plain decoder: chunks are compressed, or
// the policy network is asked. The same for what needs the decoder's own logits where it runs elsewhere.
void check_model_can(const Model& model, const AnswerOptions& options);

}  // namespace refrag
