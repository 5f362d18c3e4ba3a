// What a Tokenizer consists of once loaded; shared by its copies. Internal to src/text.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/pre_tokenizer.h"
#include "text/rewrite.h"
#include "text/tokenizer.h"

namespace refrag {

// How ids become text: the pieces' bytes one after another, with what may happen at their borders.
struct TokenDecoder {
    bool byte_level = false;  // the bytes of all tokens are one text; U+FFFD per maximal invalid subpart
    bool byte_fallback =
        false;              // runs of "<0xNN>" are bytes: text if valid UTF-8, else U+FFFD for each token
    std::string separator;  // between tokens
    std::string strip;      // a character of which up to n_strip fall off the front
    size_t n_strip = 0;
    std::string dropped_in_first;  // a character that the first token loses; "" for none
};

struct Tokenizer::Tables {
    // By id; an id that the file does not name has an empty piece.
    std::vector<std::string> pieces;
    std::vector<std::string> bytes;        // what the piece stands for
    std::vector<std::string> first_bytes;  // and as the first token, where decoder.dropped_in_first
    std::vector<bool> special;
    std::vector<bool> skipped;                          // left out by decode where special tokens are
    std::vector<bool> byte_token;                       // one byte of a run, where decoder.byte_fallback
    std::unordered_map<std::string_view, int32_t> ids;  // piece -> id; views into `pieces`

    AddedTokenMatcher raw_added;  // first pass
    std::vector<Rewrite> normalizer;
    AddedTokenMatcher normalized_added;  // second pass
    std::vector<std::variant<Rewrite, Split>> pre_tokenizer;
    Bpe bpe;
    TokenDecoder decoder;

    std::vector<int32_t> template_prefix;
    std::vector<int32_t> template_suffix;

    bool has_piece(int32_t id) const {
        return id >= 0 && static_cast<size_t>(id) < pieces.size() && !pieces[static_cast<size_t>(id)].empty();
    }
};

}  // namespace refrag
