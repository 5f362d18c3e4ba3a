// What memory an engine over a model will take beside the weights, computed before any of it is taken.
#pragma once

#include <cstdint>
#include <string>

#include "refrag/model.h"

namespace refrag {

struct MemoryPlan {
    uint64_t weight_bytes = 0;     // held already
    uint64_t kv_bytes = 0;         // the pool of pages: kv_blocks, each for kPageEntries positions
    uint64_t workspace_bytes = 0;  // activations and scratch of the largest step, from above; page tables
    uint64_t available_bytes = 0;  // what the device may still give
    int64_t kv_blocks = 0;
    int64_t request_blocks = 0;  // of one request of max_context positions
    uint64_t request_bytes = 0;
    int64_t max_context = 0;
    bool is_remote = false;
    // Whether one request can be as long as it may be.
    bool fits() const { return request_bytes + workspace_bytes <= available_bytes; }
};

// For n_slots requests at a time of at most max_context decoder positions each. The pool: kv_entries
// positions, or where that is 0 enough for all requests at their longest, in any case no more than memory
// allows: what a GPU has left beside the workspace; half of what a machine has, since other programs use it
// too. At least one block.
MemoryPlan plan_memory(const Model& model, int32_t n_slots, int64_t max_context, int64_t kv_entries = 0);

// Status::out_of_memory with both numbers where the device's memory is its own (a GPU's) and cannot hold one
// request of max_context positions (`whole`), or not even one block. A CPU's is shared with all else that
// runs: there the system has the last word.
void check_memory_plan(const MemoryPlan& plan, bool whole);

// Bytes of K and V of one entry in all layers, in a cache of dtype `kv`.
uint64_t kv_entry_bytes(const DecoderConfig& config, DType kv);

// Memory that a Generator's steps take beside the cache, and the encoder and heads for one request: scratch
// of kPrefillRows rows, logits, chunk embeddings. An estimate from above, for refusing what cannot fit.
// n_chunks: of all requests that run at once; rows: the longest prompt.
uint64_t workspace_bytes(const DecoderConfig& decoder, const RobertaConfig& encoder,
                         const PolicyConfig& policy, int32_t batch, int64_t rows, int64_t n_chunks);

}  // namespace refrag
