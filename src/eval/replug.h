// REPLUG (Shi et al. 2023) as a baseline for `eval qa`: every passage is read in a sequence of its own, and
// the next token's probabilities are averaged over the sequences, each counting alike. Decoding is greedy.
// Its cost is one decoder a passage in every step; what it lacks is any view of two passages at once.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/arena.h"
#include "refrag/model.h"

namespace refrag {

// The token with the largest mean probability. logits [n_sequences, vocab], row after row; equal means: the
// lower id. n_sequences >= 1.
int32_t replug_token(std::span<const float> logits, int64_t n_sequences);

// Answers prompts of one question over different passages together: up to max_new_tokens ids, the end token
// not among them. prompts [n]: the ids of each, none empty; each sequence has a slot of a cache that is made
// here. Status::runtime where a prompt and its answer are beyond the decoder's window. With one prompt the
// ids are those of greedy decoding.
std::vector<int32_t> replug(Backend& backend, const Model& model,
                            std::span<const std::vector<int32_t>> prompts, int64_t max_new_tokens,
                            Arena& arena);

}  // namespace refrag
