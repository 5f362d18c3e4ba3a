// See chunker.h.
#include "refrag/chunker.h"

#include <algorithm>

#include "base/check.h"
#include "base/utf8.h"

namespace refrag {
namespace {

// Walks over a text's characters once, giving for rising positions the first character border at or after
// each. Borders are those of the decoding that the tokenizers use: an invalid subpart counts as one
// character.
class BorderWalk {
  public:
    // `from`: no position asked for lies before it.
    BorderWalk(std::string_view text, size_t from) : text_(text), border_(from) {
        // A byte that begins a character is a border. Behind three that continue one, so is any byte.
        const auto continues = [&](size_t at) {
            return at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80;
        };
        while (border_ > 0 && from - border_ < 3 && continues(border_)) --border_;
    }
    size_t at_or_after(size_t position) {
        while (border_ < position) border_ += decode_utf8(text_, border_).bytes;
        return border_;
    }

  private:
    std::string_view text_;
    size_t border_;
};

}  // namespace

std::vector<Chunk> cut_chunks(std::string_view text, std::span<const Token> tokens, int32_t chunk_len,
                              const EncoderVocabulary& vocabulary) {
    REFRAG_CHECK(chunk_len >= 1, Status::usage, "chunk length: expected at least 1 token, found ", chunk_len);
    std::vector<Chunk> chunks;
    BorderWalk walk(text, tokens.empty() ? 0 : tokens.front().begin);
    const size_t step = static_cast<size_t>(chunk_len);
    for (size_t first = 0; first < tokens.size(); first += step) {
        const std::span<const Token> part = tokens.subspan(first, std::min(step, tokens.size() - first));
        Chunk chunk;
        chunk.begin = part.front().begin;
        chunk.end = part.back().end;
        for (const Token& token : part) chunk.ids.push_back(token.id);
        if (vocabulary.special_tokens) chunk.encoder_ids.push_back(vocabulary.bos_id);
        if (vocabulary.own == nullptr) {
            chunk.encoder_ids.insert(chunk.encoder_ids.end(), chunk.ids.begin(), chunk.ids.end());
        } else {
            const size_t from = walk.at_or_after(chunk.begin);
            const size_t to = walk.at_or_after(chunk.end);
            const std::vector<int32_t> ids = vocabulary.own->encode_ids(text.substr(from, to - from));
            chunk.encoder_ids.insert(chunk.encoder_ids.end(), ids.begin(), ids.end());
        }
        if (vocabulary.special_tokens) chunk.encoder_ids.push_back(vocabulary.eos_id);
        // A chunk wholly inside one character has no text of its own; the encoder still needs one row.
        if (chunk.encoder_ids.empty()) chunk.encoder_ids.push_back(vocabulary.bos_id);
        chunks.push_back(std::move(chunk));
    }
    return chunks;
}

}  // namespace refrag
