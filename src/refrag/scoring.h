// Log-probabilities from the decoder: of given targets after given rows (scored prompts), and of chunks read
// alone (the perplexity baselines of the paper's Figure 3). `backend` is a queue of the model's device.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "refrag/logprobs.h"
#include "refrag/model.h"

namespace refrag {

// Rows that one call of the decoder takes; longer inputs run in pieces, which bounds the memory of
// activations.
inline constexpr int64_t kPrefillRows = 2048;

// Runs `source` (Llama::forward) through `slot` of `kv`, in pieces, after what the slot holds. Returns the
// hidden states of the last n_last rows, [n_last, dim] in `arena`.
Tensor prefill(Backend& backend, const Llama& decoder, std::span<const int32_t> source, Tensor chunk_rows,
               KvCache& kv, int32_t slot, int64_t n_last, Arena& arena);

// For every hidden row i the log-probability of targets[i] and the n_top most likely ids, n_top <=
// max_top_logprobs, in fp32 and in the order of token_logprobs(). Logits of a bounded number of rows are held
// at a time (64 MB). Status::runtime where one is NaN.
std::vector<TokenLogprobs> row_logprobs(Backend& backend, const Llama& decoder, Tensor hidden,
                                        std::span<const int32_t> targets, int32_t n_top, Arena& arena);

// Mean negative log-likelihood of each sequence of ids when the decoder reads it alone after
// Model::first_id().
std::vector<float> mean_nll_alone(Backend& backend, const Model& model,
                                  std::span<const std::vector<int32_t>> sequences, Arena& arena);

}  // namespace refrag
