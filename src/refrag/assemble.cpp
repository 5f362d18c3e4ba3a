// See assemble.h.
#include "refrag/assemble.h"

namespace refrag {

void DecoderInput::add_token(int32_t id) {
    source.push_back(id);
    ++plain_tokens;
}

void DecoderInput::add_tokens(std::span<const int32_t> ids) {
    source.insert(source.end(), ids.begin(), ids.end());
    plain_tokens += ids.size();
}

void DecoderInput::add_chunk(const Chunk& chunk, bool expanded) {
    const auto index = static_cast<int32_t>(chunk_position.size());
    chunk_position.push_back(static_cast<int32_t>(source.size()));
    chunk_n_positions.push_back(expanded ? static_cast<int32_t>(chunk.ids.size()) : 1);
    plain_tokens += chunk.ids.size();
    if (expanded) {
        source.insert(source.end(), chunk.ids.begin(), chunk.ids.end());
    } else {
        source.push_back(-1 - static_cast<int32_t>(row_chunk.size()));
        row_chunk.push_back(index);
    }
}

void DecoderInput::skip_chunk(const Chunk& chunk) {
    chunk_position.push_back(static_cast<int32_t>(source.size()));
    chunk_n_positions.push_back(0);
    plain_tokens += chunk.ids.size();
}

void DecoderInput::add_row() {
    source.push_back(-1 - static_cast<int32_t>(row_chunk.size()));
    row_chunk.push_back(-1);
    ++plain_tokens;
}

}  // namespace refrag
