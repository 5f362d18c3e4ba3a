// What every kind of passage store does alike: what is found by words, by vectors and by both, metadata, what
// is replaced, removed and encoded anew.
#include <cmath>

#include "base/dtype.h"
#include "refrag/passage_record.h"
#include "store_test.h"

using namespace refrag;
using namespace refrag_test;

TEST_EVERY_STORE(FoundByWords, "store: found by words, whatever they look like to a query language") {
    const IndexCounts counts = index(some_documents());
    CHECK(counts.n_added == 4);
    CHECK(counts.n_passages == 4);
    CHECK(by_words("Where is the MILLS' hill?").front() == "mill");  // stemmed
    CHECK(by_words("red lanterns and ships").size() == 3);           // "and" is a word of the fourth
    for (const char* hard :
         {"\"quoted\"", "AND", "quoted OR NOT", "- what *", "a:b what", "NEAR(what, 2)", "what^"})
        CHECK(by_words(hard).front() == "signs");
    CHECK(by_words("*").empty());
    CHECK(by_words("").empty());
    CHECK(by_words("zebra").empty());
}

TEST_EVERY_STORE(Where, "store: --where leaves what fulfils it") {
    index(some_documents());
    const std::string all = "mill lantern ships what";
    const auto where = [&](const std::vector<std::string>& conditions) {
        Ids ids = by_words(all, conditions);
        std::sort(ids.begin(), ids.end());
        return ids;
    };
    CHECK(where({}) == Ids{"lantern", "mill", "ship", "signs"});
    CHECK(where({"year>=1900"}) == Ids{"lantern", "ship"});
    CHECK(where({"year>=1900", "lang=en"}) == Ids{"lantern"});
    CHECK(where({"year=1999.5"}) == Ids{"ship"});
    CHECK(where({"lang!=en"}) == Ids{"ship", "signs"});
    CHECK(where({"at.port=North"}) == Ids{"ship"});
    CHECK(where({"lang>=5"}) == Ids{});  // a text has no order beside a number
    CHECK(where({"lang<zz"}) == Ids{"lantern", "mill", "ship"});
    CHECK(where({"year=\"1850\""}) == Ids{});
    CHECK(where({"none=null"}) == Ids{"lantern", "mill", "ship", "signs"});
    CHECK(where({"lang=' OR 1=1 --"}) == Ids{});
    RetrieveOptions dense{.retrieval = Retrieval::dense};
    dense.filter = {parse_condition("lang=de")};
    CHECK(found("The old mill", dense) == Ids{"ship"});
}

TEST_EVERY_STORE(Dense, "store: dense retrieval is an exact scan; both lists are fused by reciprocal rank") {
    index(some_documents());
    // A text is nearest to itself.
    for (const SourceDocument& one : some_documents())
        CHECK(found(one.text, {.retrieval = Retrieval::dense, .top = 1}) == Ids{one.id});
    // By hand: the dot products of the stored vectors with the question's.
    const auto opened = open_store(path, StoreMode::read);
    PassageStore& store = *opened;
    Arena arena(backend);
    const std::vector<float> query = question_vector(backend, model, "barley and the mill", 4, arena);
    std::vector<Found> expected;
    store.for_each_vector({}, [&](int64_t n, std::span<const uint16_t> vector) {
        double sum = 0.0;
        double squares = 0.0;
        for (size_t i = 0; i < vector.size(); ++i) {
            sum += static_cast<double>(query[i]) * static_cast<double>(bf16_to_f32(vector[i]));
            squares += std::pow(static_cast<double>(bf16_to_f32(vector[i])), 2);
        }
        CHECK(std::abs(squares - 1.0) < 0x1p-7);  // each value is rounded by up to 2^-9 of itself
        expected.push_back({n, sum});
    });
    std::sort(expected.begin(), expected.end(),
              [](const Found& a, const Found& b) { return a.score > b.score; });
    VectorIndex vectors;
    const std::vector<Found> dense = vectors.search(store, {}, query, 10);
    REQUIRE(dense.size() == expected.size());
    for (size_t i = 0; i < dense.size(); ++i) {
        CHECK(dense[i].n == expected[i].n);
        // fp32 sums of d products of values below 1.
        CHECK(std::abs(dense[i].score - expected[i].score) <= 0x1p-22 * static_cast<double>(query.size()));
    }
    const std::vector<Found> fused = fuse({{{1, 9.0}, {2, 8.0}}, {{2, 1.0}, {3, 0.5}}}, 10);
    REQUIRE(fused.size() == 3);
    CHECK(fused[0].n == 2);
    CHECK(fused[0].score == doctest::Approx(1.0 / 62 + 1.0 / 61));
    CHECK(fused[1].n == 1);
    CHECK(fused[2].n == 3);
    CHECK(parse_retrieval("--retrieve", "both") == Retrieval::both);
    CHECK(
        contains(error_of([] { parse_retrieval("--retrieve", "sparse"); }), "expected bm25, dense or both"));
}

TEST_EVERY_STORE(Replaced,
                 "store: unchanged is skipped, changed is replaced, removed is gone from every list") {
    CHECK(index(some_documents()).n_added == 4);
    const IndexCounts again = index(some_documents());
    CHECK(again.n_unchanged == 4);
    CHECK(again.n_passages == 0);
    std::vector<SourceDocument> changed = some_documents();
    changed[0].text = "The new mill stands in a valley.";
    changed[1].metadata = R"({"year": 2})";
    const IndexCounts third = index(changed);
    CHECK(third.n_replaced == 2);
    CHECK(third.n_unchanged == 2);
    CHECK(by_words("hill river").empty());
    CHECK(by_words("valley") == Ids{"mill"});
    CHECK(by_words("lantern", {"year=2"}) == Ids{"lantern"});
    {
        const auto opened = open_store(path, StoreMode::write);
        PassageStore& store = *opened;
        CHECK(store.remove("mill"));
        CHECK(!store.remove("mill"));
        CHECK(store.stats().n_vectors == 3);
        CHECK(store.stats().n_passages == 3);
        store.verify_structure([](const std::string& problem) { FAIL(problem); });
    }
    CHECK(by_words("valley").empty());
    // The same id with another content in one run; a text that two documents share is encoded once.
    CHECK(contains(error_of([&] {
                       index({document("x", "one"), document("x", "two")});
                   }),
                   "document x: the id came before, with another content"));
    // Where refusals are taken, the others are indexed all the same.
    std::vector<std::string> refused;
    options.on_bad = [&](const Error& error) { refused.push_back(error.message()); };
    CHECK(index({document("u", "one"), document("u", "two"), document("v", "three")}).n_added == 2);
    REQUIRE(refused.size() == 1);
    CHECK(contains(refused[0], "document u: the id came before"));
    options.on_bad = {};
    CHECK(index({document("y", "The same."), document("z", "The same.")}).n_repeated == 1);
    CHECK(by_words("same").size() == 2);
}

TEST_EVERY_STORE(Kept,
                 "store: what is kept is what is fresh, bit for bit; another model is refused by name") {
    index(some_documents());
    const auto opened = open_store(path, StoreMode::read);
    PassageStore& store = *opened;
    const StoreStamp stamp = *store.stamp();
    CHECK(stamp == stamp_of(model, options));
    PassageCache cache;
    Arena arena(backend);
    for (const int64_t n : store.numbers(-1, 100)) {
        const int64_t one[] = {n};
        const StoredPassage stored = store.get(one).front();
        const auto kept = cache.share(model, stored.content(), 4, stamp.form, stored.record);
        const auto fresh = std::make_shared<SharedPassage>(model, stored.content(), 4);
        encode_passages(backend, model, std::vector{fresh}, arena);
        std::vector<float> expected = fresh->encoded()->download(backend);
        round_embeddings(stamp.form, expected, model.d_enc());
        CHECK(kept->encoded()->download(backend) == expected);
    }
    StoreStamp other = stamp;
    other.model = "another";
    other.maker.bytes[0] ^= 1;
    const std::string said = error_of([&] { check_stamp("S", stamp, other); });
    CHECK(contains(said, "S: its passages were encoded by " + tiny_refrag_path()));
    CHECK(contains(said, "not by another"));
    // Of two that would stamp a store one goes first, and the other hears of it.
    CHECK(open_store(path, StoreMode::write)->stamp_if_empty(other) == stamp);
    CHECK(*store.stamp() == stamp);
    CHECK(contains(error_of([&] {
                       options.chunk_len = 8;
                       index(some_documents());
                   }),
                   "k = 4"));
}

TEST_EVERY_STORE(Reencoded, "store: encoded anew by another chunk length, and halfway") {
    index(some_documents());
    IndexOptions other = options;
    other.chunk_len = 8;
    other.form = EmbeddingForm::int8;
    {
        const auto opened = open_store(path, StoreMode::write);
        PassageStore& store = *opened;
        int64_t last = 0;
        reencode(store, model, other, [&](int64_t done, int64_t total) {
            CHECK(done > last);
            CHECK(total == 4);
            last = done;
        });
        CHECK(last == 4);
        CHECK(*store.stamp() == stamp_of(model, other));
        store.verify_structure([](const std::string& problem) { FAIL(problem); });
        for (const int64_t n : store.numbers(-1, 100)) {
            const int64_t one[] = {n};
            const StoredPassage stored = store.get(one).front();
            const Sha256Digest key =
                passage_key(model.passage_maker(8, EmbeddingForm::int8), sha256(stored.content()));
            CHECK(read_passage_record(stored.record, key, stored.content(), model.tokenizer().vocab_size())
                      .form == EmbeddingForm::int8);
        }
    }
    CHECK(by_words("mill") == Ids{"mill"});
    options = other;
    CHECK(index(some_documents()).n_unchanged == 4);
}

TEST_EVERY_STORE(OwnEmbeddings, "store: a document's own embedding is what dense retrieval compares with") {
    std::vector<SourceDocument> documents = some_documents();
    documents[0].embedding = {3.0f, 0.0f, 4.0f};
    documents[1].embedding = {0.0f, 1.0f, 0.0f};
    index(documents);
    const auto opened = open_store(path, StoreMode::read);
    PassageStore& store = *opened;
    VectorIndex vectors;
    const std::vector<Found> found = vectors.search(store, {}, {1.0f, 0.0f, 0.0f}, 10);
    REQUIRE(found.size() == 2);  // the others have vectors of another length
    CHECK(found[0].score == doctest::Approx(0.6).epsilon(0.01));
    CHECK(found[1].score == 0.0);
}

TEST_EVERY_STORE(EncodedLines, "store: encoded lines are what the store would have written itself") {
    std::vector<std::string> lines;
    const Sha256Digest maker = stamp_of(model, options).maker;
    {
        Indexer indexer(
            [&](const std::vector<EncodedDocument>& batch) {
                for (const EncodedDocument& encoded : batch) lines.push_back(encoded_line(encoded, maker));
            },
            model, options);
        for (SourceDocument& one : some_documents()) indexer.add(std::move(one));
        indexer.finish();
    }
    REQUIRE(lines.size() == 4);
    index(some_documents());
    const auto opened = open_store(path, StoreMode::read);
    PassageStore& store = *opened;
    const StoreStamp stamp = *store.stamp();
    for (const std::string& line : lines) {
        const EncodedDocument read = read_encoded_line(Json::parse(line, "line"), stamp);
        const Document stored = *store.find(read.document.id);
        CHECK(read.document.hash == stored.hash);
        CHECK(read.document.metadata == stored.metadata);
        REQUIRE(read.passages.size() == 1);
        bool same = false;
        for (const StoredPassage& passage : store.get(store.numbers(-1, 100)))
            same =
                same || (passage.record == read.passages[0].record && passage.text == read.passages[0].text);
        CHECK(same);
        CHECK(encoded_line(read, maker) == line);
    }
    const auto refused = [&](const std::string& from, const std::string& to) {
        std::string line = lines[0];
        REQUIRE(contains(line, from));
        line.replace(line.find(from), from.size(), to);
        return error_of([&] { read_encoded_line(Json::parse(line, "line"), stamp); });
    };
    CHECK(contains(refused("The old mill", "The new mill"), "of another passage"));
    CHECK(contains(refused(maker.hex(), sha256("other").hex()), "key \"maker\""));
    CHECK(contains(refused("\"record\": \"", "\"record\": \"*"), "expected base64"));
    CHECK(contains(refused("\"id\": \"mill\"", "\"id\": \"\""), "an id that is not empty"));
    CHECK(contains(refused("\"vector\": \"", "\"other\": 1, \"vector\": \""), "other"));
}
