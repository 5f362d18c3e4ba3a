// Any bytes as tokenizer.json, and a text for what is accepted: spans tile the text, ids are tokens, decoding
// gives valid UTF-8 whether at once or as a stream.
#include <vector>

#include "base/check.h"
#include "main.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace refrag_fuzz {
namespace {

using refrag::Token;
using refrag::Tokenizer;

// Long enough for every loop's second turn, short enough for thousands of texts a second.
constexpr size_t max_text_bytes = 2048;

void check_tokens(const Tokenizer& tokenizer, const std::vector<Token>& tokens, std::string_view text) {
    size_t at = 0;
    for (const Token& token : tokens) {
        promise(token.begin == at && token.end >= token.begin, "spans tile the text");
        at = token.end;
        promise(token.id >= 0 && token.id < tokenizer.vocab_size(), "an id is below vocab_size");
        promise(!tokenizer.piece(token.id).empty(), "an id has a piece");
    }
    promise(at == text.size() || (tokens.empty() && text.empty()), "the last span ends with the text");
}

std::vector<int32_t> ids_of(const std::vector<Token>& tokens) {
    std::vector<int32_t> ids;
    for (const Token& token : tokens) ids.push_back(token.id);
    return ids;
}

void check_decode(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
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

void check_tokenizer(const Tokenizer& tokenizer, std::string_view text) {
    for (const bool parse_special : {false, true}) {
        const std::vector<Token> tokens = tokenizer.encode(text, parse_special);
        check_tokens(tokenizer, tokens, text);
        promise(tokenizer.encode_ids(text, parse_special) == ids_of(tokens), "encode_ids gives encode's ids");
        check_decode(tokenizer, ids_of(tokens), parse_special);
    }
    const std::vector<Token> wrapped = tokenizer.encode_with_special_tokens(text);
    check_tokens(tokenizer, wrapped, text);
    promise(wrapped.size() >= tokenizer.template_prefix().size() + tokenizer.template_suffix().size(),
            "the template is there");
    // Any ids can be decoded, in whatever order: here the text's bytes as ids.
    std::vector<int32_t> ids;
    for (const char byte : text) ids.push_back(static_cast<unsigned char>(byte));
    check_decode(tokenizer, ids, false);
}

}  // namespace

void fuzz_tokenizer(std::string_view input) {
    const size_t zero = input.find('\0');
    const std::string_view text = zero == std::string_view::npos ? input : input.substr(zero + 1);
    refused([&] {
        const Tokenizer tokenizer = Tokenizer::from_json(input.substr(0, zero), "tokenizer.json");
        check_tokenizer(tokenizer, text.substr(0, max_text_bytes));
    });
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_tokenizer)
