// What holds of every tokenizer that was read, from whichever files: spans tile the text, ids are tokens,
// decoding gives valid UTF-8 whether at once or as a stream.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "targets.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace refrag_fuzz {

using refrag::Token;
using refrag::Tokenizer;

// Long enough for every loop's second turn, short enough for thousands of texts a second.
constexpr size_t max_text_bytes = 2048;

inline void check_tokens(const Tokenizer& tokenizer, const std::vector<Token>& tokens,
                         std::string_view text) {
    size_t at = 0;
    for (const Token& token : tokens) {
        promise(token.begin == at && token.end >= token.begin, "spans tile the text");
        at = token.end;
        promise(token.id >= 0 && token.id < tokenizer.vocab_size(), "an id is below vocab_size");
        promise(!tokenizer.piece(token.id).empty(), "an id has a piece");
    }
    // A text of which a file's own rules leave nothing has no tokens.
    promise(at == text.size() || tokens.empty(), "the last span ends with the text");
}

inline std::vector<int32_t> ids_of(const std::vector<Token>& tokens) {
    std::vector<int32_t> ids;
    for (const Token& token : tokens) ids.push_back(token.id);
    return ids;
}

inline void check_decode(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
    const std::string text = tokenizer.decode(ids, skip_special);
    promise(refrag::is_valid_utf8(text), "decoded text is valid UTF-8");
    refrag::StreamDecoder stream(tokenizer, skip_special);
    std::string streamed;
    for (const int32_t id : ids) {
        const std::string piece = stream.push(id);
        promise(refrag::is_valid_utf8(piece), "streamed text is valid UTF-8, piece by piece");
        streamed += piece;
    }
    streamed += stream.flush();
    promise(streamed == text, "streaming gives what decoding gives");
}

inline void check_tokenizer(const Tokenizer& tokenizer, std::string_view text) {
    text = text.substr(0, max_text_bytes);
    for (const bool parse_special : {false, true}) {
        const std::vector<Token> tokens = tokenizer.encode(text, parse_special);
        check_tokens(tokenizer, tokens, text);
        promise(tokenizer.encode_ids(text, parse_special) == ids_of(tokens), "encode_ids gives encode's ids");
        check_decode(tokenizer, ids_of(tokens), parse_special);
    }
    const std::vector<Token> plain = tokenizer.encode(text, true);
    const std::vector<Token> wrapped = tokenizer.encode_with_special_tokens(text);
    const size_t before = tokenizer.template_prefix().size();
    const size_t after = tokenizer.template_suffix().size();
    promise(wrapped.size() == before + plain.size() + after, "the template is put around the text");
    for (size_t i = 0; i < wrapped.size(); ++i) {
        if (i >= before && i < before + plain.size()) {
            promise(wrapped[i] == plain[i - before], "the template leaves the text's tokens as they are");
        } else {
            const size_t place = i < before ? 0 : text.size();
            promise(wrapped[i].begin == place && wrapped[i].end == place, "template tokens have empty spans");
        }
    }
    // Any ids can be decoded, in whatever order: here the text's bytes as ids.
    std::vector<int32_t> ids;
    for (const char byte : text) ids.push_back(static_cast<unsigned char>(byte));
    check_decode(tokenizer, ids, false);
}

}  // namespace refrag_fuzz
