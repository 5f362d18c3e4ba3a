// Every step of a tokenizer.json against goldens of Hugging Face `tokenizers`, one small vocabulary a step
// (weights_tools/make_golden_tokenizer_steps.py): normalizers, pre-tokenizers, BPE's modes, added tokens
// around them, decoders whole and streamed. And Unicode's normal forms for all code points.
#include <doctest/doctest.h>

#include <fstream>
#include <sstream>

#include "io/json.h"
#include "support.h"
#include "text/normal_form.h"
#include "text/pre_tokenizer.h"
#include "text/tokenizer.h"
#include "text/unicode.h"
#include "tokenizer_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

std::string normal_form(NormalForm form, const std::string& text) {
    TextEdit edit(text);
    append_normal_form(form, 0, text.size(), edit);
    return edit.text();
}

}  // namespace

TEST_CASE("tokenizer steps: ids in all modes, and spans that tile the text") {
    const Json cases = Json::parse_file(repo_path("tests/golden/tokenizers/steps.json")).get("cases");
    REQUIRE(cases.size() == 38);
    for (size_t i = 0; i < cases.size(); ++i) {
        const Tokenizer tokenizer =
            Tokenizer::from_json(cases.at(i).get_string("tokenizer"), str("case ", i));
        const Json strings = cases.at(i).get("strings");
        const Json rows = cases.at(i).get("ids");
        REQUIRE(strings.size() == rows.size());
        for (size_t j = 0; j < strings.size(); ++j) {
            const std::string text = from_hex(strings.at(j).as_string());
            CAPTURE(i);
            CAPTURE(printable(text));
            for (size_t mode = 0; mode < 3; ++mode) {
                const Json expected = rows.at(j).at(rows.at(j).at(mode).is_null() ? 0 : mode);
                const std::vector<Token> tokens = mode == 2 ? tokenizer.encode_with_special_tokens(text)
                                                            : tokenizer.encode(text, mode == 1);
                CHECK(ids_of(tokens) == ids_of(expected));
                // Where nothing of the text becomes a token, there is nothing to cover it.
                if (mode < 2 ? !tokens.empty() : !tokenizer.encode(text, true).empty())
                    CHECK(tiles(tokens, text.size()));
                if (mode < 2) CHECK(tokenizer.encode_ids(text, mode == 1) == ids_of(expected));
            }
        }
    }
}

TEST_CASE("tokenizer steps: decoding, whole and streamed") {
    const Json cases = Json::parse_file(repo_path("tests/golden/tokenizers/steps.json")).get("cases");
    for (size_t i = 0; i < cases.size(); ++i) {
        const Tokenizer tokenizer =
            Tokenizer::from_json(cases.at(i).get_string("tokenizer"), str("case ", i));
        const Json rows = cases.at(i).get("decoding");
        StreamDecoder streams[] = {StreamDecoder(tokenizer, false), StreamDecoder(tokenizer, true)};
        for (size_t j = 0; j < rows.size(); ++j) {
            CAPTURE(i);
            CAPTURE(j);
            const std::vector<int32_t> ids = ids_of(rows.at(j).at(0));
            for (const bool skip : {false, true}) {
                const std::string expected = from_hex(rows.at(j).at(skip ? 2 : 1).as_string());
                CHECK(tokenizer.decode(ids, skip) == expected);
                StreamDecoder& stream = streams[skip ? 1 : 0];  // as new after each flush
                std::string text;
                for (const int32_t id : ids) {
                    text += stream.push(id);
                    CHECK(expected.starts_with(text));
                    CHECK(is_valid_utf8(text));
                }
                CHECK(text + stream.flush() == expected);
            }
        }
    }
}

TEST_CASE("tokenizer steps: what a piece stands for") {
    const Json cases = Json::parse_file(repo_path("tests/golden/tokenizers/steps.json")).get("cases");
    const Tokenizer llama = Tokenizer::from_json(cases.at(0).get_string("tokenizer"), "llama");
    CHECK(llama.token_bytes(*llama.id_of("<0xE4>")) == "\xE4");
    CHECK(llama.token_bytes(*llama.id_of("\xE2\x96\x81the")) == " the");
    CHECK(llama.piece(*llama.id_of("\xE2\x96\x81the")) == "\xE2\x96\x81the");
    // A run of byte tokens is held back until something else comes: its end decides whether it is text.
    StreamDecoder stream(llama);
    const auto byte = [&](const char* piece) { return *llama.id_of(piece); };
    CHECK(stream.push(byte("<0xE4>")) == "");
    CHECK(stream.push(byte("<0xB8>")) == "");
    CHECK(stream.push(byte("<0xAD>")) == "");
    CHECK(stream.push(*llama.id_of("a")) ==
          "\xE4\xB8\xAD"
          "a");
    CHECK(stream.push(byte("<0x41>")) == "");
    CHECK(stream.push(byte("<0xFF>")) == "\xEF\xBF\xBD\xEF\xBF\xBD");
    CHECK(stream.push(byte("<0x41>")) == "\xEF\xBF\xBD");  // the same run
    CHECK(stream.flush() == "");
}

TEST_CASE("tokenizer steps: places lead back through the normalizer") {
    const Json cases = Json::parse_file(repo_path("tests/golden/tokenizers/steps.json")).get("cases");
    // Prepend and Replace: the prepended character stands for no byte, each space for its one.
    const Tokenizer llama = Tokenizer::from_json(cases.at(0).get_string("tokenizer"), "llama");
    const auto tokens = llama.encode("a  the\xFFhi\xC3\xB1");
    std::string places;
    for (const Token& token : tokens) places += str(token.begin, "-", token.end, " ");
    // " a", two spaces, "the", the unknown U+FFFD that stands for one byte, "hi", a character as two bytes
    CHECK(places == "0-1 1-3 3-6 6-7 7-9 9-10 10-11 ");
}

TEST_CASE("unicode: normal forms of all code points, alone and among marks, are the reference's") {
    // Hugging Face's data are Unicode 9.0's, utf8proc's are later: what came after is made inert, so that no
    // code point differs.
    std::ifstream file(repo_path("tests/golden/tokenizers/normal_forms.txt"));
    REQUIRE(file.good());
    const std::pair<std::string, NormalForm> forms[] = {{"NFC", NormalForm::nfc},
                                                        {"NFD", NormalForm::nfd},
                                                        {"NFKC", NormalForm::nfkc},
                                                        {"NFKD", NormalForm::nfkd}};
    size_t n_blocks = 0;
    std::string line;
    while (std::getline(file, line)) {
        if (line[0] == '#') continue;
        std::istringstream fields(line);
        std::string name;
        std::string hash;
        uint32_t first = 0;
        uint32_t last = 0;
        fields >> name >> std::hex >> first >> last >> hash;
        REQUIRE(fields);
        NormalForm form{};
        for (const auto& [spelling, value] : forms)
            if (spelling == name) form = value;
        std::string bytes;
        for (uint32_t code = first; code <= last; ++code) {
            if (code >= 0xD800 && code < 0xE000) continue;
            std::string c;
            append_utf8(c, static_cast<char32_t>(code));
            for (const std::string& text :
                 {c, "a\xCD\x85" + c + "\xCC\xB4", c + "\xCC\x81", "\xE1\x84\x80" + c + "\xE1\x86\xA8"})
                bytes.append(normal_form(form, text)).push_back('\0');
        }
        CAPTURE(line);
        CHECK(fnv1a(bytes) == hash);
        ++n_blocks;
    }
    CHECK(n_blocks == 4 * 272);
}

TEST_CASE("tokenizer steps: Digits knows the numbers of Unicode 17, which \\p{N} does not") {
    // The list of what differs, as found by trying every code point on the reference.
    Split digits;
    digits.target = Split::Target::digit;
    std::string differing;
    for (char32_t code = 0; code < 0x110000; ++code) {
        if (code >= 0xD800 && code < 0xE000) continue;
        std::string text;
        append_utf8(text, code);
        bool removed = false;
        const size_t end = digits.piece_end(text + "a", 0, removed);
        if ((end == text.size()) != is_number(code) && !(code < 0x80))
            differing += str(" ", std::hex, static_cast<uint32_t>(code));
    }
    CHECK(differing == " 11de0 11de1 11de2 11de3 11de4 11de5 11de6 11de7 11de8 11de9 16ff4 16ff5 16ff6");
}

TEST_CASE("unicode: a long run of marks is ordered in near-linear time") {
    // Alternating classes: an insertion sort would take 10^11 steps for these 600,000 marks.
    std::string text = "a";
    for (int i = 0; i < 300'000; ++i) text += "\xCC\x81\xCC\xA3";  // U+0301 (230), U+0323 (220)
    const std::string form = normal_form(NormalForm::nfc, text);
    // a with dot below, the other dots below, then every acute
    CHECK(form.starts_with("\xE1\xBA\xA1\xCC\xA3\xCC\xA3"));
    CHECK(form.size() == 3 + 2 * (2 * 300'000 - 1));
}

TEST_CASE("tokenizer steps: a text of a megabyte is one word, and ends all the same") {
    // No clock: a quadratic step would make each of these take hours.
    const Json cases = Json::parse_file(repo_path("tests/golden/tokenizers/steps.json")).get("cases");
    for (const size_t i : {size_t{0}, size_t{6}}) {  // Prepend and Replace with bytes; Metaspace
        const Tokenizer tokenizer =
            Tokenizer::from_json(cases.at(i).get_string("tokenizer"), str("case ", i));
        for (const char* unit :
             {"a", " ", "ab ", "the", "\xE4\xB8\xAD", "\xFF", "\xF0\x9F\x98\x82", "<s>", "<m> "}) {
            CAPTURE(printable(unit));
            std::string text;
            while (text.size() < 1'000'000) text += unit;
            const std::vector<Token> tokens = tokenizer.encode(text, true);
            CHECK(tiles(tokens, text.size()));
            CHECK(!tokenizer.decode(ids_of(tokens), false).empty());
        }
    }
}

TEST_CASE("tokenizer steps: a file whose steps multiply a text without bound is refused") {
    // 40 steps that double: 2^40 bytes for one.
    const auto steps = [](const char* step, int n) {
        std::string list;
        for (int i = 0; i < n; ++i) list += std::string(i == 0 ? "" : ",") + step;
        return list;
    };
    const auto file = [](const std::string& normalizer, const std::string& decoder) {
        return R"({"normalizer": {"type": "Sequence", "normalizers": [)" + normalizer +
               R"(]}, "pre_tokenizer": null, "decoder": {"type": "Sequence", "decoders": [)" + decoder +
               R"(, {"type": "Fuse"}]}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})";
    };
    const char* doubles = R"({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"})";
    const char* keeps = R"({"type": "Replace", "pattern": {"String": "_"}, "content": " "})";
    const char* prepends = R"({"type": "Prepend", "prepend": "aaaaaaaaaaaaaaa"})";
    const auto error = [](const std::string& json) {
        return refrag_test::error_of([&] { (void)Tokenizer::from_json(json, "bomb"); });
    };
    CHECK(error(file(steps(doubles, 7), keeps)) == "(no error)");
    CHECK(error(file(steps(doubles, 40), keeps)) ==
          "bomb: key \"normalizer.normalizers[7]\": the steps up to this one may make a text 256 times as "
          "long: "
          "expected at most 128 times");
    CHECK(refrag_test::contains(error(file(steps(prepends, 2), keeps)), "normalizers[1]\": the steps"));
    CHECK(refrag_test::contains(error(file(steps(R"({"type": "NFKD"})", 3), keeps)),
                                "normalizers[2]\": the steps"));
    CHECK(refrag_test::contains(error(file(keeps, steps(doubles, 40))), "decoders[7]\": the steps"));
    CHECK(error(file(keeps, steps(doubles, 7))) == "(no error)");
}

TEST_CASE("tokenizer steps: what a replacement of several characters wrote does not begin the text") {
    const auto ids = [](const std::string& pattern, const std::string& scheme, const std::string& text) {
        const std::string json =
            R"({"version":"1.0","added_tokens":[],"normalizer":{"type":"Replace","pattern":{"String":")" +
            pattern +
            R"("},"content":"x"},"pre_tokenizer":{"type":"Metaspace","replacement":"\u2581","prepend_scheme":")" +
            scheme +
            R"(","split":true},"post_processor":null,"decoder":null,"model":{"type":"BPE","vocab":)"
            R"({"\u2581":0,"x":1,"b":2,"a":3},"merges":[]}})";
        return Tokenizer::from_json(json, "t.json").encode_ids(text);
    };
    using Ids = std::vector<int32_t>;
    CHECK(ids("ab", "first", "abb") == Ids{1, 2});
    CHECK(ids("ab", "first", "bab") == Ids{0, 2, 1});
    CHECK(ids("ab", "always", "abb") == Ids{0, 1, 2});
    // One character keeps its place, however many bytes it has.
    CHECK(ids("a", "first", "ab") == Ids{0, 1, 2});
    CHECK(ids("\u00E9", "first", "\u00E9b") == Ids{0, 1, 2});
}
