// text/tokenizer against goldens of Hugging Face `tokenizers` (weights_tools/make_golden_tokenizers.py), for
// RoBERTa's vocabulary, ours, and tiny ones with added tokens of every kind; byte spans, decoding, streaming,
// time.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <thread>

#include "io/json.h"
#include "support.h"
#include "text/tokenizer.h"
#include "text/unicode.h"
#include "tokenizer_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr const char* nano_path = "weights_tools/refrag-nano/decoder/tokenizer.json";
constexpr const char* no_data = "REFRAG_TEST_DATA is unset or missing";

Json golden(const std::string& name) {
    return Json::parse_file(repo_path("tests/golden/tokenizers/" + name));
}

std::string fnv_of_ids(const std::vector<int32_t>& ids) {
    return fnv1a(bytes_of_ids(ids));
}

// The three ways to encode, in the goldens' order.
std::vector<Token> encode(const Tokenizer& tokenizer, size_t mode, std::string_view text) {
    return mode == 2 ? tokenizer.encode_with_special_tokens(text) : tokenizer.encode(text, mode == 1);
}

// Compares the ids of hex strings in all three modes; gives the number of strings that differ or do not tile.
size_t n_wrong(const Tokenizer& tokenizer, const Json& strings, const Json& rows) {
    REQUIRE(strings.size() == rows.size());
    size_t wrong = 0;
    for (size_t i = 0; i < strings.size(); ++i) {
        const std::string text = from_hex(strings.at(i).as_string());
        for (size_t mode = 0; mode < 3; ++mode) {
            const Json expected = rows.at(i).at(rows.at(i).at(mode).is_null() ? 0 : mode);
            const std::vector<Token> tokens = encode(tokenizer, mode, text);
            const bool right = ids_of(tokens) == ids_of(expected) &&
                               (tokens.empty() ? text.empty() : tiles(tokens, text.size()));
            if (!right) MESSAGE("string ", i, " mode ", mode, ": ", printable(text));
            wrong += right ? 0 : 1;
        }
    }
    return wrong;
}

void check_vocabulary(const std::string& path, const std::string& golden_name) {
    const Json expected = golden(golden_name);
    REQUIRE_MESSAGE(
        fnv1a(read_file(path, 64u << 20)) == expected.get_string("vocabulary_fnv"), path,
        " is not the vocabulary the goldens were made from: run weights_tools/make_golden_tokenizers.py");
    const Tokenizer tokenizer = Tokenizer::from_file(path);
    CHECK(tokenizer.vocab_size() == expected.get_int("vocab_size"));
    CHECK(n_wrong(tokenizer, golden("strings.json").get("strings"), expected.get("ids")) == 0);

    const Json decoding = expected.get("decoding");
    for (size_t i = 0; i < decoding.size(); ++i) {
        const std::vector<int32_t> ids = ids_of(decoding.at(i).at(0));
        for (const bool skip : {false, true}) {
            const std::string text = from_hex(decoding.at(i).at(skip ? 2 : 1).as_string());
            CHECK(tokenizer.decode(ids, skip) == text);
            StreamDecoder stream(tokenizer, skip);
            std::string streamed;
            for (const int32_t id : ids) {
                streamed += stream.push(id);
                CHECK(is_valid_utf8(streamed));
            }
            CHECK(streamed + stream.flush() == text);
        }
    }
}

// User time of the process in seconds: what a shared machine's other work does not change.
double cpu_seconds() {
    return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
}

}  // namespace

TEST_CASE("tokenizer: our vocabulary, committed strings, all modes; decoding and streaming") {
    check_vocabulary(repo_path(nano_path), "nano.json");
}

TEST_CASE("tokenizer: RoBERTa's vocabulary, committed strings, all modes; decoding and streaming") {
    if (test_data_dir().empty() && skip(no_data)) return;
    check_vocabulary(test_data_dir() + "/tokenizers/roberta-base/tokenizer.json", "roberta.json");
}

TEST_CASE("tokenizer: 60 languages, the UTF-8 demo and malformed UTF-8 with both vocabularies") {
    const std::string data = test_data_dir();
    if (data.empty() && skip(no_data)) return;
    const Tokenizer nano = Tokenizer::from_file(repo_path(nano_path));
    const Tokenizer roberta = Tokenizer::from_file(data + "/tokenizers/roberta-base/tokenizer.json");
    const Json rows = golden("texts.json").get("texts");
    CHECK(rows.size() == 62);
    for (size_t i = 0; i < rows.size(); ++i) {
        const Json row = rows.at(i);
        const std::string text = read_file(path_join(data, row.get_string("file")), 64u << 20);
        CAPTURE(row.get_string("file"));
        REQUIRE(fnv1a(text) == row.get_string("fnv"));
        CHECK(fnv1a(replace_invalid_utf8(text)) == row.get_string("clean_fnv"));
        for (const auto& [name, tokenizer] : {std::pair{"nano", &nano}, std::pair{"roberta", &roberta}}) {
            const Json expected = row.get(name);
            for (size_t mode = 0; mode < 3; ++mode) {
                const Json summary = expected.get(std::vector{"plain", "parsed", "special"}[mode]);
                const std::vector<Token> tokens = encode(*tokenizer, mode, text);
                CHECK(tokens.size() == static_cast<size_t>(summary.at(0).as_int()));
                CHECK(fnv_of_ids(ids_of(tokens)) == summary.at(1).as_string());
                CHECK(tiles(tokens, text.size()));
            }
            std::vector<int32_t> first = tokenizer->encode_ids(text);
            CHECK(tokenizer->decode(first, false) == replace_invalid_utf8(text));
            first.resize(8);
            CHECK(first == ids_of(expected.get("first")));
        }
    }
}

TEST_CASE("tokenizer: added tokens of every kind and every template, in tiny vocabularies") {
    const Json cases = golden("variants.json").get("variants");
    for (size_t i = 0; i < cases.size(); ++i) {
        CAPTURE(i);
        const Tokenizer tokenizer =
            Tokenizer::from_json(cases.at(i).get("tokenizer").as_string(), str("variant ", i));
        CHECK(n_wrong(tokenizer, cases.at(i).get("strings"), cases.at(i).get("ids")) == 0);
    }
}

TEST_CASE("tokenizer: ids 0-3 of our vocabulary never come from text") {
    const std::string path = repo_path(nano_path);
    const Tokenizer tokenizer = Tokenizer::from_file(path);
    const char* specials[] = {"<s>", "<pad>", "</s>", "<unk>"};
    for (int32_t id = 0; id < 4; ++id) {
        CHECK(tokenizer.piece(id) == specials[id]);
        CHECK(tokenizer.id_of(specials[id]) == id);
        CHECK(tokenizer.is_special(id));
        const auto as_text = tokenizer.encode_ids(specials[id]);
        CHECK(as_text.size() > 1);
        CHECK(*std::min_element(as_text.begin(), as_text.end()) > 3);
        CHECK(tokenizer.encode_ids(specials[id], true) == std::vector<int32_t>{id});
    }
    // No merge makes a special token, so no text can reach one.
    const Json model = Json::parse_file(path).get("model");
    const Json merges = model.get("merges");
    for (size_t i = 0; i < merges.size(); ++i) {
        const std::string made = merges.at(i).is_string()
                                     ? std::string(merges.at(i).as_string())
                                     : str(merges.at(i).at(0).as_string(), merges.at(i).at(1).as_string());
        for (const char* special : specials) CHECK(made != special);
    }
}

TEST_CASE("tokenizer: RoBERTa's facts") {
    if (test_data_dir().empty() && skip(no_data)) return;
    const Tokenizer tokenizer =
        Tokenizer::from_file(test_data_dir() + "/tokenizers/roberta-base/tokenizer.json");
    CHECK(tokenizer.vocab_size() == 50265);
    CHECK(tokenizer.adds_bos());
    CHECK(tokenizer.template_prefix()[0] == 0);
    CHECK(tokenizer.template_suffix()[0] == 2);
    CHECK(tokenizer.piece(5) == "\xC4\xA0the");
    CHECK(tokenizer.token_bytes(5) == " the");
    CHECK(tokenizer.piece(50265).empty());
    CHECK(tokenizer.piece(-1).empty());
    CHECK_FALSE(tokenizer.id_of("no such piece").has_value());

    // <mask> takes the white space before it along, and is text where special tokens are not parsed.
    const auto tokens = tokenizer.encode_with_special_tokens("a \n<mask> b");
    CHECK(tokens == std::vector<Token>{{0, 0, 0}, {102, 0, 1}, {50264, 1, 9}, {741, 9, 11}, {2, 11, 11}});
    CHECK(tokenizer.encode("<mask>").size() > 1);
}

TEST_CASE("tokenizer: spans are bytes of the original, also inside characters and around invalid bytes") {
    const Tokenizer tokenizer = Tokenizer::from_file(repo_path(nano_path));
    const std::string text = "caf\xC3\xA9 \xE4\xB8\xAD\xFF\xFE \xF0\x9F\x98 end";
    const auto tokens = tokenizer.encode(text);
    CHECK(tiles(tokens, text.size()));
    std::string joined;
    for (const Token& token : tokens) joined += text.substr(token.begin, token.end - token.begin);
    CHECK(joined == text);
    CHECK(ids_of(tokens) == tokenizer.encode_ids(replace_invalid_utf8(text)));
    CHECK(tokenizer.encode("").empty());
}

TEST_CASE("tokenizer: streaming holds back an incomplete character and nothing else") {
    const Tokenizer tokenizer = Tokenizer::from_file(repo_path(nano_path));
    const auto byte_id = [&](unsigned char byte) {
        for (int32_t id = 0; id < tokenizer.vocab_size(); ++id)
            if (tokenizer.token_bytes(id) == std::string_view(reinterpret_cast<const char*>(&byte), 1))
                return id;
        return -1;
    };
    StreamDecoder stream(tokenizer);
    CHECK(stream.push(byte_id('x')) == "x");
    CHECK(stream.push(byte_id(0xF0)) == "");
    CHECK(stream.push(byte_id(0x9F)) == "");
    CHECK(stream.push(byte_id(0x98)) == "");
    CHECK(stream.push(byte_id(0x82)) == "\xF0\x9F\x98\x82");
    CHECK(stream.push(byte_id(0xE2)) == "");
    CHECK(stream.push(byte_id('y')) == "\xEF\xBF\xBDy");
    CHECK(stream.push(byte_id(0xC3)) == "");
    CHECK(stream.push(2) == "");  // a special token is passed over
    CHECK(stream.push(1'000'000) == "");
    CHECK(stream.flush() == "\xEF\xBF\xBD");
    CHECK(stream.flush() == "");
    StreamDecoder shows(tokenizer, false);
    CHECK(shows.push(2) == "</s>");
}

TEST_CASE("tokenizer: one tokenizer serves several threads") {
    const Tokenizer tokenizer = Tokenizer::from_file(repo_path(nano_path));
    const std::string text = "The same text, read by several threads at once: " + std::string(500, 'z');
    const auto expected = tokenizer.encode(text);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 50; ++i) wrong += tokenizer.encode(text) == expected ? 0 : 1;
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
}

TEST_CASE("tokenizer: time grows with the text, whatever the text") {
    // A quadratic step would make 256 KiB take hours; measured cost is below 0.1 us a byte, so 5 s leaves
    // room for sanitizers and slow machines: a guard against the wrong algorithm, no measure of speed.
    const Tokenizer tokenizer = Tokenizer::from_file(repo_path(nano_path));
    for (const char* unit : {"a", " ", "\n", "!", "0", "'", "ab", "e\xCC\x81", "\xE4\xB8\xAD", "\xFF", "\xC3",
                             "<s>", "<", " \xC2\xA0"}) {
        CAPTURE(printable(unit));
        const auto seconds = [&](size_t n_bytes) {
            std::string text;
            while (text.size() < n_bytes) text += unit;
            const double start = cpu_seconds();
            const auto tokens = tokenizer.encode(text, true);
            CHECK(tiles(tokens, text.size()));
            return cpu_seconds() - start;
        };
        CHECK(seconds(256 << 10) < 5);
    }
    // The same at a size where only a linear walk ends within a minute.
    const std::string text(4 << 20, 'a');
    const double start = cpu_seconds();
    CHECK(tiles(tokenizer.encode(text), text.size()));
    CHECK(cpu_seconds() - start < 60);
}
