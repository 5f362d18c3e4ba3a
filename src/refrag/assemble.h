// "Expand": the decoder's input as rows, in the order of the prompt. A row is a token, or a chunk row: a
// projected chunk, or a vector given from outside. Positions run 0, 1, 2, ... over the mixed rows (paper,
// section 2).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "refrag/chunker.h"

namespace refrag {

struct DecoderInput {
    std::vector<int32_t> source;          // a token id, or -1 - i for chunk row i (Llama::forward)
    std::vector<int32_t> row_chunk;       // chunk of chunk row i, counted over all passages; -1: of none
    std::vector<int32_t> chunk_position;  // first row of each chunk
    // Rows that each chunk takes: its tokens when expanded, 1 when compressed, 0 when left out.
    std::vector<int32_t> chunk_n_positions;
    size_t plain_tokens = 0;  // rows if everything were expanded

    void add_token(int32_t id);
    void add_tokens(std::span<const int32_t> ids);
    void add_chunk(const Chunk& chunk, bool expanded);
    // A chunk that is left out.
    void skip_chunk(const Chunk& chunk);
    // A chunk row that is no chunk of a passage.
    void add_row();
};

}  // namespace refrag
