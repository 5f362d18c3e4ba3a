// Matching of added tokens: a walk down the trie from every byte that can begin one.
#include "text/added_tokens.h"

#include <algorithm>

#include "text/unicode.h"

namespace refrag {

bool AddedTokenMatcher::add(const AddedToken& token) {
    uint32_t node = 0;
    for (const char c : token.content) {
        const uint64_t edge = static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(c);
        const auto [child, is_new] = children_.try_emplace(edge, n_nodes_);
        if (is_new) ++n_nodes_;
        node = child->second;
    }
    if (token.content.empty() || !token_at_.try_emplace(node, static_cast<uint32_t>(tokens_.size())).second)
        return false;
    starts_[static_cast<unsigned char>(token.content[0])] = true;
    tokens_.push_back(token);
    return true;
}

const AddedToken* AddedTokenMatcher::longest_match(std::string_view text, size_t at) const {
    const AddedToken* longest = nullptr;
    uint32_t node = 0;
    for (; at < text.size(); ++at) {
        const auto child =
            children_.find(static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(text[at]));
        if (child == children_.end()) break;
        node = child->second;
        const auto token = token_at_.find(node);
        if (token != token_at_.end()) longest = &tokens_[token->second];
    }
    return longest;
}

void AddedTokenMatcher::split(std::string_view text, size_t begin, size_t end, bool parse_special,
                              std::vector<TextSpan>& out) const {
    text = text.substr(0, end);
    size_t done = begin;  // everything before it is in `out`
    size_t at = begin;
    while (at < end) {
        if (!starts_[static_cast<unsigned char>(text[at])]) {
            ++at;
            continue;
        }
        const AddedToken* token = longest_match(text, at);
        if (token == nullptr) {
            ++at;
            continue;
        }
        size_t first = at;
        size_t last = at + token->content.size();
        at = last;
        if (token->special && !parse_special) continue;
        if (token->single_word) {
            const bool touches_left = first > begin && is_word_char(char_before(text, begin, first).code);
            const bool touches_right = last < end && is_word_char(decode_utf8(text, last).code);
            if (touches_left || touches_right) continue;
        }
        if (token->lstrip) first = std::max(white_space_before(text, begin, first), done);
        if (token->rstrip) last = white_space_after(text, last);
        if (done < first) out.push_back({done, first, -1});
        // A token of white space may lie within what the token before stripped. The original then reads that
        // stretch again from where this token ends, and passes over a token that is left with nothing; so do
        // we.
        if (first < last) out.push_back({first, last, token->id});
        done = std::max(first, last);
    }
    if (done < end) out.push_back({done, end, -1});
}

}  // namespace refrag
