// Vocabularies in GGUF files: the ids of the tokenizer.json that was published with them, SentencePiece's
// merges out of scores, and a refusal for each thing that such metadata may say and this runtime does not do.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <sstream>

#include "gguf_model.h"
#include "io/gguf.h"
#include "support.h"
#include "text/tokenizer.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const std::string kTiny = "tests/golden/tiny-refrag/decoder/tokenizer.json";
const std::string kSpace = "\xE2\x96\x81";

Tokenizer load(const GgufTestFile& file) {
    const TempDir dir;
    return Tokenizer::from_gguf(GgufFile(dir.write("v.gguf", file.bytes())));
}

std::string refusal(const GgufTestFile& file) {
    const TempDir dir;
    const std::string path = dir.write("v.gguf", file.bytes());
    const std::string message = error_of([&] { Tokenizer::from_gguf(GgufFile(path)); });
    if (message == "(no error)") return message;
    CHECK(message.starts_with(path + ": "));
    CHECK(printable(message, 1000) == message);
    return message.substr(path.size() + 2);
}

std::string refusal(GgufTestFile file, const std::string& key, const std::string& pair) {
    set_pair(file, key, pair);
    return refusal(file);
}

GgufTestFile byte_level(std::string_view pre = "gpt-2") {
    GgufTestFile file;
    file.pairs = gguf_vocabulary_pairs(Json::parse_file(repo_path(kTiny)), pre);
    return file;
}

// <unk>, <s>, </s>, the bytes, and pieces with their scores: characters, and what they merge to.
struct Piece {
    std::string text;
    float score;
    int32_t type = 1;
};
std::vector<Piece> sentence_pieces() {
    std::vector<Piece> pieces = {{"<unk>", 0, 2}, {"<s>", 0, 3}, {"</s>", 0, 3}};
    for (int byte = 0; byte < 256; ++byte) {
        char piece[8];
        std::snprintf(piece, sizeof piece, "<0x%02X>", static_cast<unsigned>(byte));
        pieces.push_back({piece, 0, 6});
    }
    // "bc" goes before "ab", so that "abc" is a + bc; two and three spaces have one score.
    for (const auto& [text, score] :
         std::vector<std::pair<std::string, float>>{{"bc", -1},
                                                    {"ab", -2},
                                                    {"abc", -3},
                                                    {kSpace + "a", -4},
                                                    {kSpace + kSpace, -5},
                                                    {kSpace + kSpace + kSpace, -5},
                                                    {"ca", -6}})
        pieces.push_back({text, score});
    for (const char* text : {"a", "b", "c", "\xE2\x96\x81"}) pieces.push_back({text, -100});
    pieces.push_back({"q", -100, 5});       // unused
    pieces.push_back({"[user]", -100, 4});  // user-defined
    return pieces;
}
GgufTestFile sentencepiece(const std::vector<Piece>& pieces) {
    std::vector<std::string> tokens;
    std::vector<float> scores;
    std::vector<int32_t> types;
    for (const Piece& piece : pieces) {
        tokens.push_back(piece.text);
        scores.push_back(piece.score);
        types.push_back(piece.type);
    }
    GgufTestFile file;
    file.pairs = {
        gguf_string("tokenizer.ggml.model", "llama"),   gguf_text_list("tokenizer.ggml.tokens", tokens),
        gguf_f32_list("tokenizer.ggml.scores", scores), gguf_i32_list("tokenizer.ggml.token_type", types),
        gguf_u32("tokenizer.ggml.bos_token_id", 1),     gguf_u32("tokenizer.ggml.eos_token_id", 2)};
    return file;
}
std::vector<std::string> pieces_of(const Tokenizer& tokenizer, std::string_view text) {
    std::vector<std::string> pieces;
    for (const Token& token : tokenizer.encode(text)) pieces.emplace_back(tokenizer.piece(token.id));
    return pieces;
}

const char* const kHard[] = {"",
                             " ",
                             "  ",
                             "\n",
                             " \n\n  x",
                             "Hello world",
                             "  two  spaces ",
                             "a1b22 333 44444",
                             "don't WE'RE I'll 's 't",
                             "naïve Straße ŒUVRE",
                             "中文 日本語 한국어",
                             "\xF0\x9F\x98\x80\xF0\x9F\x8F\xBD",
                             "x\xff\xc3(y",
                             "<s> </s> <|eot_id|> <|im_end|>",
                             "tab\tand\r\nlines\r\n\r\n",
                             "١٢٣ ५६ ²³ Ⅷ",
                             "e\xCC\x81 \xCC\x81",
                             "  \u00a0\u2003x",
                             "!!!??? ... (a)[b]{c}",
                             "http://a.b/c?d=e&f"};

}  // namespace

TEST_CASE("gguf tokenizer: each splitting rule is that of the published tokenizer.json") {
    // The tiny vocabulary behind the steps of each family, written out as their files have them.
    const std::string digits = R"({"type":"Digits","individual_digits":true},)";
    const auto split = [](const std::string& numbers) {
        return R"({"type":"Split","pattern":{"Regex":"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|)" +
               numbers +
               R"(| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},"behavior":"Isolated","invert":false},)";
    };
    struct Family {
        const char* name;
        std::string steps;
        bool use_regex;
        bool ignore_merges;
        const char* normalizer;
    };
    const Family families[] = {{"gpt-2", "", true, false, "null"},
                               {"smollm", digits, true, false, "null"},
                               {"starcoder", digits, true, false, "null"},
                               {"refact", digits, true, false, "null"},
                               {"llama-bpe", split(R"(\\p{N}{1,3})"), false, true, "null"},
                               {"smaug-bpe", split(R"(\\p{N}{1,3})"), false, true, "null"},
                               {"qwen2", split(R"(\\p{N})"), false, false, R"({"type":"NFC"})"}};
    const std::string json = read_file(repo_path(kTiny), 1 << 20);
    for (const Family& family : families) {
        CAPTURE(family.name);
        std::string text = json;
        const auto replace = [&](const std::string& from, const std::string& to) {
            REQUIRE(contains(text, from));
            text.replace(text.find(from), from.size(), to);
        };
        replace(
            R"("pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true})",
            R"("pre_tokenizer":{"type":"Sequence","pretokenizers":[)" + family.steps +
                R"({"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":)" +
                (family.use_regex ? "true" : "false") + "}]}");
        replace(R"("ignore_merges":false)",
                std::string(R"("ignore_merges":)") + (family.ignore_merges ? "true" : "false"));
        replace(R"("normalizer":null)", std::string(R"("normalizer":)") + family.normalizer);
        const Tokenizer expected = Tokenizer::from_json(text, "expected");
        GgufTestFile file = byte_level(family.name);
        file.pairs.push_back(gguf_bool("tokenizer.ggml.add_bos_token", false));
        const Tokenizer found = load(file);
        CHECK(found.vocab_size() == expected.vocab_size());
        for (const char* hard : kHard) {
            CAPTURE(hard);
            for (const bool special : {false, true})
                CHECK(found.encode(hard, special) == expected.encode(hard, special));
            const std::vector<int32_t> ids = found.encode_ids(hard);
            CHECK(found.decode(ids, true) == expected.decode(ids, true));
        }
    }
}

TEST_CASE("gguf tokenizer: first and last tokens as the file says, or as its kind does") {
    GgufTestFile file = byte_level();
    file.pairs.push_back(gguf_u32("tokenizer.ggml.bos_token_id", 0));
    file.pairs.push_back(gguf_u32("tokenizer.ggml.eos_token_id", 2));
    CHECK(!load(file).adds_bos());
    set_pair(file, "tokenizer.ggml.pre", gguf_string("tokenizer.ggml.pre", "llama-bpe"));
    CHECK(load(file).adds_bos());
    CHECK(load(file).template_prefix()[0] == 0);
    CHECK(load(file).template_suffix().empty());
    set_pair(file, "tokenizer.ggml.add_bos_token", gguf_bool("tokenizer.ggml.add_bos_token", false));
    set_pair(file, "tokenizer.ggml.add_eos_token", gguf_bool("tokenizer.ggml.add_eos_token", true));
    CHECK(!load(file).adds_bos());
    CHECK(load(file).template_suffix()[0] == 2);
    CHECK(contains(refusal(file, "tokenizer.ggml.eos_token_id", gguf_u32("tokenizer.ggml.eos_token_id", 320)),
                   "key \"tokenizer.ggml.eos_token_id\": expected an integer of 0 to 319, found 320"));
    CHECK(load(sentencepiece(sentence_pieces())).template_prefix()[0] == 1);
}

TEST_CASE("gguf tokenizer: SentencePiece's scores give its merges") {
    const Tokenizer tokenizer = load(sentencepiece(sentence_pieces()));
    using Pieces = std::vector<std::string>;
    CHECK(pieces_of(tokenizer, "abc") == Pieces{kSpace, "abc"});  // bc first, then a bc: never "_a"
    CHECK(pieces_of(tokenizer, "ab") == Pieces{kSpace, "ab"});
    CHECK(pieces_of(tokenizer, "a") == Pieces{kSpace + "a"});
    CHECK(pieces_of(tokenizer, "bcabc") == Pieces{kSpace, "bc", "abc"});
    CHECK(pieces_of(tokenizer, "caca") == Pieces{kSpace, "ca", "ca"});
    // Four spaces and the one put before: the run grows from the left.
    CHECK(pieces_of(tokenizer, "    ") == Pieces{kSpace + kSpace + kSpace, kSpace + kSpace});
    // What is no piece is spelled in bytes; an unused one is none.
    CHECK(pieces_of(tokenizer, "b\xC3\xA9q") == Pieces{kSpace, "b", "<0xC3>", "<0xA9>", "<0x71>"});
    CHECK(pieces_of(tokenizer, "a[user]b") == Pieces{kSpace + "a", "[user]", kSpace, "b"});
    for (const char* hard : kHard) {
        CAPTURE(hard);
        std::string valid = hard;
        if (contains(valid, "\xff")) continue;
        CHECK(tokenizer.decode(tokenizer.encode_ids(hard), true) == valid);
    }
    GgufTestFile bare = sentencepiece(sentence_pieces());
    bare.pairs.push_back(gguf_bool("tokenizer.ggml.add_space_prefix", false));
    CHECK(pieces_of(load(bare), "abc") == Pieces{"abc"});
    CHECK(load(bare).decode(load(bare).encode_ids(" a"), true) == " a");
}

TEST_CASE("gguf tokenizer: published vocabularies, written as GGUF, keep their ids") {
    const auto published = [](const std::string& family) {
        const std::string path = repo_path("build/tokenizers/" + family + "/tokenizer.json");
        if (!test_data_dir().empty() && is_file(path)) return path;
        skip(("no build/tokenizers/" + family).c_str());
        return std::string();
    };
    for (const auto& [family, pre] :
         {std::pair<std::string, std::string>{"llama3", "llama-bpe"}, {"qwen2.5", "qwen2"}}) {
        const std::string path = published(family);
        if (path.empty()) return;
        CAPTURE(family);
        GgufTestFile file;
        file.pairs = gguf_vocabulary_pairs(Json::parse_file(path), pre);
        file.pairs.push_back(gguf_bool("tokenizer.ggml.add_bos_token", false));
        const Tokenizer expected = Tokenizer::from_file(path), found = load(file);
        for (const char* hard : kHard) {
            CAPTURE(hard);
            for (const bool special : {false, true})
                CHECK(found.encode(hard, special) == expected.encode(hard, special));
        }
    }
    // LLaMA 2: the score of a piece is its place among the merges, as in its tokenizer.model.
    const std::string path = published("llama2");
    if (path.empty()) return;
    const Json json = Json::parse_file(path);
    const Json vocab = json.get("model").get("vocab"), merges = json.get("model").get("merges");
    std::vector<Piece> pieces(vocab.size());
    for (size_t i = 0; i < vocab.size(); ++i)
        pieces[static_cast<size_t>(vocab.at(i).as_int())] = {std::string(vocab.key_at(i)), -1e6f};
    for (size_t id = 0; id < 259; ++id) pieces[id].type = id == 0 ? 2 : id < 3 ? 3 : 6;
    for (size_t id = 259; id < pieces.size(); ++id) pieces[id].score = -static_cast<float>(id - 259);
    // The runs of spaces share one there, the lowest.
    for (Piece& piece : pieces) {
        const bool is_run = piece.text.size() > kSpace.size() && piece.text.size() % kSpace.size() == 0 &&
                            piece.text.find_first_not_of(kSpace) == std::string::npos;
        if (is_run) piece.score = -1e9f;
    }
    const Tokenizer expected = Tokenizer::from_file(path);
    const Tokenizer found = load(sentencepiece(pieces));
    for (const char* hard : kHard) {
        CAPTURE(hard);
        for (const bool special : {false, true})
            CHECK(found.encode(hard, special) == expected.encode(hard, special));
    }
}

TEST_CASE("gguf tokenizer: vocabularies that llama.cpp tests itself with give the ids that it expects") {
    const char* const dir = std::getenv("REFRAG_GGUF_VOCABULARIES");
    if (dir == nullptr && skip("REFRAG_GGUF_VOCABULARIES names no folder")) return;
    // NAME.gguf.inp: texts with a line between; NAME.gguf.out: a line of ids for each, of the published
    // tokenizer.
    const std::string between = "\n__ggml_vocab_test__\n";
    for (const char* name : {"llama-bpe", "llama-spm", "phi-3", "gpt-2", "qwen2", "starcoder", "refact"}) {
        CAPTURE(name);
        const std::string path = path_join(dir, std::string("ggml-vocab-") + name + ".gguf");
        const GgufFile file(path);
        const Tokenizer tokenizer = Tokenizer::from_gguf(file);
        const std::string texts = read_file(path + ".inp", 1 << 20),
                          lines = read_file(path + ".out", 1 << 20);
        size_t at = 0, line = 0, n_texts = 0;
        while (at <= texts.size()) {
            const size_t end = std::min(texts.find(between, at), texts.size());
            const std::string text = texts.substr(at, end - at);
            at = end + between.size();
            const size_t line_end = std::min(lines.find('\n', line), lines.size());
            std::istringstream numbers(lines.substr(line, line_end - line));
            line = line_end + 1;
            std::vector<int32_t> expected;
            for (int32_t id = 0; numbers >> id;) expected.push_back(id);
            CAPTURE(text);
            CHECK(tokenizer.encode_ids(text, true) == expected);
            ++n_texts;
        }
        CHECK(n_texts >= 40);
    }
}

TEST_CASE("gguf tokenizer: what the metadata may say and is not done is refused by name") {
    const GgufTestFile bytes = byte_level();
    CHECK(refusal(bytes) == "(no error)");
    CHECK(refusal(bytes, "tokenizer.ggml.model", gguf_string("tokenizer.ggml.model", "bert")) ==
          "key \"tokenizer.ggml.model\": expected \"gpt2\" or \"llama\" (byte-level BPE or SentencePiece's), "
          "found "
          "\"bert\"");
    for (const std::string& pre : {gguf_string("tokenizer.ggml.pre", "viking"), std::string()}) {
        const std::string said = refusal(bytes, "tokenizer.ggml.pre", pre);
        CHECK(contains(said, "key \"tokenizer.ggml.pre\": expected one of \"gpt-2\", \"smollm\""));
        CHECK(contains(said, pre.empty() ? "found none" : "found \"viking\""));
    }
    CHECK(contains(refusal(bytes, "tokenizer.ggml.merges", ""), "expected a list of texts, found none"));
    for (const char* line : {"ab", "a b c", ""})
        CHECK(contains(
            refusal(bytes, "tokenizer.ggml.merges", gguf_text_list("tokenizer.ggml.merges", {"h e", line})),
            "key \"tokenizer.ggml.merges\": item 1: expected two pieces with a space between"));
    CHECK(contains(
        refusal(bytes, "tokenizer.ggml.merges", gguf_text_list("tokenizer.ggml.merges", {"h \xC3\x9F"})),
        "key \"tokenizer.ggml.merges\": item 0: merges need "));
    const auto tokens = [&](const std::vector<std::string>& list) {
        GgufTestFile file = bytes;
        set_pair(file, "tokenizer.ggml.token_type", "");
        return refusal(file, "tokenizer.ggml.tokens", gguf_text_list("tokenizer.ggml.tokens", list));
    };
    CHECK(contains(tokens({}), "key \"tokenizer.ggml.tokens\": expected 1 to"));
    CHECK(contains(tokens({"a", "b", "a"}),
                   "key \"tokenizer.ggml.tokens\": item 2: the token \"a\" stands there twice"));
    CHECK(contains(tokens({"a", ""}), "item 1: expected a text in UTF-8, found an empty one"));
    CHECK(contains(tokens({"\xff"}), "item 0: expected a text in UTF-8, found \"\\xff\""));
    CHECK(contains(
        refusal(bytes, "tokenizer.ggml.token_type", gguf_i32_list("tokenizer.ggml.token_type", {1, 1})),
        "expected one for each of the 320 tokens"));
    CHECK(contains(refusal(bytes, "tokenizer.ggml.token_type",
                           gguf_i32_list("tokenizer.ggml.token_type", std::vector<int32_t>(320, 7))),
                   "item 0: expected a type of 1 to 6, found 7"));

    const auto changed = [&](const auto& change) {
        std::vector<Piece> pieces = sentence_pieces();
        change(pieces);
        return refusal(sentencepiece(pieces));
    };
    CHECK(changed([](auto&) {}) == "(no error)");
    CHECK(changed([](auto& pieces) { pieces[259].score = -2; }) ==
          "key \"tokenizer.ggml.scores\": item 260: expected a score of its own for each piece, found -2 for "
          "\"bc\" "
          "and \"ab\"");
    CHECK(contains(changed([](auto& pieces) { pieces[259].score = NAN; }),
                   "item 259: expected a finite score"));
    CHECK(contains(changed([](auto& pieces) {
                       pieces.push_back({"ax", -9});
                   }),
                   "the piece \"ax\" needs \"x\", which is no piece"));
    CHECK(contains(changed([](auto& pieces) {
                       pieces.push_back({std::string(257, 'a'), -9});
                   }),
                   "expected a piece of at most 256 characters, found 257"));
    CHECK(contains(changed([](auto& pieces) { pieces[100].type = 5; }),
                   "expected a piece <0x61> of the type of bytes"));
    CHECK(contains(changed([](auto& pieces) { pieces[0].type = 3; }),
                   "expected one token of the type of unknown ones"));
    CHECK(contains(changed([](auto& pieces) { pieces[1].type = 2; }),
                   "expected one token of the type of unknown ones"));
    // Converters of old gave paddings that type as well, and named the one.
    std::vector<Piece> padded = sentence_pieces();
    padded.push_back({"[PAD1]", -1000, 2});
    CHECK(contains(refusal(sentencepiece(padded)), "or tokenizer.ggml.unknown_token_id"));
    CHECK(refusal(sentencepiece(padded), "tokenizer.ggml.unknown_token_id",
                  gguf_u32("tokenizer.ggml.unknown_token_id", 0)) == "(no error)");
    const GgufTestFile pieces = sentencepiece(sentence_pieces());
    CHECK(contains(refusal(pieces, "tokenizer.ggml.scores", ""),
                   "key \"tokenizer.ggml.scores\": expected one for each"));
    CHECK(contains(refusal(pieces, "tokenizer.ggml.remove_extra_whitespaces",
                           gguf_bool("tokenizer.ggml.remove_extra_whitespaces", true)),
                   "expected false, found true"));
    CHECK(contains(refusal(pieces, "tokenizer.ggml.precompiled_charsmap",
                           gguf_i32_list("tokenizer.ggml.precompiled_charsmap", {1})),
                   "expected none (not supported)"));
    CHECK(
        contains(refusal(pieces, "tokenizer.ggml.bos_token_id", ""), "key \"tokenizer.ggml.bos_token_id\""));
}
