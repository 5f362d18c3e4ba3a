// BPE tokenizers read from Hugging Face's files: byte-level ones (GPT-2, RoBERTa, LLaMA 3, Qwen, OLMo 2 and
// our own vocabulary) and those in SentencePiece's manner (LLaMA 2, Mistral, TinyLlama). The same ids as the
// `tokenizers` library, and byte spans that tile the original text. What a file asks for and this runtime
// does not do (another model, an unknown regular expression) is refused by name, never passed over.
// Truncation and padding settings are the exception: they shape batches, not ids, and are left to the caller
// as `transformers` leaves them.
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

class GgufFile;

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

// A stretch of a text that is put together. Where parse_special is false, the spelling of a special token in
// it is ordinary text; where there is an id, the whole text is this token.
struct TextPart {
    std::string text;
    bool parse_special = false;
    std::optional<int32_t> id;
};

// Immutable after loading; copies share their tables; const methods may be called from several threads at
// once.
class Tokenizer {
  public:
    // Reads tokenizer.json, or a directory that holds it, or vocab.json and merges.txt. Throws
    // Error(bad_input) naming file, key or component.
    static Tokenizer from_file(const std::string& path);
    // The vocabulary in a GGUF file's metadata: BPE, byte-level by a known splitting rule or SentencePiece's.
    static Tokenizer from_gguf(const GgufFile& file);
    // tokenizer.json from memory; `name` begins the messages.
    static Tokenizer from_json(std::string_view json, const std::string& name);
    // Byte-level BPE over GPT-2's words: the piece of each id, of which the first n_special are special
    // tokens, and the two pieces that each merge joins, in their order. Pieces as tokenizer.json spells them.
    static Tokenizer from_pieces(const std::vector<std::string>& pieces, size_t n_special,
                                 std::span<const std::pair<std::string, std::string>> merges);

    // Ids of a text, adding none. Where parse_special is false the spelling of a special token is ordinary
    // text; where it is true it becomes the token. Added tokens that are not special are always recognised.
    // Any bytes are accepted: each maximal invalid UTF-8 subpart is read as U+FFFD. Near-linear time, no
    // recursion.
    std::vector<Token> encode(std::string_view text, bool parse_special = false) const;
    // The ids of encode alone.
    std::vector<int32_t> encode_ids(std::string_view text, bool parse_special = false) const;
    // The ids of all parts as one text: words and merges go across their borders, spellings of added tokens
    // do not.
    std::vector<int32_t> encode_parts(std::span<const TextPart> parts) const;
    // Hugging Face's default encode: special tokens are parsed and the post-processor's template is put
    // around; template tokens have empty ranges at 0 or at text.size().
    std::vector<Token> encode_with_special_tokens(std::string_view text) const;

    // Text of ids as the file's decoder makes it, always valid UTF-8. Ids without a piece give nothing.
    std::string decode(std::span<const int32_t> ids, bool skip_special_tokens) const;
    // The bytes one id stands for, a byte-fallback piece's one byte included; not necessarily whole
    // characters. What the decoder takes off a text's front is still there. Empty for an id without a piece.
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
    friend class StreamDecoder;
    class Passage;
    template <typename Emit>
    void encode_passage(Passage& passage, bool parse_special, Emit&& emit) const;
    template <typename Emit>
    void encode_cut(Passage& passage, bool parse_special, Emit&& emit) const;
    explicit Tokenizer(std::shared_ptr<const Tables> tables) : tables_(std::move(tables)) {}
    std::shared_ptr<const Tables> tables_;
};

// Turns a stream of ids into text as it comes, holding back what later ids may still change: the bytes of a
// character that is not complete yet; with byte fallback a whole run of single-byte tokens, which becomes
// U+FFFD throughout if any part of it is malformed. What push returned so far plus flush equals
// Tokenizer::decode of all ids. One thread at a time.
class StreamDecoder {
  public:
    // continues_text: other ids came before, so nothing falls off the text's front.
    explicit StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens = true, bool continues_text = false);

    // The text that this id completes; often a piece, sometimes nothing.
    std::string push(int32_t id) {
        std::string out;
        push(id, out);
        return out;
    }
    // The same, appended.
    void push(int32_t id, std::string& out);
    // What is still held back, with U+FFFD for what is malformed; afterwards the decoder is as new.
    std::string flush();

  private:
    void emit(std::string_view text, std::string& out);
    void push_byte(char byte, std::string& out);
    void end_run(std::string& out);

    Tokenizer tokenizer_;
    bool skip_special_tokens_;
    bool is_first_ = true;    // no token was taken yet
    size_t n_to_strip_ = 0;   // characters that may still fall off the front
    std::string held_;        // an incomplete character, or a run of bytes
    size_t n_valid_ = 0;      // the part of the run known to be whole characters
    bool is_broken_ = false;  // the run is malformed; nothing of it is held
};

}  // namespace refrag
