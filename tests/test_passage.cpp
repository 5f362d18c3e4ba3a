// Encoded passages: names, what they hold, and that each is cut and encoded once for all who hold it.
#include <doctest/doctest.h>

#include <atomic>
#include <filesystem>
#include <thread>

#include "config_edit.h"
#include "every_backend.h"
#include "golden.h"
#include "refrag/passage_cache.h"
#include "tap_backend.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Fixture : TinyRefrag {
    Arena arena{backend};
};

const char* const kText = "The old mill stands on a hill above the river, and a red lantern hangs over it.";

std::string name_in(const std::string& dir, Device& device) {
    return Model(device, dir).passage_maker(4).hex();
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "passage: content and key are the digests that the design says") {
    const CutPassage cut(model, kText, 4);
    CHECK(cut.content() == sha256(kText));
    const SharedPassage shared(model, kText, 4);
    const std::string parts = std::string(model.passage_maker(4).view()) + std::string(cut.content().view());
    CHECK(shared.key() == sha256(parts));
    CHECK(SharedPassage(model, kText, 4, "someone").key() == sha256(parts + "someone"));
    CHECK(SharedPassage(model, kText, 8).key() != shared.key());
    CHECK(SharedPassage(model, std::string(kText) + " ", 4).key() != shared.key());
    // The model's own chunk length, said or not.
    CHECK(SharedPassage(model, kText).key() == SharedPassage(model, kText, model.config().chunk_len).key());
}

TEST_CASE("passage: whatever makes other embeddings has another name, on every device the same") {
    Device& device = cpu().device();
    const std::string tiny = name_in(tiny_refrag_path(), device);
    CHECK(name_in(tiny_refrag_path(), device) == tiny);
    for (const auto& backend : every_backend()) CHECK(name_in(tiny_refrag_path(), backend->device()) == tiny);
    CHECK(Model(device, tiny_refrag_path(), {}, WeightFormat::int8).passage_maker(4).hex() != tiny);

    const auto changed = [&](const std::string& file, const auto& change) {
        const TempDir dir;
        std::filesystem::copy(tiny_refrag_path(), dir.file("m"), std::filesystem::copy_options::recursive);
        std::string bytes = read_file(dir.file("m/" + file), 1 << 26);
        change(bytes);
        dir.write("m/" + file, bytes);
        return name_in(dir.file("m"), device);
    };
    // One bit of the last weight in the encoder's file; the decoder's weights have no part in it.
    const auto flip_last = [](std::string& bytes) { bytes[bytes.size() - 2] ^= 1; };
    CHECK(changed("encoder/model.safetensors", flip_last) != tiny);
    CHECK(changed("decoder/model.safetensors", flip_last) == tiny);
    CHECK(changed("projector.safetensors", flip_last) == tiny);
    const auto replaced = [](const char* from, const char* to) {
        return [from, to](std::string& bytes) {
            REQUIRE(contains(bytes, from));
            bytes.replace(bytes.find(from), std::string(from).size(), to);
        };
    };
    CHECK(changed("refrag.json", replaced("\"special_tokens\":true", "\"special_tokens\":false")) != tiny);
    CHECK(changed("encoder/config.json", replaced("\"layer_norm_eps\":1e-05", "\"layer_norm_eps\":2e-05")) !=
          tiny);
}

TEST_CASE_FIXTURE(Fixture, "passage: encoded in pieces of any budget it is the same, bit for bit") {
    const CutPassage cut(model, kText, 3);
    std::vector<std::vector<int32_t>> sequences;
    for (const Chunk& chunk : cut.chunks()) sequences.push_back(chunk.encoder_ids);
    const Tensor whole = arena.tensor(std::ssize(sequences), model.d_enc());
    model.encoder().encode(backend, sequences, whole, arena);
    const std::vector<float> expected = download(backend, whole);
    for (const int64_t budget : {1, 6, 11, 1000}) {
        const std::vector<std::shared_ptr<SharedPassage>> passages{
            std::make_shared<SharedPassage>(model, kText, 3), std::make_shared<SharedPassage>(model, "", 3),
            std::make_shared<SharedPassage>(model, "Ships carry barley.", 3)};
        int calls = 0;
        int64_t rows = 0;
        while (!passages[0]->encoded() || !passages[1]->encoded() || !passages[2]->encoded()) {
            const int64_t used = encode_passages(backend, model, passages, budget, arena);
            CHECK(used < budget + 5);  // a chunk has 5 encoder ids at most
            rows += used;
            REQUIRE(++calls < 100);
        }
        CHECK(calls >= rows / (budget + 4));
        CHECK(passages[0]->encoded()->download(backend) == expected);
        CHECK(passages[1]->encoded()->cut()->chunks().empty());
        CHECK(encode_passages(backend, model, passages, budget, arena) == 0);
    }
    // What was kept elsewhere is the same passage again.
    const auto shared_cut = std::make_shared<const CutPassage>(cut);
    const EncodedPassage again(model, shared_cut, sha256("key"), expected);
    CHECK(again.download(backend) == expected);
    CHECK(contains(error_of([&] {
                       const EncodedPassage wrong(model, shared_cut, sha256("key"),
                                                  std::span(expected).first(expected.size() - 1));
                   }),
                   str("expected ", expected.size(), " values")));
}

TEST_CASE_FIXTURE(Fixture,
                  "passage: a window has the text's tokens, wherever its borders lie in a character") {
    const std::string text = "caf\xc3\xa9 \xe6\xb0\xb4\xf0\x9f\x98\x80 and \xff\x80\x80\x80\x80 more of it";
    const std::vector<Token> tokens = model.tokenizer().encode(text);
    // An encoder's own vocabulary reads characters: the tokenizer beside itself.
    const EncoderVocabulary own{&model.tokenizer(), false, 0, 2};
    for (size_t first = 0; first < tokens.size(); ++first) {
        for (size_t n = 1; first + n <= tokens.size(); n += 3) {
            const auto part = std::span(tokens).subspan(first, n);
            const CutPassage window(model, text, part, 2);
            CHECK(window.n_tokens() == n);
            CHECK(window.text() == text.substr(part.front().begin, part.back().end - part.front().begin));
            std::vector<int32_t> ids;
            size_t at = 0;
            for (const Chunk& chunk : window.chunks()) {
                CHECK(chunk.begin == at);
                at = chunk.end;
                ids.insert(ids.end(), chunk.ids.begin(), chunk.ids.end());
            }
            CHECK(at == window.text().size());
            for (size_t i = 0; i < n; ++i) CHECK(ids[i] == part[i].id);
            // Beginning the walk at the window or at the text's start makes no difference.
            const std::vector<Chunk> here = cut_chunks(text, part, 1, own);
            const std::vector<Chunk> whole = cut_chunks(text, tokens, 1, own);
            for (size_t i = 0; i < n; ++i) CHECK(here[i].encoder_ids == whole[first + i].encoder_ids);
        }
    }
    // The same bytes tokenised alone may have other ids: other names.
    const CutPassage window(model, kText, model.tokenizer().encode(kText), 4);
    CHECK(window.content() != CutPassage(model, kText, 4).content());
}

TEST_CASE_FIXTURE(Fixture, "passage cache: one passage a text, the longest unused let go of first") {
    const auto text_of = [](int i) { return str("Passage ", i, " tells of the mill on the hill."); };
    PassageCache cache;
    const auto first = cache.share(model, text_of(0));
    CHECK(cache.share(model, text_of(0)) == first);
    CHECK(cache.share(model, text_of(0), 4) != first);
    CHECK(cache.share(model, text_of(0), 0, "tenant") != first);
    CHECK(cache.size() == 3);
    const uint64_t raw = cache.bytes();
    first->cut(model);
    CHECK(cache.bytes() > raw);
    const uint64_t cut = cache.bytes();
    encode_passages(backend, model, std::span(&first, 1), arena);
    CHECK(cache.bytes() == cut + first->encoded()->chunk_emb().bytes());

    // Room for about three encoded passages.
    uint64_t one = 0;
    {
        PassageCache measure;
        const auto passage = measure.share(model, text_of(1));
        encode_passages(backend, model, std::span(&passage, 1), arena);
        one = measure.bytes();
    }
    PassageCache small(3 * one);
    for (int i = 1; i < 10; ++i) {
        const auto kept = small.share(model, text_of(1));  // used again and again
        const auto passage = small.share(model, text_of(i));
        encode_passages(backend, model, std::span(&passage, 1), arena);
        CHECK(small.bytes() <= 5 * one);
        CHECK(small.share(model, text_of(1)) == kept);
    }
    CHECK(small.size() <= 5);
    CHECK(small.share(model, text_of(1))->encoded());
    CHECK(!small.share(model, text_of(2))->encoded());  // made anew
    // What a request holds outlives the cache.
    std::shared_ptr<SharedPassage> held;
    {
        PassageCache none(0);
        held = none.share(model, text_of(1));
        none.share(model, text_of(2));
        CHECK(none.size() == 1);
    }
    encode_passages(backend, model, std::span(&held, 1), arena);
    CHECK(held->encoded());
}

TEST_CASE_FIXTURE(Fixture, "passage: threads with queues of their own encode it once between them") {
    std::string text;
    for (int i = 0; i < 40; ++i) text += str("Line ", i, " of the long passage. ");
    const auto alone = std::make_shared<SharedPassage>(model, text, 4);
    encode_passages(backend, model, std::span(&alone, 1), arena);
    const std::vector<float> expected = alone->encoded()->download(backend);
    int64_t rows_alone = 0;
    for (const Chunk& chunk : alone->cut(model)->chunks()) rows_alone += std::ssize(chunk.encoder_ids);

    PassageCache cache;
    std::atomic<int64_t> rows{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
        threads.emplace_back([&] {
            const std::unique_ptr<Backend> queue = model.device().make_backend();
            Arena scratch(*queue);
            const auto passage = cache.share(model, text, 4);
            while (!passage->encoded())
                rows += encode_passages(*queue, model, std::span(&passage, 1), 30, scratch);
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(rows == rows_alone);
    CHECK(cache.share(model, text, 4)->encoded()->download(backend) == expected);
}
