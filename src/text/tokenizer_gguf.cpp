// A GGUF file's vocabulary. "gpt2" is byte-level BPE with its merges, where the splitting rule is a name;
// "llama" is SentencePiece's BPE, which has a score for each piece and no merges. What tokenizer.json would
// say beside them is written down here.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <unordered_set>

#include "base/check.h"
#include "base/utf8.h"
#include "io/file.h"
#include "io/gguf.h"
#include "text/tokenizer_loader.h"

namespace refrag {
namespace {

constexpr const char* kModel = "tokenizer.ggml.model";
constexpr const char* kPre = "tokenizer.ggml.pre";
constexpr const char* kTokens = "tokenizer.ggml.tokens";
constexpr const char* kTypes = "tokenizer.ggml.token_type";
constexpr const char* kMerges = "tokenizer.ggml.merges";
constexpr const char* kScores = "tokenizer.ggml.scores";
constexpr std::string_view kSpace = "\xE2\x96\x81";  // how SentencePiece spells a space
constexpr size_t kMaxPieceCharacters = 256;

enum TokenType : int64_t { normal = 1, unknown, control, user_defined, unused, byte };

// What stands behind a name of tokenizer.ggml.pre in the tokenizer.json that was published with such models.
struct SplittingRule {
    const char* name;
    WordPattern words;
    bool is_nfc;       // the text is brought to NFC first
    bool digits;       // every digit alone, before the words
    bool whole_words;  // a word that is a token is one, whatever the merges say
    bool adds_bos;     // where the file does not say
};
constexpr std::array<SplittingRule, 9> kRules = {{
    {"gpt-2", WordPattern::gpt2, false, false, false, false},
    {"smollm", WordPattern::gpt2, false, true, false, false},
    {"starcoder", WordPattern::gpt2, false, true, false, false},
    {"refact", WordPattern::gpt2, false, true, false, false},
    {"llama-bpe", WordPattern::cl100k, false, false, true, true},
    {"llama3", WordPattern::cl100k, false, false, true, true},
    {"llama-v3", WordPattern::cl100k, false, false, true, true},
    {"smaug-bpe", WordPattern::cl100k, false, false, true, false},
    {"qwen2", WordPattern::qwen2, true, false, false, false},
}};

const SplittingRule& find_rule(const GgufFile& file) {
    std::string names;
    for (const SplittingRule& rule : kRules) {
        if (file.has(kPre) && file.text(kPre) == rule.name) return rule;
        names += str(names.empty() ? "\"" : "\", \"", rule.name);
    }
    file.refuse(kPre, str("one of ", names, "\" (how text is split before its merges)"));
}

bool truth_or(const GgufFile& file, const char* key, bool fallback) {
    return file.has(key) ? file.truth(key) : fallback;
}

std::string item_of(const GgufFile& file, const char* key, size_t item) {
    return str(printable(file.path()), ": key \"", key, "\": item ", item);
}

bool is_utf8(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = decode_utf8(text, at);
        if (!step.valid) return false;
        at += step.bytes;
    }
    return true;
}

// Tokens with their types, checked.
struct Vocabulary {
    explicit Vocabulary(const GgufFile& file) : tokens(file.texts(kTokens)) {
        if (tokens.empty() || tokens.size() > static_cast<size_t>(max_token_id))
            file.refuse(kTokens, str("1 to ", max_token_id, " tokens"));
        types.assign(tokens.size(), normal);
        if (file.has(kTypes)) types = file.integers(kTypes);
        if (types.size() != tokens.size())
            file.refuse(kTypes, str("one for each of the ", tokens.size(), " tokens"));
        std::unordered_set<std::string_view> seen;
        for (size_t id = 0; id < tokens.size(); ++id) {
            const std::string& token = tokens[id];
            if (types[id] < normal || types[id] > byte)
                fail(Status::bad_input, item_of(file, kTypes, id), ": expected a type of 1 to 6, found ",
                     types[id]);
            if (token.empty() || !is_utf8(token))
                fail(Status::bad_input, item_of(file, kTokens, id), ": expected a text in UTF-8, found ",
                     token.empty() ? "an empty one" : str("\"", printable(token, 60), "\""));
            if (!seen.insert(token).second)
                fail(Status::bad_input, item_of(file, kTokens, id), ": the token \"", printable(token, 60),
                     "\" stands there twice");
        }
    }
    std::vector<size_t> unused_ids() const {
        std::vector<size_t> ids;
        for (size_t id = 0; id < types.size(); ++id)
            if (types[id] == unused) ids.push_back(id);
        return ids;
    }
    std::vector<AddedToken> added_tokens() const {
        std::vector<AddedToken> added;
        for (size_t id = 0; id < tokens.size(); ++id) {
            if (types[id] != unknown && types[id] != control && types[id] != user_defined) continue;
            AddedToken& token = added.emplace_back();
            token.id = static_cast<int32_t>(id);
            token.content = tokens[id];
            token.special = types[id] != user_defined;
        }
        return added;
    }

    const std::vector<std::string>& tokens;
    std::vector<int64_t> types;
};

// What both kinds of vocabularies say alike.
TokenizerSteps common_steps(const GgufFile& file, const Vocabulary& vocabulary, bool adds_bos) {
    const auto token = [&](const char* key) {
        const int64_t id = file.integer(key, 0, static_cast<int64_t>(vocabulary.tokens.size()) - 1);
        return vocabulary.tokens[static_cast<size_t>(id)];
    };
    TokenizerSteps steps;
    steps.added = vocabulary.added_tokens();
    steps.unused = vocabulary.unused_ids();
    if (truth_or(file, "tokenizer.ggml.add_bos_token", adds_bos))
        steps.template_prefix = {token("tokenizer.ggml.bos_token_id")};
    if (truth_or(file, "tokenizer.ggml.add_eos_token", false))
        steps.template_suffix = {token("tokenizer.ggml.eos_token_id")};
    return steps;
}

// ---- SentencePiece

// Piece -> rank, the highest score first, of the pieces that text is merged to.
//
// Of pairs with one score SentencePiece joins the leftmost, which an order of pairs can only say for the runs
// of one character in all lengths up to some longest (LLaMA 2's spaces): there, longest first makes one run
// grow from the left.
std::unordered_map<std::string_view, size_t> ranks_of(const GgufFile& file, const Vocabulary& vocabulary) {
    const std::optional<std::vector<double>> scores = file.reals_if_any(kScores);
    if (!scores || scores->size() != vocabulary.tokens.size())
        file.refuse(kScores, str("one for each of the ", vocabulary.tokens.size(), " tokens"));
    const auto characters = [](std::string_view piece) {
        return std::count_if(piece.begin(), piece.end(), [](char c) { return (c & 0xC0) != 0x80; });
    };
    std::unordered_set<std::string_view> known;
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
        const std::string& token = vocabulary.tokens[id];
        if (vocabulary.types[id] == normal && characters(token) == 1) known.insert(token);
    }
    std::vector<size_t> order;
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
        const std::string& token = vocabulary.tokens[id];
        if (vocabulary.types[id] != normal || characters(token) == 1) continue;
        if (!std::isfinite((*scores)[id]))
            fail(Status::bad_input, item_of(file, kScores, id), ": expected a finite score, found ",
                 (*scores)[id]);
        if (static_cast<size_t>(characters(token)) > kMaxPieceCharacters)
            fail(Status::bad_input, item_of(file, kTokens, id), ": expected a piece of at most ",
                 kMaxPieceCharacters, " characters, found ", characters(token));
        for (size_t at = 0; at < token.size();) {
            const size_t bytes = decode_utf8(token, at).bytes;
            const std::string_view character = std::string_view(token).substr(at, bytes);
            if (!known.contains(character))
                fail(Status::bad_input, item_of(file, kTokens, id), ": the piece \"", printable(token, 60),
                     "\" needs \"", printable(character), "\", which is no piece");
            at += bytes;
        }
        order.push_back(id);
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        if ((*scores)[a] != (*scores)[b]) return (*scores)[a] > (*scores)[b];
        return characters(vocabulary.tokens[a]) > characters(vocabulary.tokens[b]);
    });
    std::unordered_map<std::string_view, size_t> ranks;
    for (size_t begin = 0; begin < order.size();) {
        size_t end = begin;
        while (end < order.size() && (*scores)[order[end]] == (*scores)[order[begin]]) ++end;
        // Lengths n, n - 1, ..., 2 of one character.
        const std::string& longest = vocabulary.tokens[order[begin]];
        const std::string_view first = std::string_view(longest).substr(0, decode_utf8(longest, 0).bytes);
        bool is_run = end - begin == static_cast<size_t>(characters(longest)) - 1;
        for (size_t i = begin; i < end; ++i) {
            const std::string& token = vocabulary.tokens[order[i]];
            for (size_t at = 0; at < token.size(); at += first.size())
                is_run = is_run && std::string_view(token).substr(at, first.size()) == first;
        }
        if (end - begin > 1 && !is_run)
            fail(Status::bad_input, item_of(file, kScores, order[begin + 1]),
                 ": expected a score of its own for each piece, found ", (*scores)[order[begin]], " for \"",
                 printable(vocabulary.tokens[order[begin]], 60), "\" and \"",
                 printable(vocabulary.tokens[order[begin + 1]], 60), "\"");
        for (; begin < end; ++begin) ranks.emplace(vocabulary.tokens[order[begin]], ranks.size());
    }
    return ranks;
}

// The pair that makes each piece, in the order of ranks. A piece is tokenised alone by SentencePiece's rule,
// the best rank first and the leftmost of equals; its last two parts are its pair. One pair a piece is
// enough: were two parts joined to it inside a longer text, nothing would have crossed their borders before,
// so that inside them everything went as in the piece alone. A piece that the rule does not reach has no
// pair.
std::vector<MergeHalves> merges_of(const std::unordered_map<std::string_view, size_t>& ranks) {
    std::vector<MergeHalves> merges(ranks.size());
    std::vector<std::string_view> parts;
    for (const auto& [piece, own] : ranks) {
        parts.clear();
        for (size_t at = 0; at < piece.size(); at += parts.back().size())
            parts.push_back(piece.substr(at, decode_utf8(piece, at).bytes));
        while (parts.size() > 2) {
            size_t best = ranks.size(), place = 0;
            for (size_t i = 0; i + 1 < parts.size(); ++i) {
                const auto found = ranks.find({parts[i].data(), parts[i].size() + parts[i + 1].size()});
                if (found == ranks.end() || found->second >= best) continue;
                best = found->second;
                place = i;
            }
            if (best == ranks.size()) break;
            parts[place] = {parts[place].data(), parts[place].size() + parts[place + 1].size()};
            parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(place) + 1);
        }
        if (parts.size() == 2) merges[own] = {parts[0], parts[1]};
    }
    std::erase_if(merges, [](const MergeHalves& pair) { return pair.first.empty(); });
    return merges;
}

// Whether pieces spell single bytes: all 256 then.
bool has_bytes(const GgufFile& file, const Vocabulary& vocabulary) {
    const auto n = std::count(vocabulary.types.begin(), vocabulary.types.end(), byte);
    if (n == 0) return false;
    std::unordered_set<std::string_view> bytes;
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id)
        if (vocabulary.types[id] == byte) bytes.insert(vocabulary.tokens[id]);
    for (int value = 0; value < 256; ++value) {
        std::array<char, 8> piece{};
        std::snprintf(piece.data(), piece.size(), "<0x%02X>", static_cast<unsigned>(value));
        if (!bytes.contains(piece.data()))
            file.refuse(kTokens, str("a piece ", piece.data(), " of the type of bytes, as there are others"));
    }
    return true;
}

// What stands for text that has no piece: the token that the file names, or the only one of that type.
size_t unknown_id(const GgufFile& file, const Vocabulary& vocabulary) {
    constexpr const char* key = "tokenizer.ggml.unknown_token_id";
    if (file.has(key)) {
        return static_cast<size_t>(file.integer(key, 0, static_cast<int64_t>(vocabulary.tokens.size()) - 1));
    }
    const auto& types = vocabulary.types;
    const auto found = std::find(types.begin(), types.end(), unknown);
    if (found == types.end() || std::find(found + 1, types.end(), unknown) != types.end())
        file.refuse(kTypes, str("one token of the type of unknown ones, 2, or ", key));
    return static_cast<size_t>(found - types.begin());
}

}  // namespace

Tokenizer TokenizerLoader::load_sentencepiece(const GgufFile& file) {
    const Vocabulary vocabulary(file);
    if (truth_or(file, "tokenizer.ggml.remove_extra_whitespaces", false))
        file.refuse("tokenizer.ggml.remove_extra_whitespaces", "false");
    constexpr const char* map = "tokenizer.ggml.precompiled_charsmap";
    if (file.has(map) && !file.integers(map).empty()) file.refuse(map, "none (not supported)");
    const std::unordered_map<std::string_view, size_t> ranks = ranks_of(file, vocabulary);
    TokenizerSteps steps = common_steps(file, vocabulary, true);
    steps.fuse_unk = true;
    steps.byte_fallback = has_bytes(file, vocabulary);
    steps.decoder.byte_fallback = true;
    steps.unk_token = vocabulary.tokens[unknown_id(file, vocabulary)];
    Rewrite spaces{Rewrite::Kind::replace};
    spaces.pattern = " ";
    spaces.content = kSpace;
    if (truth_or(file, "tokenizer.ggml.add_space_prefix", true)) {
        Rewrite prefix{Rewrite::Kind::prepend};
        prefix.content = kSpace;
        steps.normalizer.push_back(prefix);
        steps.decoder.strip = " ";
        steps.decoder.n_strip = 1;
    }
    steps.normalizer.push_back(spaces);
    steps.decoder_replaces = {{std::string(kSpace), " "}};
    return load(
        steps, vocabulary.tokens, [&](size_t id) { return item_of(file, kTokens, id); }, merges_of(ranks),
        [&](size_t) { return str(printable(file.path()), ": key \"", kScores, "\""); },
        [&] { return printable(file.path()); });
}

Tokenizer TokenizerLoader::load_byte_level(const GgufFile& file) {
    const SplittingRule& rule = find_rule(file);
    const Vocabulary vocabulary(file);
    const std::vector<std::string>& lines = file.texts(kMerges);
    std::vector<MergeHalves> merges;
    for (size_t i = 0; i < lines.size(); ++i) {
        const std::string_view line = lines[i];
        const size_t space = line.find(' ');
        if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos)
            fail(Status::bad_input, item_of(file, kMerges, i),
                 ": expected two pieces with a space between, found \"", printable(line, 60), "\"");
        merges.emplace_back(line.substr(0, space), line.substr(space + 1));
    }
    TokenizerSteps steps = common_steps(file, vocabulary, rule.adds_bos);
    steps.byte_level = steps.decoder.byte_level = true;
    steps.ignore_merges = rule.whole_words;
    if (rule.is_nfc) steps.normalizer.emplace_back();
    Split step;
    if (rule.digits) {
        step.target = Split::Target::digit;
        steps.pre_tokenizer.emplace_back(step);
        step.target = Split::Target::words;
    }
    step.pattern = rule.words;
    steps.pre_tokenizer.emplace_back(step);
    return load(
        steps, vocabulary.tokens, [&](size_t id) { return item_of(file, kTokens, id); }, merges,
        [&](size_t i) { return item_of(file, kMerges, i); }, [&] { return printable(file.path()); });
}

Tokenizer Tokenizer::from_gguf(const GgufFile& file) {
    const std::string& model = file.text(kModel);
    if (model == "gpt2") return TokenizerLoader::load_byte_level(file);
    if (model == "llama") return TokenizerLoader::load_sentencepiece(file);
    file.refuse(kModel, "\"gpt2\" or \"llama\" (byte-level BPE or SentencePiece's)");
}

}  // namespace refrag
