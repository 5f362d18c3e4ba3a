// Fills a Tokenizer's tables from files, component by component: each is either understood exactly or refused
// by its name and place. Internal to src/text.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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
    // The vocabulary and merges apart from the rest; where(i) names merge i in messages. No text becomes one
    // of the ids in `unused`.
    static Tokenizer load(const Json& root, const Json& vocab, std::span<const MergeHalves> merges,
                          const std::function<std::string(size_t)>& where,
                          std::span<const size_t> unused = {});

    // tokenizer_json.cpp: the model and its vocabulary.
    void check_model(const Json& model);
    void read_vocab(const Json& vocab);
    void place(std::string_view piece, int64_t id, const Json& where);
    void read_added_tokens(const Json& list);
    void add_token(AddedToken token, const Json& where);
    void index_pieces();
    void read_symbols(const Json& model);
    void read_merges(std::span<const MergeHalves> merges, const std::function<std::string(size_t)>& where);
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

    std::vector<std::pair<std::string, std::string>> decoder_replaces_;  // pattern, content
};

}  // namespace refrag
