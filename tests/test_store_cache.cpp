// Passage records, and the cache that keeps them between processes: kept = fresh bit for bit, whatever is
// torn, changed or another's is a miss, what is beyond the size goes, and a cache that fails takes nothing
// with it.
#include <doctest/doctest.h>

#include <filesystem>
#include <random>

#include "every_backend.h"
#include "golden.h"
#include "refrag/passage_cache.h"
#include "refrag/passage_record.h"
#include "refrag/session.h"
#include "store/record_cache.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const char* const kText = "The old mill stands on a hill above the river, and a red lantern hangs over it.";

struct Fixture : TinyRefrag {
    Arena arena{backend};

    std::string record_of(const std::string& text, EmbeddingForm form) {
        const CutPassage cut(model, text, 4);
        const std::vector<float> values = encode(text);
        return passage_record(cut, name_of(text, form), form, values, model.d_enc());
    }
    Sha256Digest name_of(const std::string& text, EmbeddingForm form) const {
        return passage_key(model.passage_maker(4, form), sha256(text));
    }
    // As the encoder gives them.
    std::vector<float> encode(const std::string& text) {
        const auto passage = std::make_shared<SharedPassage>(model, text, 4);
        encode_passages(backend, model, std::vector{passage}, arena);
        return passage->encoded()->download(backend);
    }
    std::vector<float> embeddings(SharedPassage& passage) {
        REQUIRE(passage.encoded());
        return passage.encoded()->download(backend);
    }
    PassageRecord read(std::string_view record, const Sha256Digest& key, const std::string& text = kText) {
        return read_passage_record(record, key, text, model.tokenizer().vocab_size());
    }
};

std::string wrong_digest_mended(std::string record) {
    record.resize(record.size() - 32);
    return record + std::string(sha256(record).view());
}

}  // namespace

TEST_CASE("embedding forms: rounding is packing and unpacking, within half a step") {
    const std::vector<float> values = {1.0f, -0.3f, 0.0f, 1e-3f, 100.0f, -99.0f, 0.5f, 2.0f};
    for (const EmbeddingForm form : {EmbeddingForm::f32, EmbeddingForm::bf16, EmbeddingForm::int8}) {
        CAPTURE(embedding_form_name(form));
        std::string bytes;
        pack_embeddings(form, values, 4, bytes);
        CHECK(bytes.size() == 2 * embedding_row_bytes(form, 4));
        std::vector<float> back(values.size());
        unpack_embeddings(form, bytes, 4, back);
        std::vector<float> rounded = values;
        round_embeddings(form, rounded, 4);
        CHECK(rounded == back);
        round_embeddings(form, rounded, 4);
        CHECK(rounded == back);  // nothing moves a second time
        for (size_t i = 0; i < values.size(); ++i) {
            const float largest = i < 4 ? 1.0f : 100.0f;
            const float bound = form == EmbeddingForm::f32    ? 0.0f
                                : form == EmbeddingForm::bf16 ? std::abs(values[i]) * 0x1p-8f
                                                              : largest / 127.0f * 0.5f * (1 + 0x1p-20f);
            CHECK(std::abs(back[i] - values[i]) <= bound);
        }
    }
    CHECK(parse_embedding_form("--x", "int8") == EmbeddingForm::int8);
    CHECK(error_of([] { parse_embedding_form("--x", "fp8"); }) ==
          "--x: expected one of f32, bf16, int8, found \"fp8\"");
    // A row of zeros, and one whose scale is the smallest that there is.
    std::vector<float> tiny = {0.0f, 0.0f, 1e-45f, -1e-45f};
    round_embeddings(EmbeddingForm::int8, tiny, 2);
    CHECK(tiny[0] == 0.0f);
    for (const float value : tiny) CHECK(std::isfinite(value));
}

TEST_CASE_FIXTURE(Fixture, "passage record: holds chunks and embeddings; a text without chunks has one too") {
    const std::vector<float> fresh = encode(kText);
    for (const EmbeddingForm form : {EmbeddingForm::f32, EmbeddingForm::bf16, EmbeddingForm::int8}) {
        CAPTURE(embedding_form_name(form));
        const std::string record = record_of(kText, form);
        CHECK(passage_record_key(record) == name_of(kText, form));
        const PassageRecord kept = read(record, name_of(kText, form));
        CHECK(kept.form == form);
        CHECK(kept.d_enc == model.d_enc());
        std::vector<float> expected = fresh;
        round_embeddings(form, expected, model.d_enc());
        CHECK(kept.chunk_emb == expected);
        const CutPassage cut(model, kText, 4);
        CHECK(kept.cut->text() == cut.text());
        CHECK(kept.cut->content() == cut.content());
        CHECK(kept.cut->n_tokens() == cut.n_tokens());
        REQUIRE(kept.cut->chunks().size() == cut.chunks().size());
        for (size_t i = 0; i < cut.chunks().size(); ++i) {
            CHECK(kept.cut->chunks()[i].begin == cut.chunks()[i].begin);
            CHECK(kept.cut->chunks()[i].end == cut.chunks()[i].end);
            CHECK(kept.cut->chunks()[i].ids == cut.chunks()[i].ids);
        }
    }
    const std::string empty = record_of("", EmbeddingForm::bf16);
    CHECK(read(empty, name_of("", EmbeddingForm::bf16), "").cut->chunks().empty());
    // What is no number is not kept.
    std::vector<float> values(fresh.size(), 0.0f);
    values[3] = std::numeric_limits<float>::infinity();
    CHECK(passage_record(CutPassage(model, kText, 4), {}, EmbeddingForm::bf16, values, model.d_enc()) == "");
}

TEST_CASE_FIXTURE(Fixture,
                  "passage record: torn, changed or another's is refused, whatever its digest says") {
    const Sha256Digest key = name_of(kText, EmbeddingForm::bf16);
    const std::string record = record_of(kText, EmbeddingForm::bf16);
    for (size_t n = 0; n < record.size(); ++n)
        CHECK(error_of([&] { read(record.substr(0, n), key); }) != "(no error)");
    std::mt19937 random(7);
    for (int i = 0; i < 2000; ++i) {
        std::string changed = record;
        changed[random() % changed.size()] ^= static_cast<char>(1 << (random() % 8));
        CHECK(error_of([&] { read(changed, key); }) != "(no error)");
    }
    CHECK(
        contains(error_of([&] { read(record, name_of(kText, EmbeddingForm::int8)); }), "of another passage"));
    CHECK(contains(error_of([&] { read(record, key, std::string(kText) + "."); }), "expected a text of"));
    // By who can make a digest: every byte of the numbers before the embeddings, set to the ends of its
    // range.
    const size_t head = record.size() - 32 - static_cast<size_t>(model.d_enc()) * 2;
    for (size_t at = 8; at < head; ++at) {
        for (const char value : {'\0', '\x7f', '\xff'}) {
            std::string changed = record;
            changed[at] = value;
            changed = wrong_digest_mended(changed);
            try {
                const PassageRecord kept = read(changed, key);
                size_t end = 0;
                for (const Chunk& chunk : kept.cut->chunks()) {
                    CHECK(chunk.begin == end);
                    end = chunk.end;
                    for (const int32_t id : chunk.ids) CHECK(id < model.tokenizer().vocab_size());
                }
                CHECK(end == std::string_view(kText).size());
            } catch (const Error& error) {
                CHECK(error.status() == Status::bad_input);
            }
        }
    }
}

TEST_CASE_FIXTURE(Fixture, "cache: what was encoded once is kept for the next process, bit for bit") {
    const TempDir dir;
    for (const EmbeddingForm form : {EmbeddingForm::bf16, EmbeddingForm::int8}) {
        CAPTURE(embedding_form_name(form));
        std::vector<float> fresh;
        {
            PassageCache cache(1 << 20, std::make_shared<RecordCache>(dir.path(), form));
            const auto passage = cache.share(model, kText, 4);
            CHECK(passage->key() == name_of(kText, form));
            CHECK(!passage->encoded());
            encode_passages(backend, model, std::vector{passage}, arena);
            fresh = embeddings(*passage);
            std::vector<float> expected = encode(kText);
            round_embeddings(form, expected, model.d_enc());
            CHECK(fresh == expected);
        }
        PassageCache cache(1 << 20, std::make_shared<RecordCache>(dir.path(), form));
        const auto kept = cache.share(model, kText, 4);
        CHECK(embeddings(*kept) == fresh);
        CHECK(kept->encoded()->key() == kept->key());
        CHECK(cache.share(model, kText, 4) == kept);
        // Another chunk length, another tenant, another text: nothing of theirs is there.
        CHECK(!cache.share(model, kText, 8)->encoded());
        CHECK(!cache.share(model, kText, 4, "someone")->encoded());
        CHECK(!cache.share(model, std::string(kText) + " ", 4)->encoded());
    }
    // Without a cache nothing is rounded.
    PassageCache none;
    const auto passage = none.share(model, kText, 4);
    CHECK(passage->key() == name_of(kText, EmbeddingForm::f32));
}

TEST_CASE_FIXTURE(Fixture, "cache: answers are the same from fresh and from kept passages") {
    const TempDir dir;
    const std::vector<Passage> passages = {{"a", "Mill", kText},
                                           {"b", "", "Ships carry barley to the town."}};
    AnswerOptions options;
    options.max_new_tokens = 6;
    options.logprobs = 2;
    std::vector<Answer> answers;
    for (int i = 0; i < 2; ++i) {
        Session session(model, 0,
                        std::make_shared<PassageCache>(
                            1 << 20, std::make_shared<RecordCache>(dir.path(), EmbeddingForm::bf16)));
        answers.push_back(session.answer(passages, "Where is the mill?", options));
    }
    CHECK(answers[0].n_cached == 0);
    CHECK(answers[1].n_cached == answers[1].chunks.size());
    CHECK(answers[0].ids == answers[1].ids);
    CHECK(answers[0].text == answers[1].text);
    CHECK(answers[0].logprobs == answers[1].logprobs);
    for (size_t i = 0; i < answers[0].chunks.size(); ++i)
        CHECK(answers[0].chunks[i].logit == answers[1].chunks[i].logit);
}

TEST_CASE_FIXTURE(Fixture,
                  "cache: several passages are asked for at once, and are those that one by one gives") {
    // A keeper that counts how often it is asked.
    class Counting : public PassageKeeper {
      public:
        explicit Counting(const std::string& dir) : kept_(dir, EmbeddingForm::bf16) {}
        EmbeddingForm form() const noexcept override { return kept_.form(); }
        std::optional<std::string> find(const Sha256Digest& key) noexcept override {
            ++n_single;
            return kept_.find(key);
        }
        std::vector<std::optional<std::string>> find_all(std::span<const Sha256Digest> keys) override {
            ++n_all;
            n_keys += keys.size();
            return kept_.find_all(keys);
        }
        void forget(const Sha256Digest& key) noexcept override {
            ++n_forgotten;
            kept_.forget(key);
        }
        void keep(const Sha256Digest& key, std::string record) noexcept override {
            kept_.keep(key, std::move(record));
        }
        void flush() { kept_.flush(); }
        int n_single = 0, n_all = 0, n_forgotten = 0;
        size_t n_keys = 0;

      private:
        RecordCache kept_;
    };
    const TempDir dir;
    const auto keeper = std::make_shared<Counting>(dir.path());
    std::vector<std::string> texts;
    for (int i = 0; i < 6; ++i) texts.push_back(str("Passage ", i, ": ", kText));
    {
        PassageCache cache(1 << 20, keeper);
        const auto shared = cache.share_all(model, texts, 4);
        for (const auto& passage : shared) CHECK(!passage->encoded());
        encode_passages(backend, model, shared, arena);
        // Those that are here are not asked for.
        CHECK(cache.share_all(model, texts, 4) == shared);
        CHECK(keeper->n_all == 1);
    }
    keeper->keep(name_of(texts[2], EmbeddingForm::bf16), "no record");
    keeper->flush();
    texts.push_back("A new one.");
    texts.push_back(texts[0]);
    PassageCache cache(1 << 20, keeper);
    const auto first = cache.share(model, texts[1], 4);
    CHECK(keeper->n_single == 1);
    const auto shared = cache.share_all(model, texts, 4);
    CHECK(keeper->n_single == 1);
    CHECK(keeper->n_all == 2);
    CHECK(keeper->n_keys == 6 + texts.size() - 1);
    CHECK(keeper->n_forgotten == 1);
    REQUIRE(shared.size() == texts.size());
    CHECK(shared[1] == first);
    CHECK(shared[7] == shared[0]);
    for (size_t i = 0; i < texts.size(); ++i) {
        CAPTURE(i);
        CHECK(shared[i] == cache.share(model, texts[i], 4));
        CHECK((shared[i]->encoded() != nullptr) == (i != 2 && i != 6));
        if (!shared[i]->encoded()) continue;
        std::vector<float> expected = encode(texts[i]);
        round_embeddings(EmbeddingForm::bf16, expected, model.d_enc());
        CHECK(embeddings(*shared[i]) == expected);
    }
    PassageCache without;
    CHECK(without.share_all(model, {}, 4).empty());
    CHECK(without.share_all(model, texts, 4)[0]->key() == name_of(texts[0], EmbeddingForm::f32));
}

TEST_CASE("cache: beyond its size the longest unused go; records written but not yet on disk are found") {
    const TempDir dir;
    const std::string record(20000, 'x');
    const auto key = [](int i) { return sha256(str("key ", i)); };
    {
        RecordCache cache(dir.path(), EmbeddingForm::bf16, 1 << 20);
        for (int i = 0; i < 200; ++i) {
            cache.keep(key(i), record + str(i));
            CHECK(cache.find(key(i)) == record + str(i));
        }
        cache.flush();
        CHECK(cache.find(key(199)) == record + "199");
        CHECK(!cache.find(key(0)));
        cache.forget(key(199));
        cache.flush();
        CHECK(!cache.find(key(199)));
    }
    uint64_t n = 0;
    RecordCache cache(dir.path(), EmbeddingForm::bf16, 1 << 20);
    for (int i = 0; i < 200; ++i) n += cache.find(key(i)) ? 1 : 0;
    CHECK(n >= 30);  // 1 MiB holds 52, nine tenths of it 47
    CHECK(n <= 52);
}

TEST_CASE("cache: damage and foreign files") {
    const TempDir dir;
    std::vector<std::string> said;
    const CacheWarning warn = [&](const std::string& line) { said.push_back(line); };
    const std::string record(3000, 'y');
    {
        RecordCache cache(dir.path(), EmbeddingForm::bf16);
        for (int i = 0; i < 50; ++i) cache.keep(sha256(str(i)), record);
    }
    const std::string path = dir.file("chunk-embeddings.db");
    const std::string whole = read_file(path, 1 << 26);
    // A file that is none of ours is let be.
    dir.write("chunk-embeddings.db", "my notes\n");
    CHECK(contains(error_of([&] { RecordCache(dir.path(), EmbeddingForm::bf16); }),
                   path + ": expected a chunk-embedding cache, found another file"));
    CHECK(read_file(path, 100) == "my notes\n");
    CHECK(contains(error_of([&] { RecordCache(path, EmbeddingForm::bf16); }), "cannot be made"));
    // One of ours with its first page's tables gone is begun anew.
    std::string torn = whole;
    std::fill(torn.begin() + 100, torn.begin() + 4096, '\xff');
    dir.write("chunk-embeddings.db", torn);
    {
        RecordCache cache(dir.path(), EmbeddingForm::bf16, 1 << 20, warn);
        REQUIRE(said.size() == 1);
        CHECK(contains(said[0], path + ": damaged"));
        CHECK(!cache.find(sha256("1")));
        cache.keep(sha256("1"), record);
        cache.flush();
        CHECK(cache.find(sha256("1")) == record);
    }
    // A newer one is let be.
    std::string newer = whole;
    newer[63] = 9;  // user_version
    dir.write("chunk-embeddings.db", newer);
    CHECK(contains(error_of([&] { RecordCache(dir.path(), EmbeddingForm::bf16); }),
                   "of format 1, found format 9, which a newer refrag wrote"));
}

TEST_CASE_FIXTURE(Fixture, "cache: random bit flips over the file are misses, or harmless") {
    const TempDir dir;
    std::vector<std::string> texts;
    for (int i = 0; i < 12; ++i) texts.push_back(str("Passage number ", i, ": ", kText));
    std::vector<std::vector<float>> fresh;
    {
        PassageCache cache(1 << 20, std::make_shared<RecordCache>(dir.path(), EmbeddingForm::bf16));
        for (const std::string& text : texts) {
            const auto passage = cache.share(model, text, 4);
            encode_passages(backend, model, std::vector{passage}, arena);
            fresh.push_back(embeddings(*passage));
        }
    }
    const std::string whole = read_file(dir.file("chunk-embeddings.db"), 1 << 26);
    std::mt19937 random(11);
    const char* env = std::getenv("REFRAG_TEST_FLIPS");
    const int rounds = env != nullptr ? std::atoi(env) : 100;
    int hits = 0;
    int misses = 0;
    for (int round = 0; round < rounds; ++round) {
        std::string changed = whole;
        for (int flip = 0; flip < 20; ++flip)
            changed[random() % changed.size()] ^= static_cast<char>(1 << (random() % 8));
        dir.write("chunk-embeddings.db", changed);
        std::shared_ptr<RecordCache> keeper;
        try {
            keeper = std::make_shared<RecordCache>(dir.path(), EmbeddingForm::bf16);
        } catch (const Error& error) {
            CHECK(contains(error.message(), dir.file("chunk-embeddings.db")));
            continue;
        }
        PassageCache cache(1 << 20, keeper);
        for (size_t i = 0; i < texts.size(); ++i) {
            const auto passage = cache.share(model, texts[i], 4);
            ++(passage->encoded() ? hits : misses);
            if (passage->encoded()) CHECK(embeddings(*passage) == fresh[i]);
        }
    }
    CHECK(hits > 0);
    CHECK(misses > 0);
}
