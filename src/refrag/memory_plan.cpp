// See memory_plan.h.
#include "refrag/memory_plan.h"

#include <algorithm>

#include "refrag/generator.h"
#include "refrag/scoring.h"

namespace refrag {
namespace {

// What an engine's queue takes on a GPU beside activations: cuBLAS' workspace, activations rounded for it,
// int8 weights widened for it, the partial sums of decode attention.
uint64_t device_scratch_bytes(const DecoderConfig& c, int32_t n_slots, int64_t max_context) {
    constexpr int64_t kWorkspace = int64_t{32} << 20, kWidened = int64_t{64} << 20, kSplitEntries = 256;
    const int64_t widest = std::max<int64_t>({c.hidden_dim, c.dim, int64_t{c.n_heads} * c.head_dim});
    const int64_t splits = max_context / kSplitEntries + 1;
    const int64_t partial = int64_t{n_slots} * c.n_heads * splits * (c.head_dim + 2) * 4;
    return static_cast<uint64_t>((kPrefillRows * widest * 2 + partial) * 5 / 4 + kWidened + kWorkspace);
}

}  // namespace

uint64_t kv_entry_bytes(const DecoderConfig& config, DType kv) {
    return Generator::cache_bytes(config, kv, 1, kPageEntries) / kPageEntries;
}

uint64_t workspace_bytes(const DecoderConfig& decoder, const RobertaConfig& encoder,
                         const PolicyConfig& policy, int32_t batch, int64_t rows, int64_t n_chunks) {
    constexpr int64_t kSlack = int64_t{64} << 20;  // arenas' blocks, texts, token ids
    // Beside its activations a row has its result, a copy of that for the head, and what it comes from.
    const int64_t row = Llama::activation_floats(decoder) + 3 * int64_t{decoder.dim};
    int64_t floats = std::min(kPrefillRows, rows * batch) * row;
    floats += int64_t{batch} * 3 * decoder.vocab_size;
    floats += Roberta::group_rows * Roberta::activation_floats(encoder);
    // Chunk embeddings: kept with the passage, gathered, on the device; the policy's rows; the chunk rows.
    floats += n_chunks * 4 * int64_t{encoder.dim};
    floats += n_chunks * Policy::activation_floats(policy);
    floats += n_chunks * 2 * int64_t{decoder.dim};
    return static_cast<uint64_t>(floats * static_cast<int64_t>(sizeof(float)) + kSlack);
}

MemoryPlan plan_memory(const Model& model, int32_t n_slots, int64_t max_context, int64_t kv_entries) {
    const DecoderConfig& decoder = model.decoder().config();
    const int32_t chunk_len = std::max(1, model.config().chunk_len);
    const int64_t n_chunks = (max_context + chunk_len - 1) / chunk_len;
    MemoryPlan plan;
    plan.max_context = max_context;
    plan.is_remote = model.device().is_remote();
    plan.weight_bytes = model.weight_bytes();
    plan.available_bytes = model.device().available_bytes();
    plan.request_blocks = KvCache::blocks_for(max_context);
    plan.workspace_bytes =
        workspace_bytes(decoder, model.has_encoder() ? model.encoder().config() : RobertaConfig{},
                        model.config().policy, n_slots, max_context, n_chunks * n_slots);
    if (plan.is_remote) plan.workspace_bytes += device_scratch_bytes(decoder, n_slots, max_context);
    const uint64_t block_bytes = Generator::block_bytes(decoder, model.decoder().kv_dtype());
    plan.request_bytes = static_cast<uint64_t>(plan.request_blocks) * block_bytes;

    int64_t wanted = plan.request_blocks * n_slots;
    if (kv_entries > 0) wanted = std::min(wanted, KvCache::blocks_for(kv_entries));
    // No sequence has more pages than the pool.
    plan.workspace_bytes += KvCache::most_table_bytes(n_slots, decoder.n_layers * decoder.n_kv_heads,
                                                      std::min(plan.request_blocks, wanted));
    uint64_t room = plan.available_bytes - std::min(plan.available_bytes, plan.workspace_bytes);
    if (!plan.is_remote) room /= 2;
    const uint64_t affordable = std::max<uint64_t>(1, room / block_bytes);
    plan.kv_blocks = static_cast<int64_t>(std::min(static_cast<uint64_t>(wanted), affordable));
    plan.kv_bytes = static_cast<uint64_t>(plan.kv_blocks) * block_bytes;
    return plan;
}

void check_memory_plan(const MemoryPlan& plan, bool whole) {
    const uint64_t least = whole ? plan.request_bytes : std::min(plan.request_bytes, plan.kv_bytes);
    if (!plan.is_remote || least + plan.workspace_bytes <= plan.available_bytes) return;
    fail(Status::out_of_memory, "GPU memory: ", least + plan.workspace_bytes,
         " bytes needed beside the weights (KV cache ", least,
         whole ? " for one request of " : " of at most ", plan.max_context, " positions, workspace ",
         plan.workspace_bytes, "), ", plan.available_bytes,
         " available: choose a smaller context, fewer parallel sequences or a larger fraction of the GPU's "
         "memory");
}

}  // namespace refrag
