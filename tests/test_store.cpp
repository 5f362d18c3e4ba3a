// What goes into a passage store: documents, how they are cut, conditions, citations; and SQLite files that
// are damaged, foreign, newer, locked or full. What every kind of store does is in test_store_kinds.cpp.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <random>

#include "base/dtype.h"
#include "io/base64.h"
#include "refrag/citations.h"
#include "refrag/passage_record.h"
#include "store/cutter.h"
#include "store/indexer.h"
#include "store/retrieve.h"
#include "store/sqlite_store.h"
#include "store_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

using Fixture = StoreFixture;

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
    CHECK(contains(error_of([&] {
                       SqliteStore store(dir.file("cut.db"), StoreMode::read);
                       store.get(store.numbers(-1, 100));
                   }),
                   "cut.db: damaged"));
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
