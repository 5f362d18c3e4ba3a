// Fills a Tokenizer's tables from files, component by component: each is either understood exactly or refused
// by its name and place. Internal to src/text.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/function_ref.h"
#include "io/json.h"
#include "text/tokenizer.h"
#include "text/tokenizer_tables.h"

namespace refrag {

constexpr uint64_t max_tokenizer_bytes = 256u << 20;
constexpr int64_t max_token_id = (1 << 22) - 1;

// "component: expected X, found Y" for a component that the runtime does not do.
[[noreturn]] void unsupported(const Json& component, std::string_view expected);

// The two pieces that a merge joins.
using MergeHalves = std::pair<std::string_view, std::string_view>;
// The piece of each id, "" for none.
using PieceList = std::vector<std::string>;
// Where something stands in a file, for messages.
using Place = FunctionRef<std::string()>;
// The same of item i.
using ItemPlace = FunctionRef<std::string(size_t)>;

// Everything but vocabulary and merges, where no tokenizer.json says it.
struct TokenizerSteps {
    std::vector<AddedToken> added;
    std::vector<Rewrite> normalizer;
    std::vector<std::variant<Rewrite, Split>> pre_tokenizer;  // before ByteLevel where byte_level
    bool byte_level = false;
    bool byte_fallback = false;
    bool ignore_merges = false;
    bool fuse_unk = false;
    std::string unk_token;  // "" for none
    TokenDecoder decoder;
    std::vector<std::pair<std::string, std::string>> decoder_replaces;  // pattern, content
    std::vector<std::string> template_prefix, template_suffix;          // pieces put around a text
    std::vector<size_t> unused;                                         // ids that no text becomes
};

struct TokenizerLoader {
    using Tables = Tokenizer::Tables;
    explicit TokenizerLoader(Tables& filled) : tables(filled) {}
    Tables& tables;

    // tokenizer.json.
    static Tokenizer load(const Json& root);
    // vocab.json and merges.txt with what may lie beside them, as GPT-2 and RoBERTa were published.
    static Tokenizer load_directory(const std::string& directory);
    // The two kinds of vocabularies in a GGUF file.
    static Tokenizer load_byte_level(const GgufFile& file);
    static Tokenizer load_sentencepiece(const GgufFile& file);
    // Of parts; each place names one of its items in messages.
    static Tokenizer load(const TokenizerSteps& steps, const PieceList& pieces, ItemPlace piece_place,
                          std::span<const MergeHalves> merges, ItemPlace merge_place, Place file);

    // tokenizer_json.cpp: the model and its vocabulary.
    void check_model(const Json& model);
    void read_vocab(const Json& vocab);
    void place(std::string_view piece, int64_t id, Place where);
    void vocabulary_placed(size_t n);
    void read_added_tokens(const Json& list);
    void add_tokens(std::span<const AddedToken> tokens, ItemPlace where);
    void add_token(AddedToken token, Place where);
    void index_pieces();
    void index_symbols(const std::string& unk_token, Place model, Place unk_place);
    void index_merges(std::span<const MergeHalves> merges, ItemPlace where);
    void read_whole_words();
    int32_t vocab_id(std::string_view piece) const;

    // tokenizer_steps.cpp: what happens before and after the model.
    void read_normalizer(const Json& component);
    void read_pre_tokenizer(const Json& component);
    void read_decoder(const Json& component);
    void read_post_processor(const Json& component);
    std::string normalized(std::string_view content) const;
    void index_spelling(size_t id, std::string_view spelling);

    int64_t n_vocab = 0;
    std::vector<bool> in_vocab;  // by id: a piece of the model's own vocabulary
    bool byte_level = false;     // the pre-tokenizer turns bytes into the characters of byte_level.h
    bool byte_fallback = false;
    bool ignore_merges = false;
    double text_growth = 1.0;   // bytes of a text after the steps read so far, for each byte before
    double piece_growth = 1.0;  // the same of a piece in the decoder
    std::vector<int32_t> special_ids;
    std::vector<std::pair<int32_t, std::string>> decoded_as;  // added tokens that the normalizer changes

  private:
    // Counts how much longer `component` may make a text, and refuses a file whose steps together pass the
    // bound: steps that double a text are otherwise a way to ask for all memory with one byte.
    static void grow(const Json& component, double& growth, double factor);
    static void grow_by_replacing(const Json& component, double& growth, std::string_view pattern,
                                  std::string_view content);
    void read_normalizer_step(const Json& component);
    void read_pre_tokenizer_step(const Json& component);
    void read_split(const Json& component);
    void read_decoder_steps(const Json& list);
    void read_template(const Json& component);
    int32_t template_token(const Json& where, std::string_view piece, int64_t id) const;
    void wrap(std::vector<int32_t> before, const std::vector<int32_t>& after);

    std::vector<std::pair<std::string, std::string>> decoder_replaces_;  // TokenizerSteps
};

}  // namespace refrag
