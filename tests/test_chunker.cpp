// Chunks: k tokens each, never across a passage, spans that tile the text, and an encoder text that loses no
// character.
#include <doctest/doctest.h>

#include <string>

#include "base/utf8.h"
#include "refrag/assemble.h"
#include "refrag/chunker.h"
#include "support.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;

namespace {

const Tokenizer& tiny_tokenizer() {
    static const Tokenizer tokenizer =
        Tokenizer::from_file(refrag_test::repo_path("tests/golden/tiny-refrag/decoder/tokenizer.json"));
    return tokenizer;
}

}  // namespace

TEST_CASE("chunks take k tokens each, the last one fewer, and their spans tile the text") {
    const Tokenizer& tokenizer = tiny_tokenizer();
    const std::string text = "Rivers carry the cold water of the hills, caf\xc3\xa9 \xe6\xb0\xb4 to the sea.";
    const std::vector<Token> tokens = tokenizer.encode(text);
    for (const int32_t k : {1, 2, 3, 8, 16, 1000}) {
        const std::vector<Chunk> chunks = cut_chunks(text, tokens, k, {});
        size_t at = 0;
        size_t n_tokens = 0;
        for (size_t i = 0; i < chunks.size(); ++i) {
            CHECK(chunks[i].begin == at);
            at = chunks[i].end;
            const bool last = i + 1 == chunks.size();
            CHECK((last ? chunks[i].ids.size() <= static_cast<size_t>(k)
                        : chunks[i].ids.size() == static_cast<size_t>(k)));
            for (const int32_t id : chunks[i].ids) CHECK(id == tokens[n_tokens++].id);
            // Shared vocabulary: <s> ids </s>.
            REQUIRE(chunks[i].encoder_ids.size() == chunks[i].ids.size() + 2);
            CHECK(chunks[i].encoder_ids.front() == 0);
            CHECK(chunks[i].encoder_ids.back() == 2);
        }
        CHECK(at == text.size());
        CHECK(n_tokens == tokens.size());
    }
    CHECK(cut_chunks("", {}, 16, {}).empty());
    CHECK(contains(error_of([&] { cut_chunks(text, tokens, 0, {}); }), "at least 1 token, found 0"));
}

TEST_CASE("with an own vocabulary every character goes to the chunk of its first byte") {
    const Tokenizer& tokenizer = tiny_tokenizer();
    // Invalid bytes among multi-byte characters: one U+FFFD for each maximal invalid subpart.
    const std::string text = "a\xc3\xa9\xe6\xb0\xb4\xf0\x9f\x98\x80z\xff\xe6\xb0 end";
    const std::vector<Token> tokens = tokenizer.encode(text);
    EncoderVocabulary vocabulary;
    vocabulary.own = &tokenizer;
    vocabulary.special_tokens = false;
    for (const int32_t k : {1, 2, 3, 5}) {
        std::string read;
        for (const Chunk& chunk : cut_chunks(text, tokens, k, vocabulary)) {
            bool placeholder = chunk.encoder_ids.size() == 1 && chunk.encoder_ids[0] == vocabulary.bos_id;
            if (!placeholder) read += tokenizer.decode(chunk.encoder_ids, false);
        }
        CHECK(read == "a\xc3\xa9\xe6\xb0\xb4\xf0\x9f\x98\x80z\xef\xbf\xbd\xef\xbf\xbd end");
    }
}

TEST_CASE("assembly keeps the order and counts positions over the mixed rows") {
    Chunk a;
    a.ids = {10, 11, 12};
    Chunk b;
    b.ids = {20, 21};
    DecoderInput input;
    input.add_token(1);
    input.add_chunk(a, false);
    input.add_chunk(b, true);
    input.add_chunk(a, false);
    input.add_tokens(std::vector<int32_t>{30, 31});
    CHECK(input.source == std::vector<int32_t>{1, -1, 20, 21, -2, 30, 31});
    CHECK(input.row_chunk == std::vector<int32_t>{0, 2});
    CHECK(input.chunk_position == std::vector<int32_t>{1, 2, 4});
    CHECK(input.chunk_n_positions == std::vector<int32_t>{1, 2, 1});
    CHECK(input.plain_tokens == 11);
}
