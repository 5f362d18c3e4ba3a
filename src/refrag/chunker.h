// Cuts a passage's tokens into chunks of k decoder tokens and says what the encoder reads of each (paper,
// section 2: "compress"). Chunks never cross a passage; the last one is shorter.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace refrag {

struct Chunk {
    size_t begin = 0;  // byte span [begin, end) in the passage's text
    size_t end = 0;
    std::vector<int32_t> ids;          // decoder ids, 1 to k of them
    std::vector<int32_t> encoder_ids;  // what the encoder reads, special tokens included
};

// How a chunk's encoder ids are made.
struct EncoderVocabulary {
    const Tokenizer* own = nullptr;  // the encoder's tokenizer; null when it shares the decoder's vocabulary
    bool special_tokens = true;      // <s> ids </s>
    int32_t bos_id = 0;
    int32_t eos_id = 2;
};

// `tokens` are the decoder's tokens of `text`, whose spans tile it; chunk_len >= 1. With an own vocabulary a
// chunk's encoder text is the characters whose first byte lies in its span, so that no character is lost or
// read twice. The tokens may be a part of the text's: those of a window.
std::vector<Chunk> cut_chunks(std::string_view text, std::span<const Token> tokens, int32_t chunk_len,
                              const EncoderVocabulary& vocabulary);

}  // namespace refrag
