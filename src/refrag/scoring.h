// Negative log-likelihoods from the decoder: of given targets after given rows (evaluation), and of chunks
// read alone (the perplexity baselines of the paper's Figure 3). `backend` is a queue of the model's device.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "refrag/model.h"

namespace refrag {

// Rows that one call of the decoder takes; longer inputs run in pieces, which bounds the memory of
// activations.
inline constexpr int64_t kPrefillRows = 2048;

// Runs `source` (Llama::forward) through `slot` of `kv`, in pieces, after what the slot holds. Returns the
// hidden states of the last n_last rows, [n_last, dim] in `arena`.
Tensor prefill(Backend& backend, const Llama& decoder, std::span<const int32_t> source, Tensor chunk_rows,
               KvCache& kv, int32_t slot, int64_t n_last, Arena& arena);

// An id whose negative log-likelihood after a row is wanted.
struct ScoredRow {
    int64_t row = 0;
    int32_t target = 0;
};

// Runs `source` through `slot` of `kv` (as prefill does); the negative log-likelihoods in nats of the targets
// of `scores`, whose rows rise.
std::vector<float> prompt_nll(Backend& backend, const Llama& decoder, std::span<const int32_t> source,
                              Tensor chunk_rows, std::span<const ScoredRow> scores, KvCache& kv, int32_t slot,
                              Arena& arena);

// Negative log-likelihood in nats of targets[i] under the logits of hidden row i.
std::vector<float> target_nll(Backend& backend, const Llama& decoder, Tensor hidden,
                              std::span<const int32_t> targets, Arena& arena);

// Mean negative log-likelihood of each sequence of ids when the decoder reads it alone after
// Model::first_id().
std::vector<float> mean_nll_alone(Backend& backend, const Model& model,
                                  std::span<const std::vector<int32_t>> sequences, Arena& arena);

}  // namespace refrag
