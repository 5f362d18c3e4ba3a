// The tokenizers of published models (LLaMA-2 and -3, Qwen2.5 and 3, OLMo-2, RoBERTa) against goldens of
// Hugging Face `tokenizers`: 60 languages, malformed UTF-8, generated strings, decoding, streaming. The
// vocabularies are not part of the repository: `make test` converts them into build/tokenizers
// (weights_tools/convert_tokenizer.py); without them these tests say SKIP.
#include <doctest/doctest.h>

#include "base/sha256.h"
#include "io/json.h"
#include "support.h"
#include "text/tokenizer.h"
#include "text/unicode.h"
#include "tokenizer_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// Where the converted tokenizers are: REFRAG_TEST_TOKENIZERS, or where the Makefile puts them.
std::string tokenizers_dir() {
    const char* value = std::getenv("REFRAG_TEST_TOKENIZERS");
    return value != nullptr ? value : repo_path("build/tokenizers");
}

// The file of a family; "" where the test cannot run.
std::string tokenizer_path(const std::string& family) {
    const std::string path = path_join(path_join(tokenizers_dir(), family), "tokenizer.json");
    return !test_data_dir().empty() && std::ifstream(path).good() ? path : "";
}

Json golden(const std::string& name) {
    return Json::parse_file(repo_path("tests/golden/tokenizers/real/" + name + ".json"));
}

// The texts all families share, in the goldens' order: files of the data folder, whose hash is checked, and
// strings. Empty where a file is not the one the goldens were made from.
std::vector<std::string> shared_texts() {
    const Json rows = golden("texts").get("texts");
    std::vector<std::string> texts;
    for (size_t i = 0; i < rows.size(); ++i) {
        if (rows.at(i).has("hex")) {
            texts.push_back(from_hex(rows.at(i).get_string("hex")));
            continue;
        }
        const std::string file = rows.at(i).get_string("file");
        texts.push_back(read_file(path_join(test_data_dir(), file), 64u << 20));
        REQUIRE_MESSAGE(sha256(texts.back()).hex() == rows.at(i).get_string("sha256"), file,
                        " is not the text the goldens were made from");
    }
    return texts;
}

// The goldens keep the first 64 bits.
std::string short_sha256(std::string_view bytes) {
    return sha256(bytes).hex().substr(0, 16);
}

// Ids as little-endian 32-bit integers.
std::string hash_of(const std::vector<int32_t>& ids) {
    return short_sha256(bytes_of_ids(ids));
}

std::string streamed(const Tokenizer& tokenizer, std::span<const int32_t> ids, bool skip_special) {
    StreamDecoder stream(tokenizer, skip_special);
    std::string text;
    for (const int32_t id : ids) text += stream.push(id);
    return text + stream.flush();
}

// What is wrong with a text's ids, spans, decoding or streaming; "" where nothing is. `row` from element
// `from` on: plain count, hash and first ids, count and hash with special tokens, hash of the decoded text.
std::string fault(const Tokenizer& tokenizer, const std::string& text, const Json& row, size_t from) {
    const auto count = [&](size_t at) { return static_cast<size_t>(row.at(from + at).as_int()); };
    const auto hash = [&](size_t at) { return row.at(from + at).as_string(); };
    const std::vector<Token> plain = tokenizer.encode(text);
    const std::vector<int32_t> ids = ids_of(plain);
    const std::vector<int32_t> expected = ids_of(row.at(from + 2));
    for (size_t i = 0; i < expected.size(); ++i)
        if (i >= ids.size() || ids[i] != expected[i])
            return str("id ", i, ": expected ", expected[i], ", found ", i < ids.size() ? ids[i] : -1);
    if (ids.size() != count(0)) return str("expected ", count(0), " ids, found ", ids.size());
    if (hash_of(ids) != hash(1)) return "ids differ after the first";
    if (!tiles(plain, text.size())) return "spans do not tile the text";
    const std::vector<Token> special = tokenizer.encode_with_special_tokens(text);
    if (special.size() != count(3) || hash_of(ids_of(special)) != hash(4))
        return str("with special tokens: expected ", count(3), " ids, found ", special.size());
    const std::string decoded = tokenizer.decode(ids, false);
    if (short_sha256(decoded) != hash(5)) return "the decoded text differs: " + printable(decoded);
    if (streamed(tokenizer, ids, false) != decoded) return "the streamed text differs from the decoded";
    return "";
}

// A family's vocabulary against its goldens.
void check_family(const std::string& family) {
    const std::string path = tokenizer_path(family);
    if (path.empty() && skip("no REFRAG_TEST_DATA, or no vocabulary in build/tokenizers")) return;
    const Tokenizer tokenizer = Tokenizer::from_file(path);
    const Json expected = golden(family);
    CHECK(tokenizer.vocab_size() == expected.get_int("vocab_size"));
    CHECK(ids_of(tokenizer.encode_with_special_tokens("")) == ids_of(expected.get("template")));

    const std::vector<std::string> texts = shared_texts();
    const Json rows = expected.get("rows");
    REQUIRE(texts.size() == rows.size());
    for (size_t i = 0; i < texts.size(); ++i) {
        CAPTURE(i);
        CAPTURE(printable(texts[i]));
        CHECK(fault(tokenizer, texts[i], rows.at(i), 0) == "");
    }
    const Json own = expected.get("own");
    for (size_t i = 0; i < own.size(); ++i) {
        const std::string text = from_hex(own.at(i).at(0).as_string());
        CAPTURE(printable(text));
        CHECK(fault(tokenizer, text, own.at(i), 1) == "");
    }
    const Json decoding = expected.get("decoding");
    for (size_t i = 0; i < decoding.size(); ++i) {
        const std::vector<int32_t> ids = ids_of(decoding.at(i).at(0));
        for (const bool skip_special : {false, true}) {
            CAPTURE(i);
            const std::string text = tokenizer.decode(ids, skip_special);
            CHECK(short_sha256(text) == decoding.at(i).at(skip_special ? 2 : 1).as_string());
            CHECK(streamed(tokenizer, ids, skip_special) == text);
            CHECK(is_valid_utf8(text));
        }
    }
}

}  // namespace

TEST_CASE("real tokenizers: LLaMA-2, spaces rewritten by a normalizer") {
    check_family("llama2");
}

TEST_CASE("real tokenizers: LLaMA-2, spaces rewritten by Metaspace, as in Mistral's files") {
    check_family("llama2-metaspace");
}

TEST_CASE("real tokenizers: LLaMA-2 as published, with special tokens looked for after the normalizer") {
    check_family("llama2-published");
}

TEST_CASE("real tokenizers: LLaMA-3") {
    check_family("llama3");
}

TEST_CASE("real tokenizers: OLMo-2") {
    check_family("olmo2");
}

TEST_CASE("real tokenizers: Qwen2.5") {
    check_family("qwen2.5");
}

TEST_CASE("real tokenizers: Qwen3") {
    check_family("qwen3");
}

TEST_CASE("real tokenizers: RoBERTa") {
    check_family("roberta-base");
}
