// Where an answer looked: how the rows that chose its tokens divided their attention over the decoder's
// input. No part of answering: the rows go through the decoder once more, and the weights, which the fused op
// does not give, are computed on the host from q and k, softmax(q k^T * scale) as the paper's figures show
// it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "models/llama.h"
#include "refrag/generator.h"
#include "refrag/prompt_work.h"

namespace refrag {

// Attention of n_rows rows over n_positions positions, both means over heads. What a row sees adds up to 1;
// what comes after it gets 0.
struct AttentionReport {
    int32_t n_layers = 0;
    int64_t n_rows = 0;
    int64_t n_positions = 0;      // the prompt's, then the answer's but its last token's
    std::vector<float> by_layer;  // [n_layers, n_positions], mean over the rows
    std::vector<float> by_row;    // [n_rows, n_positions], mean over the layers
};

// Of the answer `ids` to a prompt. Row 0 is the prompt's last one, which chose ids[0]; row i is ids[i - 1].
// Of an empty answer row 0 alone. `backend`: a queue of the decoder's device, with memory for a KV cache of
// n_positions. On the host k of all positions and layers is held, F32: Status::out_of_memory with both
// numbers where more than half of what is there would go. Time: n_layers * n_heads * head_dim * n_rows *
// n_positions multiplications on one thread.
// step_rows: that go through the decoder at a time.
AttentionReport answer_attention(Backend& backend, const Llama& decoder, const Prompt& prompt,
                                 std::span<const int32_t> ids, int64_t step_rows = Generator::kStepRows);

}  // namespace refrag
