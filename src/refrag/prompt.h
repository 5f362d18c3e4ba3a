// From passages and a question to the decoder's rows: compress, sense, expand (paper, section 2). What comes
// after, the decoder's pass and the answer, is generator.h's and engine.h's.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "refrag/answer.h"
#include "refrag/assemble.h"
#include "refrag/context.h"
#include "refrag/model.h"

namespace refrag {

struct Prompt {
    DecoderInput input;
    Buffer slots;  // [input.slot_chunk.size(), dim] F32: the projected chunks, in a backend's memory
};

// Makes a request's prompt. Passages are tokenised and encoded as far as needed and keep the result. Fills in
// what `answer` says of the prompt: chunk_len to plain_tokens, chunks, and its stages' times.
// Status::runtime when it does not fit into max_context positions with one left for an answer, with both
// numbers; what cannot fit is refused before anything is encoded. Status::usage when it is empty.
Prompt make_prompt(const Model& model, PassageRefs passages, std::string_view question,
                   const AnswerOptions& options, int64_t max_context, Arena& arena, Answer& answer);

// The most positions that make_prompt can need; tokenises the passages.
int64_t most_positions(const Model& model, PassageRefs passages, std::string_view question,
                       const AnswerOptions& options);

}  // namespace refrag
