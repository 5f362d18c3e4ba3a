// Byte-level BPE tokenizers read from Hugging Face's tokenizer.json (RoBERTa, GPT-2 and our own vocabulary):
// the same ids as the `tokenizers` library, and byte spans that tile the original text. What a file asks for
// and this runtime does not do (a normalizer, another pattern, another model) is refused by name, never
// passed over. Truncation and padding settings are the exception: they shape batches, not ids, and are left
// to the caller as `transformers` leaves them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace refrag {

// One token and its half-open byte range in the ORIGINAL bytes. The ranges of a text's tokens tile it: the
// first begins at 0, each begins where the one before ends, the last ends at size(). A range may begin inside
// a character, and is empty for a token that stands for no byte of the text (an added prefix space, a special
// token from the template).
struct Token {
    int32_t id;
    size_t begin;
    size_t end;
    bool operator==(const Token&) const = default;
};

// Immutable after loading; copies share their tables; const methods may be called from several threads at
// once.
class Tokenizer {
  public:
    // Reads tokenizer.json. Throws Error(bad_input) naming file, key or component.
    static Tokenizer from_file(const std::string& path);
    // The same from memory; `name` begins the messages.
    static Tokenizer from_json(std::string_view json, const std::string& name);

    // Ids of a text, adding none. Where parse_special is false the spelling of a special token is ordinary
    // text; where it is true it becomes the token. Added tokens that are not special are always recognised.
    // Any bytes are accepted: each maximal invalid UTF-8 subpart is read as U+FFFD. Near-linear time, no
    // recursion.
    std::vector<Token> encode(std::string_view text, bool parse_special = false) const;
    // The ids of encode alone.
    std::vector<int32_t> encode_ids(std::string_view text, bool parse_special = false) const;
    // Hugging Face's default encode: special tokens are parsed and the post-processor's template is put
    // around; template tokens have empty ranges at 0 or at text.size().
    std::vector<Token> encode_with_special_tokens(std::string_view text) const;

    // Text of ids, valid UTF-8 (U+FFFD per maximal invalid subpart). Ids without a piece give nothing.
    std::string decode(std::span<const int32_t> ids, bool skip_special_tokens) const;
    // The bytes one id stands for; not necessarily whole characters. Empty for an id without a piece.
    std::string_view token_bytes(int32_t id) const;

    // One more than the largest id, added tokens included.
    int64_t vocab_size() const;
    // The vocabulary's own spelling ("Ġthe"); empty for an id without a piece.
    std::string_view piece(int32_t id) const;
    std::optional<int32_t> id_of(std::string_view piece) const;
    bool is_special(int32_t id) const;

    // What the post-processor puts before and after a single text.
    std::span<const int32_t> template_prefix() const;
    std::span<const int32_t> template_suffix() const;
    // The post-processor puts one first: its id is template_prefix()[0].
    bool adds_bos() const { return !template_prefix().empty(); }

  private:
    struct Tables;
    friend struct TokenizerLoader;
    explicit Tokenizer(std::shared_ptr<const Tables> tables) : tables_(std::move(tables)) {}
    std::shared_ptr<const Tables> tables_;
};

// Turns a stream of ids into text as it comes, holding back the bytes of a character that is not complete
// yet. What push returned so far plus flush equals Tokenizer::decode of all ids. One thread at a time.
class StreamDecoder {
  public:
    explicit StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens = true)
        : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

    // The text that this id completes; often a piece, sometimes nothing.
    std::string push(int32_t id);
    // What is still held back, as U+FFFD; afterwards the decoder is as new.
    std::string flush();

  private:
    Tokenizer tokenizer_;
    bool skip_special_tokens_;
    std::string held_;  // an incomplete character: at most 3 bytes
};

}  // namespace refrag
