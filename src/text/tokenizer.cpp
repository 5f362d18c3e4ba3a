// Encoding: clean the bytes, cut out added tokens, cut the rest into words, merge each word's bytes, and
// carry every token's place back to the original bytes.
#include "text/tokenizer.h"

#include <algorithm>

#include "base/check.h"
#include "text/tokenizer_tables.h"
#include "text/unicode.h"

namespace refrag {

namespace {

// Appends the tokens of one stretch of plain text, clean[begin, end), with places in the clean text.
void encode_plain(const WordPattern pattern, const Bpe& bpe, bool add_prefix_space, std::string_view clean,
                  size_t begin, size_t end, std::vector<BpePiece>& scratch, std::vector<Token>& out) {
    std::string_view segment = clean.substr(begin, end - begin);
    std::string with_space;
    size_t added = 0;  // bytes in front of the segment that the text does not have
    if (add_prefix_space && segment.front() != ' ') {
        with_space.reserve(segment.size() + 1);
        with_space.append(" ").append(segment);
        segment = with_space;
        added = 1;
    }
    size_t at = 0;
    while (at < segment.size()) {
        const size_t word = word_end(pattern, segment, at);
        scratch.clear();
        bpe.encode(segment.substr(at, word - at), scratch);
        if (out.capacity() - out.size() < scratch.size())
            out.reserve(std::max(out.size() + scratch.size(), 2 * out.capacity()));
        for (const BpePiece& piece : scratch) {
            const size_t next = at + piece.bytes;
            out.push_back({piece.id, begin + (at < added ? 0 : at - added), begin + next - added});
            at = next;
        }
    }
}

}  // namespace

std::vector<Token> Tokenizer::encode(std::string_view text, bool parse_special) const {
    const CleanText clean(text);
    std::vector<TextSpan> first_pass;
    tables_->raw_added.split(clean.text(), 0, clean.text().size(), parse_special, first_pass);
    std::vector<TextSpan> spans;
    for (const TextSpan& span : first_pass) {
        if (span.id >= 0)
            spans.push_back(span);
        else
            tables_->normalized_added.split(clean.text(), span.begin, span.end, parse_special, spans);
    }

    std::vector<Token> tokens;
    std::vector<BpePiece> scratch;
    for (const TextSpan& span : spans) {
        if (span.id >= 0)
            tokens.push_back({span.id, span.begin, span.end});
        else
            encode_plain(tables_->pattern, tables_->bpe, tables_->add_prefix_space, clean.text(), span.begin,
                         span.end, scratch, tokens);
    }

    size_t hint = 0;
    size_t begin = 0;
    for (Token& token : tokens) {  // each begins where the one before ended
        token.begin = begin;
        token.end = std::max(begin, clean.original_position(token.end, hint));
        begin = token.end;
    }
    return tokens;
}

std::vector<int32_t> Tokenizer::encode_ids(std::string_view text, bool parse_special) const {
    const std::vector<Token> tokens = encode(text, parse_special);
    std::vector<int32_t> ids(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) ids[i] = tokens[i].id;
    return ids;
}

std::vector<Token> Tokenizer::encode_with_special_tokens(std::string_view text) const {
    std::vector<Token> tokens;
    for (const int32_t id : tables_->template_prefix) tokens.push_back({id, 0, 0});
    const std::vector<Token> inner = encode(text, true);
    tokens.insert(tokens.end(), inner.begin(), inner.end());
    for (const int32_t id : tables_->template_suffix) tokens.push_back({id, text.size(), text.size()});
    return tokens;
}

int64_t Tokenizer::vocab_size() const {
    return static_cast<int64_t>(tables_->pieces.size());
}

std::string_view Tokenizer::piece(int32_t id) const {
    return tables_->has_piece(id) ? std::string_view(tables_->pieces[static_cast<size_t>(id)])
                                  : std::string_view();
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
    return tables_->has_piece(id) ? std::string_view(tables_->bytes[static_cast<size_t>(id)])
                                  : std::string_view();
}

std::optional<int32_t> Tokenizer::id_of(std::string_view piece) const {
    const auto found = tables_->ids.find(piece);
    if (found == tables_->ids.end()) return std::nullopt;
    return found->second;
}

bool Tokenizer::is_special(int32_t id) const {
    return tables_->has_piece(id) && tables_->special[static_cast<size_t>(id)];
}

std::span<const int32_t> Tokenizer::template_prefix() const {
    return tables_->template_prefix;
}

std::span<const int32_t> Tokenizer::template_suffix() const {
    return tables_->template_suffix;
}

}  // namespace refrag
