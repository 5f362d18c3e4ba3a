// Added tokens: spellings that are found in the text before anything else happens to it, such as <mask>. The
// rules are those of Hugging Face's AddedVocabulary: leftmost-longest matches of all tokens, of which some
// are then let go.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace refrag {

// One entry of tokenizer.json's added_tokens.
struct AddedToken {
    int32_t id = 0;
    std::string content;  // as it is looked for: normalised where `normalized` is true
    bool special = false;
    bool single_word = false;  // only where no word character touches it
    bool lstrip = false;       // takes the white space before it along
    bool rstrip = false;       // and after it
    bool normalized = false;   // looked for after the normalizer, that is, in the second pass
};

// A stretch of text: an added token's, or plain text (id -1).
struct TextSpan {
    size_t begin;
    size_t end;
    int32_t id;
};

// The tokens of one pass in a trie. Immutable in use.
class AddedTokenMatcher {
  public:
    // False where the content is empty or was added before.
    bool add(const AddedToken& token);
    bool empty() const { return tokens_.empty(); }

    // Cuts text[begin, end) into spans and appends them. They tile it, unless an added token consists of
    // white space that another one strips: then they may overlap. Where parse_special is false, the match of
    // a special token becomes plain text again (and hides what it overlaps, as in the original).
    void split(std::string_view text, size_t begin, size_t end, bool parse_special,
               std::vector<TextSpan>& out) const;

  private:
    const AddedToken* longest_match(std::string_view text, size_t at) const;

    std::vector<AddedToken> tokens_;
    std::array<bool, 256> starts_{};                   // bytes that some token begins with
    std::unordered_map<uint64_t, uint32_t> children_;  // node << 8 | byte -> node; node 0 is the root
    std::unordered_map<uint32_t, uint32_t> token_at_;  // node -> index into tokens_
    uint32_t n_nodes_ = 1;
};

}  // namespace refrag
