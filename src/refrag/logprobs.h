// Log-probabilities of tokens under the decoder's own distribution: softmax of its logits as they are, before
// penalties, bans and temperature; natural logarithm.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace refrag {

constexpr int32_t max_top_logprobs = 20;

struct TokenLogprob {
    int32_t id = 0;
    double logprob = 0.0;
    bool operator==(const TokenLogprob&) const = default;
};

// One token and the most likely ones at its place.
struct TokenLogprobs {
    TokenLogprob chosen;
    std::vector<TokenLogprob> top;  // most likely first, equal ones by id; may hold the chosen one
    bool operator==(const TokenLogprobs&) const = default;
};

// An id whose log-probability after a row of a prompt is wanted.
struct ScoredRow {
    int64_t row = 0;
    int32_t target = 0;
};

// A position of a prompt.
struct PromptScore {
    int64_t position = 0;
    int32_t id = -1;  // the token there; -1: a row that is no token (a compressed chunk, a given vector)
    std::optional<TokenLogprobs> logprobs;  // none: no token, nothing before it, or not read
    bool operator==(const PromptScore&) const = default;
};

// `chosen` and the n_top most likely of logits [vocab_size] (all, if there are fewer), in double. The logits
// are free of NaN and +inf, one at least is finite, as after Sampler::sample.
TokenLogprobs token_logprobs(std::span<const float> logits, int32_t chosen, int32_t n_top);

}  // namespace refrag
