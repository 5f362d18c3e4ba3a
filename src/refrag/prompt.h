// From passages and a question to the decoder's rows: compress, sense, expand (paper, section 2). What comes
// after, the decoder's pass and the answer, is generator.h's and engine.h's.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "refrag/answer.h"
#include "refrag/assemble.h"
#include "refrag/context.h"
#include "refrag/model.h"

namespace refrag {

struct Prompt {
    DecoderInput input;
    Buffer slots;  // [input.slot_chunk.size(), dim] F32: the projected chunks, in a backend's memory
};

// The ids of a conversation as training lays it out: for every earlier turn the question in its template, the
// segment " " + answer, and the end token; then the present question in its template. Each piece is tokenised
// alone; in questions and answers a special token's spelling is ordinary text.
std::vector<int32_t> conversation_ids(const Model& model, std::span<const Turn> history,
                                      std::string_view question);

// Makes a request's prompt: where a question alone stands, earlier turns come before it, always tokens; the
// policy sees the present question alone. Passages are tokenised and encoded as far as needed and keep the
// result. Fills in what `answer` says of the prompt: chunk_len to plain_tokens, chunks, and its stages'
// times. Status::runtime when it does not fit into max_context positions with one left for an answer, with
// both numbers; what cannot fit is refused before anything is encoded. Status::usage when it is empty.
Prompt make_prompt(Backend& backend, const Model& model, PassageRefs passages, std::string_view question,
                   const AnswerOptions& options, int64_t max_context, Arena& arena, Answer& answer,
                   std::span<const Turn> history = {});

// The most positions that make_prompt can need; tokenises the passages.
int64_t most_positions(const Model& model, PassageRefs passages, std::string_view question,
                       const AnswerOptions& options, std::span<const Turn> history = {});

}  // namespace refrag
