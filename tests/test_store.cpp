// The passage store: how documents are read and cut, what is found by words, by vectors and by both,
// metadata, what is replaced and removed, and files that are damaged, foreign, newer, read-only, locked or
// full.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <random>

#include "base/dtype.h"
#include "golden.h"
#include "io/base64.h"
#include "refrag/citations.h"
#include "refrag/passage_record.h"
#include "store/cutter.h"
#include "store/indexer.h"
#include "store/retrieve.h"
#include "store/sqlite_store.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// A store over the tiny model.
struct Fixture : TinyRefrag {
    TempDir dir;
    std::string path = dir.file("s.db");
    IndexOptions options{.passage_tokens = 40, .chunk_len = 4};

    IndexCounts index(std::vector<SourceDocument> documents) {
        SqliteStore store(path, StoreMode::create);
        Indexer indexer(store, model, options);
        for (SourceDocument& document : documents) indexer.add(std::move(document));
        indexer.finish();
        return indexer.counts();
    }
    std::vector<std::string> found(std::string_view question, const RetrieveOptions& how) {
        SqliteStore store(path, StoreMode::read);
        Arena arena(backend);
        VectorIndex vectors;
        const std::vector<float> query = question_vector(backend, model, question, 4, arena);
        std::vector<int64_t> numbers;
        for (const Found& one : retrieve(store, vectors, question, query, how)) numbers.push_back(one.n);
        std::vector<std::string> ids;
        for (const StoredPassage& passage : store.get(numbers)) ids.push_back(passage.document);
        return ids;
    }
    std::vector<std::string> by_words(std::string_view question, const std::vector<std::string>& where = {}) {
        RetrieveOptions how{.retrieval = Retrieval::words};
        for (const std::string& text : where) how.filter.push_back(parse_condition(text));
        return found(question, how);
    }
};

SourceDocument document(const std::string& id, const std::string& text, const std::string& metadata = "{}") {
    SourceDocument out;
    out.id = id;
    out.text = text;
    out.metadata = metadata;
    return out;
}

std::vector<SourceDocument> some_documents() {
    return {
        document("mill", "The old mill stands on a hill above the river.", R"({"year": 1850, "lang": "en"})"),
        document("lantern", "A red lantern hangs over the door.", R"({"year": 1921, "lang": "en"})"),
        document("ship", "Ships carry barley to the town.",
                 R"({"year": 1999.5, "lang": "de", "at": {"port": "North"}})"),
        document("signs", "AND OR NOT \"quoted\" - * what")};
}

using Ids = std::vector<std::string>;

std::vector<std::string> cut(const Tokenizer& tokenizer, const std::string& text, int64_t most,
                             bool markdown = false) {
    const std::vector<Token> tokens = tokenizer.encode(text);
    std::vector<std::string> pieces;
    for (const CutSpan& span : cut_document(text, tokens, most, markdown)) {
        CHECK(std::ssize(tokenizer.encode(text.substr(span.begin, span.end - span.begin))) <= most + 2);
        pieces.push_back((span.heading.empty() ? "" : "<" + span.heading + ">") +
                         text.substr(span.begin, span.end - span.begin));
    }
    return pieces;
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "cutter: paragraphs stay whole where they fit, sentences where not") {
    const Tokenizer& t = model.tokenizer();
    CHECK(cut(t, "", 10) == Ids{});
    CHECK(cut(t, " \n\n ", 10) == Ids{});
    CHECK(cut(t, "One.\n\nTwo.\n", 100) == Ids{"One.\n\nTwo.\n"});  // it fits: unchanged
    const std::string a = "The old mill stands on a hill above the river.";
    const std::string b = "A red lantern hangs over the door.";
    const auto n = [&](const std::string& text) { return std::ssize(t.encode(text)); };
    const int64_t both = n(a + "\n\n" + b);
    CHECK(cut(t, a + "\n\n" + b + "\n\n\n" + a, both) == Ids{a + "\n\n" + b, a});
    CHECK(cut(t, a + " \n \n" + b, both - 1) == Ids{a, b});
    // One paragraph of several sentences.
    const std::vector<std::string> sentences = cut(t, a + " " + b + " " + a, n(a) + 3);
    CHECK(sentences == Ids{a, b, a});
    // No white space, no sentence: between tokens, and never within a character.
    std::string wide;
    for (int i = 0; i < 60; ++i) wide += "\xe6\xb0\xb4";
    std::string together;
    for (const std::string& piece : cut(t, wide, 10)) {
        CHECK(piece.size() % 3 == 0);
        together += piece;
    }
    CHECK(together == wide);
}

TEST_CASE_FIXTURE(Fixture, "cutter: Markdown's headings begin passages and stand in their titles") {
    const Tokenizer& t = model.tokenizer();
    const std::string text =
        "Before.\n# Rivers\nOf all.\n\n## The Urvik ##\nLong.\n```\n# no heading\n\ncode\n```\n# "
        "Towns\n####### seven\n#tag\n";
    CHECK(cut(t, text, 200, true) == Ids{"Before.", "<Rivers>Of all.",
                                         "<Rivers - The Urvik>Long.\n```\n# no heading\n\ncode\n```",
                                         "<Towns>####### seven\n#tag"});
}

TEST_CASE("documents: JSON Lines with metadata, text, Markdown, directories; bad lines are named") {
    const TempDir dir;
    dir.write(
        "a.jsonl",
        "\xEF\xBB\xBF{\"id\": 7, \"text\": \"one\", \"title\": \"T\", \"year\": 2001, \"tags\": [1]}\n\n"
        "{\"text\": \"two\", \"metadata\": {\"year\": 5, \"deep\": {\"a\": null}}, \"year\": 6, \"ok\": "
        "true}\r\n"
        "{\"id\": \"bad\"}\n"
        "{\"id\": \"v\", \"text\": \"three\", \"embedding\": [1, 0.5]}");
    std::vector<SourceDocument> read;
    std::vector<std::string> bad;
    const UseDocument use = [&](SourceDocument&& one) {
        read.push_back(std::move(one));
        return true;
    };
    read_documents(dir.file("a.jsonl"), use, [&](const Error& error) { bad.push_back(error.message()); });
    REQUIRE(read.size() == 3);
    CHECK(read[0].id == "7");
    CHECK(read[0].title == "T");
    CHECK(read[0].metadata == "{\"year\": 2001}");
    CHECK(read[1].id == dir.file("a.jsonl") + ":3");
    CHECK(read[1].metadata == "{\"year\": 5, \"deep\": {\"a\": null}, \"ok\": true}");
    CHECK(read[2].embedding == std::vector<float>{1.0f, 0.5f});
    REQUIRE(bad.size() == 1);
    CHECK(contains(bad[0], dir.file("a.jsonl") + ": line 4"));
    CHECK(contains(error_of([&] { read_documents(dir.file("a.jsonl"), use); }), ": line 4"));

    dir.write("b.md", "# Head\ntext\n");
    dir.write("c.txt", "plain \xff text");
    dir.write(".hidden.txt", "no");
    dir.write("d.bin", "no");
    std::filesystem::create_directory(dir.file("sub"));
    dir.write("sub/e.TXT", "deep");
    CHECK(document_files({dir.path()}) ==
          Ids{dir.file("a.jsonl"), dir.file("b.md"), dir.file("c.txt"), dir.file("sub/e.TXT")});
    read.clear();
    read_documents(dir.file("b.md"), use);
    read_documents(dir.file("c.txt"), use);
    REQUIRE(read.size() == 2);
    CHECK(read[0].markdown);
    CHECK(read[0].title == "b");
    CHECK(read[1].text == "plain \xef\xbf\xbd text");
    CHECK(contains(error_of([&] { document_files({dir.file("none")}); }), "found no such path"));
    dir.write("z.jsonl", std::string("\x1f\x8b") + "packed");
    CHECK(contains(error_of([&] { read_documents(dir.file("z.jsonl"), use); }), "gzip-compressed data"));
}

TEST_CASE("where: conditions as they are written") {
    const Condition year = parse_condition("year>=2020");
    CHECK(year.key == Ids{"year"});
    CHECK(year.op == FilterOp::greater_equal);
    CHECK(std::get<double>(year.value) == 2020.0);
    CHECK(std::get<std::string>(parse_condition("a.b = \"2020\"").value) == "2020");
    CHECK(parse_condition("a.b=x").key == Ids{"a", "b"});
    CHECK(std::get<bool>(parse_condition("ok!=true").value));
    CHECK(std::holds_alternative<std::nullptr_t>(parse_condition("x=null").value));
    CHECK(std::get<std::string>(parse_condition("t=War and Peace").value) == "War and Peace");
    CHECK(std::get<std::string>(parse_condition("t=").value) == "");
    for (const char* wrong : {"year", "=3", "a..b=1", "a=>3", "ok<true", "x<null", "a\"b=1"})
        CHECK(contains(error_of([&] { parse_condition(wrong); }), "--where"));
}

TEST_CASE_FIXTURE(Fixture, "store: found by words, whatever they look like to a query language") {
    const IndexCounts counts = index(some_documents());
    CHECK(counts.n_added == 4);
    CHECK(counts.n_passages == 4);
    CHECK(by_words("Where is the MILLS' hill?").front() == "mill");  // stemmed
    CHECK(by_words("red lanterns and ships").size() == 3);        // "and" is a word of the fourth
    for (const char* hard :
         {"\"quoted\"", "AND", "quoted OR NOT", "- what *", "a:b what", "NEAR(what, 2)", "what^"})
        CHECK(by_words(hard).front() == "signs");
    CHECK(by_words("*").empty());
    CHECK(by_words("").empty());
    CHECK(by_words("zebra").empty());
}

TEST_CASE_FIXTURE(Fixture, "store: --where leaves what fulfils it") {
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

TEST_CASE_FIXTURE(Fixture,
                  "store: dense retrieval is an exact scan; both lists are fused by reciprocal rank") {
    index(some_documents());
    // A text is nearest to itself.
    for (const SourceDocument& one : some_documents())
        CHECK(found(one.text, {.retrieval = Retrieval::dense, .top = 1}) == Ids{one.id});
    // By hand: the dot products of the stored vectors with the question's.
    SqliteStore store(path, StoreMode::read);
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

TEST_CASE_FIXTURE(Fixture, "store: dot products have one order, at any length") {
    std::mt19937 random(3);
    std::uniform_real_distribution<float> any(-1.0f, 1.0f);
    for (const size_t dim : {1u, 15u, 16u, 17u, 384u, 1000u}) {
        std::vector<float> query(dim);
        std::vector<uint16_t> row(dim);
        double exact = 0.0;
        for (size_t i = 0; i < dim; ++i) {
            query[i] = any(random);
            row[i] = f32_to_bf16(any(random));
            exact += static_cast<double>(query[i]) * static_cast<double>(bf16_to_f32(row[i]));
        }
        const float sum = dot_bf16(query.data(), row.data(), dim);
        CHECK(std::abs(static_cast<double>(sum) - exact) <= 0x1p-23 * static_cast<double>(dim));
        CHECK(dot_bf16(query.data(), row.data(), dim) == sum);
    }
}

TEST_CASE_FIXTURE(Fixture,
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
        SqliteStore store(path, StoreMode::write);
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
    CHECK(index({document("y", "The same."), document("z", "The same.")}).n_repeated == 1);
    CHECK(by_words("same").size() == 2);
}

TEST_CASE_FIXTURE(Fixture,
                  "store: what is kept is what is fresh, bit for bit; another model is refused by name") {
    index(some_documents());
    SqliteStore store(path, StoreMode::read);
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
    CHECK(contains(error_of([&] {
                       options.chunk_len = 8;
                       index(some_documents());
                   }),
                   "k = 4"));
}

TEST_CASE_FIXTURE(Fixture, "store: encoded anew by another chunk length, and halfway") {
    index(some_documents());
    IndexOptions other = options;
    other.chunk_len = 8;
    other.form = EmbeddingForm::int8;
    {
        SqliteStore store(path, StoreMode::write);
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

TEST_CASE_FIXTURE(Fixture, "store: a document's own embedding is what dense retrieval compares with") {
    std::vector<SourceDocument> documents = some_documents();
    documents[0].embedding = {3.0f, 0.0f, 4.0f};
    documents[1].embedding = {0.0f, 1.0f, 0.0f};
    index(documents);
    SqliteStore store(path, StoreMode::read);
    VectorIndex vectors;
    const std::vector<Found> found = vectors.search(store, {}, {1.0f, 0.0f, 0.0f}, 10);
    REQUIRE(found.size() == 2);  // the others have vectors of another length
    CHECK(found[0].score == doctest::Approx(0.6).epsilon(0.01));
    CHECK(found[1].score == 0.0);
}

TEST_CASE_FIXTURE(Fixture, "store: encoded lines are what the store would have written itself") {
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
    SqliteStore store(path, StoreMode::read);
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

TEST_CASE("base64: RFC 4648's own examples, and nothing else") {
    const std::pair<const char*, const char*> examples[] = {{"", ""},
                                                            {"f", "Zg=="},
                                                            {"fo", "Zm8="},
                                                            {"foo", "Zm9v"},
                                                            {"foob", "Zm9vYg=="},
                                                            {"fooba", "Zm9vYmE="},
                                                            {"foobar", "Zm9vYmFy"}};
    for (const auto& [bytes, text] : examples) {
        CHECK(base64_encode(bytes) == text);
        CHECK(base64_decode(text) == bytes);
    }
    std::string all;
    for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
    CHECK(base64_decode(base64_encode(all)) == all);
    for (const char* wrong : {"Zg", "Zg=", "Zh==", "Zm9=", "Z===", "====", "Zm 9", "Zm9v\n", "Zg==Zg=="})
        CHECK(!base64_decode(wrong));
}

TEST_CASE_FIXTURE(Fixture, "citations: only words that stand in what was read as tokens") {
    PassageCache cache;
    std::vector<std::shared_ptr<SharedPassage>> shared;
    for (const char* text : {"The old mill stands on a hill. It was built by Nerith Vosk in 1850.",
                             "A red lantern hangs over the old door. Nobody lights it."})
        shared.push_back(cache.share(model, text, 4));
    const std::vector<Segment> segments = make_segments(model, {}, shared, "Who?", 4);
    Answer answer;
    for (size_t s = 0; s < segments.size(); ++s) {
        const auto* passage = std::get_if<PassageSegment>(&segments[s]);
        if (passage == nullptr) continue;
        for (const Chunk& chunk : passage->passage->cut(model)->chunks()) {
            ChunkReport report;
            report.segment = s;
            report.begin = chunk.begin;
            report.end = chunk.end;
            report.expanded = true;
            answer.chunks.push_back(report);
        }
    }
    const auto cited = [&](const std::string& text) {
        answer.text = text;
        std::vector<std::string> out;
        for (const Citation& citation : find_citations(model, segments, answer)) {
            std::string one = text.substr(citation.begin, citation.end - citation.begin);
            for (const size_t passage : citation.passages) one += str(" ", passage);
            out.push_back(one);
        }
        return out;
    };
    CHECK(cited("It was NERITH, Vosk!") == Ids{"NERITH, Vosk 0"});
    CHECK(cited("by nerith  vosk, they say") == Ids{"by nerith  vosk 0"});
    CHECK(cited("1850") == Ids{"1850 0"});
    CHECK(cited("the old").empty());  // three letters each: says nothing
    CHECK(cited("a red lantern and Nerith") == Ids{"a red lantern 1", "Nerith 0"});
    CHECK(cited("Elspar Rovane").empty());
    CHECK(cited("").empty());
    // What was compressed was never read.
    for (ChunkReport& chunk : answer.chunks) chunk.expanded = false;
    CHECK(cited("by Nerith Vosk").empty());
    CHECK(in_characters("\xc3\xa9t\xc3\xa9 1850", 6, 10) == std::pair<size_t, size_t>{4, 8});
}

TEST_CASE_FIXTURE(Fixture, "store: foreign, newer, missing, read-only and locked files: one clear line") {
    const auto said = [&](const std::string& file, StoreMode mode) {
        return error_of([&] {
            SqliteStore store(file, mode);
            store.stamp();
            if (mode != StoreMode::read) store.remove("x");
        });
    };
    CHECK(contains(said(dir.file("none.db"), StoreMode::read),
                   "none.db: expected a passage store, found no such file"));
    CHECK(contains(said(dir.path(), StoreMode::create), "found a directory"));
    dir.write("text.db", "hello\n");
    CHECK(contains(said(dir.file("text.db"), StoreMode::create),
                   "expected a passage store, found another file"));
    dir.write("empty.db", "");
    CHECK(contains(said(dir.file("empty.db"), StoreMode::read), "found an empty file"));
    dir.write("pdf.db", "%PDF-1.7");
    CHECK(contains(said(dir.file("pdf.db"), StoreMode::read), "found a PDF document"));
    index(some_documents());
    const std::string whole = read_file(path, 1 << 24);
    const auto with_byte = [&](size_t at, char value) {
        std::string bytes = whole;
        bytes[at] = value;
        dir.write("edited.db", bytes);
        return dir.file("edited.db");
    };
    CHECK(contains(said(with_byte(63, 9), StoreMode::read),
                   "of format 1, found format 9, which a newer refrag wrote"));
    CHECK(contains(said(with_byte(70, 1), StoreMode::read), "found another SQLite database"));
    dir.write("cut.db", whole.substr(0, whole.size() / 2 / 4096 * 4096));
    CHECK(said(dir.file("cut.db"), StoreMode::read) == said(dir.file("cut.db"), StoreMode::read));
    CHECK_NOTHROW(said(dir.file("cut.db"), StoreMode::read));
    // Another process that writes: who waits in vain says so.
    Database locker(path, {"a passage store", 0x52464753, 1, ""}, DatabaseMode::write);
    locker.execute("BEGIN IMMEDIATE");
    Database waits(path, {"a passage store", 0x52464753, 1, ""}, DatabaseMode::write, 50);
    CHECK(contains(error_of([&] { waits.execute("BEGIN IMMEDIATE"); }), "locked by another process"));
    CHECK(by_words("mill") == Ids{"mill"});  // reading goes on
    locker.execute("ROLLBACK");
}

TEST_CASE_FIXTURE(Fixture, "store: a disk that is full loses nothing that was committed") {
    index(some_documents());
    // No file of this process may grow beyond what the store has now: a write there fails, as on a full disk.
    struct rlimit old = {};
    getrlimit(RLIMIT_FSIZE, &old);
    struct sigaction ignore = {};
    ignore.sa_handler = SIG_IGN;
    struct sigaction before = {};
    sigaction(SIGXFSZ, &ignore, &before);
    std::vector<SourceDocument> many;
    for (int i = 0; i < 300; ++i)
        many.push_back(document(str("n", i), str("Text ", i, " is about barley and mills.")));
    struct rlimit tight = old;
    tight.rlim_cur = 64 << 10;
    setrlimit(RLIMIT_FSIZE, &tight);
    const std::string said = error_of([&] { index(many); });
    setrlimit(RLIMIT_FSIZE, &old);
    sigaction(SIGXFSZ, &before, nullptr);
    CHECK(contains(said, path));
    CHECK((contains(said, "no space left") || contains(said, "its disk failed")));
    CHECK(by_words("lantern") == Ids{"lantern"});
    SqliteStore store(path, StoreMode::write);
    CHECK(store.stats().n_documents == 4);
    store.verify_structure([](const std::string& problem) { FAIL(problem); });
}

TEST_CASE_FIXTURE(Fixture, "store: random bit flips are found, or change nothing that is read") {
    std::vector<SourceDocument> documents = some_documents();
    for (int i = 0; i < 30; ++i)
        documents.push_back(document(str("n", i), str("Text ", i, " of barley and lanterns.")));
    index(documents);
    std::map<std::string, std::pair<std::string, std::string>> written;
    {
        SqliteStore store(path, StoreMode::read);
        for (const StoredPassage& p : store.get(store.numbers(-1, 1000)))
            written[p.document] = {p.text, p.record};
    }
    const std::string whole = read_file(path, 1 << 24);
    std::mt19937 random(5);
    const char* env = std::getenv("REFRAG_TEST_FLIPS");
    const int rounds = env != nullptr ? std::atoi(env) : 150;
    int n_read = 0;
    int n_found = 0;
    for (int round = 0; round < rounds; ++round) {
        std::string changed = whole;
        for (int flip = 0; flip < 8; ++flip)
            changed[random() % changed.size()] ^= static_cast<char>(1 << (random() % 8));
        dir.write("flipped.db", changed);
        std::vector<int64_t> numbers;
        try {
            SqliteStore store(dir.file("flipped.db"), StoreMode::read);
            numbers = store.numbers(-1, 1000);
            store.search_words(std::vector<std::string>{"barley", "mill"}, 10, {});
            for (const int64_t n : numbers) {
                try {
                    const int64_t one[] = {n};
                    for (const StoredPassage& p : store.get(one)) {
                        // Whatever is handed out is what was written.
                        const auto at = written.find(p.document);
                        REQUIRE(at != written.end());
                        CHECK(p.text == at->second.first);
                        CHECK(p.record == at->second.second);
                        ++n_read;
                    }
                } catch (const Error& error) {
                    CHECK(error.status() != Status::usage);
                    ++n_found;
                }
            }
        } catch (const Error& error) {
            CHECK(contains(error.message(), "flipped.db"));
            ++n_found;
        }
        std::filesystem::remove(dir.file("flipped.db-wal"));
        std::filesystem::remove(dir.file("flipped.db-shm"));
    }
    CHECK(n_read > 0);
    CHECK(n_found > 0);
}
