// What a Tokenizer consists of once loaded; shared by its copies. Internal to src/text.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/pre_tokenizer.h"
#include "text/tokenizer.h"

namespace refrag {

struct Tokenizer::Tables {
    // By id; an id that the file does not name has an empty piece.
    std::vector<std::string> pieces;
    std::vector<std::string> bytes;  // what the piece stands for
    std::vector<bool> special;
    std::unordered_map<std::string_view, int32_t> ids;  // piece -> id; views into `pieces`

    AddedTokenMatcher raw_added;         // first pass
    AddedTokenMatcher normalized_added;  // second pass
    WordPattern pattern = WordPattern::gpt2;
    bool add_prefix_space = false;  // before every stretch of plain text that does not begin with one
    Bpe bpe;

    std::vector<int32_t> template_prefix;
    std::vector<int32_t> template_suffix;

    bool has_piece(int32_t id) const {
        return id >= 0 && static_cast<size_t>(id) < pieces.size() && !pieces[static_cast<size_t>(id)].empty();
    }
};

}  // namespace refrag
