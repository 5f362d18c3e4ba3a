// What memory an engine over a model will take beside the weights, computed before any of it is taken.
#pragma once

#include <cstdint>
#include <string>

#include "refrag/model.h"

namespace refrag {

struct MemoryPlan {
    uint64_t weight_bytes = 0;     // held already
    uint64_t kv_bytes = 0;         // whole pages for every slot
    uint64_t workspace_bytes = 0;  // activations and scratch of the largest step, from above
    uint64_t available_bytes = 0;  // what the backend may still give
    bool fits() const { return kv_bytes + workspace_bytes <= available_bytes; }
};

// For n_slots requests at a time of max_context decoder positions each.
MemoryPlan plan_memory(const Model& model, int32_t n_slots, int64_t max_context);

// Status::out_of_memory with both numbers where the backend's memory is its own (a GPU's) and the plan does
// not fit. A CPU's is shared with all else that runs: there the system has the last word.
void check_memory_plan(const Model& model, int32_t n_slots, int64_t max_context);

// Bytes of K and V of one entry in all layers, in a cache of dtype `kv`.
uint64_t kv_entry_bytes(const LlamaConfig& config, DType kv);

// Memory that a Generator's steps take beside the cache, and the encoder and heads for one request: scratch
// of kPrefillRows rows, logits, chunk embeddings. An estimate from above, for refusing what cannot fit.
// n_chunks: of all requests that run at once; rows: the longest prompt.
uint64_t workspace_bytes(const LlamaConfig& decoder, const RobertaConfig& encoder, const PolicyConfig& policy,
                         int32_t batch, int64_t rows, int64_t n_chunks);

}  // namespace refrag
