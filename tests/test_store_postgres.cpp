// The passage store in PostgreSQL, where it is more than the SQLite file: many writers at once, a server that
// goes away and comes back, users and passwords, hostile bytes, tables that somebody changed.
#include <atomic>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "base/dtype.h"
#include "cli_test.h"
#include "store/postgres_store.h"
#include "store/postgres_words.h"
#include "store/sqlite_store.h"
#include "store_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// A schema of its own, made.
struct Fixture {
    PostgresServer* server = PostgresServer::shared();
    std::string schema = server != nullptr ? server->new_schema() : "";
    std::string url = server != nullptr ? server->url(schema) : "";
    std::unique_ptr<PassageStore> store = server != nullptr ? open_store(url, StoreMode::create) : nullptr;

    PostgresResult sql(std::string text) const {
        for (size_t at = 0; (at = text.find('@')) != std::string::npos;) text.replace(at, 1, schema + ".");
        return server->sql(text);
    }
    std::vector<std::string> problems() const {
        std::vector<std::string> said;
        store->verify_structure([&](const std::string& line) { said.push_back(line); });
        return said;
    }
};

// `n` passages that say who wrote them.
std::vector<NewPassage> passages_by(const std::string& writer, int n) {
    std::vector<NewPassage> passages;
    for (int i = 0; i < n; ++i) {
        NewPassage passage;
        passage.begin = i;
        passage.end = i + 1;
        passage.title = i % 2 == 0 ? "Mills" : "";
        passage.text = str("Written by ", writer, ", part ", i);
        passage.record = str("record of ", writer, " ", i);
        passage.vector = {1.0f, static_cast<float>(i)};
        passages.push_back(std::move(passage));
    }
    return passages;
}

Document named(const std::string& id, const std::vector<NewPassage>& passages) {
    Document out;
    out.id = id;
    out.hash = sha256(id);
    out.n_passages = std::ssize(passages);
    return out;
}

void put(PassageStore& store, const std::string& id, const std::vector<NewPassage>& passages) {
    store.put(named(id, passages), passages);
}

NewPassage text_passage(const std::string& title, const std::string& text) {
    NewPassage passage;
    passage.title = title;
    passage.text = text;
    passage.record = "r";
    return passage;
}

std::vector<StoredPassage> all_of(PassageStore& store) {
    return store.get(store.numbers(-1, 1000000));
}

}  // namespace

TEST_CASE_FIXTURE(Fixture, "PostgreSQL: BM25 gives the SQLite store's scores") {
    if (server == nullptr) return;
    const TempDir dir;
    SqliteStore file(dir.file("s.db"), StoreMode::create);
    const std::vector<std::string> vocabulary = {"the",  "mill",  "mills",    "running", "lantern",
                                                 "hill", "river", "national", "barley",  "quickly",
                                                 "1850", "x7",    "of",       "ship"};
    std::mt19937 random(17);
    for (int i = 0; i < 120; ++i) {
        std::string text = "the";  // in every passage
        for (size_t n = random() % 40; n > 0; --n) text += " " + vocabulary[random() % vocabulary.size()];
        const std::vector<NewPassage> passages = {
            text_passage(i % 3 == 0 ? vocabulary[random() % vocabulary.size()] : "", text)};
        Document document = named(str("d", i), passages);
        document.metadata = str("{\"year\": ", 1900 + i, "}");
        for (PassageStore* to : {static_cast<PassageStore*>(&file), store.get()}) to->put(document, passages);
    }
    const auto by_document = [](PassageStore& from, const std::vector<std::string>& words, int64_t limit,
                                const Filter& filter) {
        std::vector<std::pair<std::string, double>> out;
        for (const Found& found : from.search_words(words, limit, filter)) {
            const int64_t one[] = {found.n};
            out.emplace_back(from.get(one).at(0).document, found.score);
        }
        return out;
    };
    using Words = std::vector<std::string>;
    for (const Words& words :
         {Words{"mill"}, Words{"mills", "run"}, Words{"the"}, Words{"the", "lanterns", "1850"},
          Words{"nation", "quick", "x7", "ship", "zebra"}, Words{"mill", "mills"}}) {
        for (const Filter& filter : {Filter{}, Filter{parse_condition("year<1950")}}) {
            for (const int64_t limit : {1, 10, 1000}) {
                const auto expected = by_document(file, words, limit, filter);
                const auto found = by_document(*store, words, limit, filter);
                REQUIRE(found.size() == expected.size());
                CHECK(!found.empty());
                for (size_t i = 0; i < found.size(); ++i) {
                    // Sums of a few products in double, in another order.
                    CHECK(found[i].second == doctest::Approx(expected[i].second).epsilon(1e-12));
                    if (words != Words{"the"}) CHECK(found[i].first == expected[i].first);
                }
            }
        }
    }
}

TEST_CASE_FIXTURE(Fixture,
                  "PostgreSQL: many writers of other and of the same documents: the last one wins, whole") {
    if (server == nullptr) return;
    constexpr int kWriters = 4;
    constexpr int kRounds = 25;
    std::atomic<int> n_failed = 0;
    std::atomic<bool> stop = false;
    std::thread reader([&] {
        const auto own = open_store(url, StoreMode::read);
        while (!stop) {
            // Within a statement, a document is one writer's.
            for (const StoredPassage& p : all_of(*own))
                n_failed += contains(p.record, p.text.substr(11, 1)) ? 0 : 1;
            own->search_words(std::vector<std::string>{"written", "mills"}, 10, {});
        }
    });
    std::vector<std::thread> writers;
    for (int w = 0; w < kWriters; ++w) {
        writers.emplace_back([&, w] {
            try {
                const auto own = open_store(url, StoreMode::write);
                const std::string me(1, static_cast<char>('A' + w));
                for (int round = 0; round < kRounds; ++round) {
                    own->begin();
                    // The same ones in an order of each one's own, and one alone.
                    for (int i = 0; i < 4; ++i)
                        put(*own, str("shared", (i * (w + 1) + round) % 5),
                            passages_by(me, 1 + (w + round) % 6));
                    put(*own, str("own ", me, " ", round), passages_by(me, 2));
                    own->commit();
                    if (round % 5 == 4) own->remove(str("shared", round % 3));
                }
            } catch (const Error& error) {
                std::printf("%s\n", error.what());
                ++n_failed;
            }
        });
    }
    for (std::thread& writer : writers) writer.join();
    stop = true;
    reader.join();
    CHECK(n_failed == 0);
    CHECK(problems().empty());
    std::map<std::string, std::set<std::string>> records;
    std::map<std::string, int64_t> n_passages;
    for (const StoredPassage& p : all_of(*store)) {
        records[p.document].insert(p.text.substr(11, 1));
        ++n_passages[p.document];
    }
    int n_own = 0;
    store->for_each_document([&](const Document& document) {
        CHECK(records[document.id].size() == 1);
        CHECK(n_passages[document.id] == document.n_passages);
        n_own += document.id.starts_with("own ") ? 1 : 0;
    });
    CHECK(n_own == kWriters * kRounds);
}

TEST_CASE("PostgreSQL: a schema that several make at once is made once") {
    PostgresServer* const server = PostgresServer::shared();
    if (server == nullptr) return;
    const std::string url = server->url(server->new_schema());
    std::atomic<int> n_failed = 0;
    std::vector<std::thread> makers;
    for (int i = 0; i < 6; ++i) {
        makers.emplace_back([&] {
            try {
                open_store(url, StoreMode::create)->remove("x");
            } catch (const Error& error) {
                std::printf("%s\n", error.what());
                ++n_failed;
            }
        });
    }
    for (std::thread& maker : makers) maker.join();
    CHECK(n_failed == 0);
}

TEST_CASE_FIXTURE(Fixture, "PostgreSQL: any bytes are kept, and no word, key or value is syntax") {
    if (server == nullptr) return;
    const std::string hard =
        std::string("a\0b\xff'; DROP TABLE documents; --\\", 32) + std::string(9000, 'i');
    std::vector<NewPassage> passages = {text_passage(hard, hard + " mill"),
                                        text_passage("", std::string(3, '\0'))};
    std::string huge;  // more than a tsvector's megabyte of words, one of them longer than a lexeme may be
    for (int i = 0; i < 200000; ++i) huge += str("word", i, " ");
    passages.push_back(text_passage("Gigantic", huge + std::string(5000, 'z') + " and a end end"));
    Document document = named(hard, passages);
    document.source = hard;
    document.title = hard;
    document.metadata = R"({"k'\"\\ey": "v\u0000'x", "n": 3, "back": "\\u0000"})";
    store->put(document, passages);
    const Document back = *store->find(hard);
    CHECK(back.id == hard);
    CHECK(back.metadata == document.metadata);
    CHECK(back.hash == document.hash);
    const std::vector<StoredPassage> stored = all_of(*store);
    REQUIRE(stored.size() == 3);
    CHECK(stored[0].text == passages[0].text);
    CHECK(stored[1].text == passages[1].text);
    CHECK(stored[2].text == huge + std::string(5000, 'z') + " and a end end");
    CHECK(problems().empty());
    const auto n_found = [&](const std::string& word, const std::vector<std::string>& where = {}) {
        Filter filter;
        for (const std::string& text : where) filter.push_back(parse_condition(text));
        return store->search_words(std::vector<std::string>{word}, 10, filter).size();
    };
    CHECK(n_found("mill") == 1);
    CHECK(n_found("word77") == 1);
    CHECK(n_found("Gigantic") == 1);
    for (const char* nothing : {"", "'", "\\", "!", "& | !", ":*", "(", "\xff", "'' | ''", "mill'x:*"})
        CHECK(n_found(nothing) == (std::string(nothing).starts_with("mill") ? 1 : 0));
    CHECK(n_found(std::string("\0mill", 5)) == 1);
    CHECK(n_found("mill", {"n=3"}) == 1);
    CHECK(n_found("mill", {"n=3' OR '1'='1"}) == 0);
    CHECK(n_found("mill", {"n' = '3"}) == 0);
    CHECK(n_found("mill", {"\xff!=\xff"}) == 1);
    CHECK(n_found("mill", {"back=\\u0000"}) == 1);
    CHECK(store->remove(hard));
    CHECK(store->stats().n_passages == 0);
    CHECK(problems().empty());
}

TEST_CASE_FIXTURE(Fixture, "PostgreSQL: --where has the SQLite store's rules of types") {
    if (server == nullptr) return;
    const TempDir dir;
    SqliteStore file(dir.file("s.db"), StoreMode::create);
    const std::vector<std::string> values = {
        "1",      "1.0", "true", "false", "null",           "\"1\"",       "\"true\"",
        "-2.5e3", "[1]", "{}",   "\"\"",  "{\"b\": \"x\"}", "\"\\u00e9\"", "1e300"};
    std::vector<NewPassage> passages = {text_passage("", "mill")};
    for (size_t i = 0; i <= values.size(); ++i) {
        Document document = named(str("d", i), passages);
        if (i < values.size()) document.metadata = "{\"a\": " + values[i] + "}";
        file.put(document, passages);
        store->put(document, passages);
    }
    const auto fulfil = [](PassageStore& from, const std::string& condition) {
        std::set<std::string> ids;
        for (const Found& found :
             from.search_words(std::vector<std::string>{"mill"}, 100, {parse_condition(condition)})) {
            const int64_t one[] = {found.n};
            ids.insert(from.get(one).at(0).document);
        }
        return ids;
    };
    size_t n_some = 0;
    for (const char* key : {"a", "a.b", "none", "a.0"}) {
        for (const char* op : {"=", "!=", "<", "<=", ">", ">="}) {
            for (const char* value :
                 {"1", "0", "true", "null", "x", "\"1\"", "\"\"", "1e300", "-2500", "\xc3\xa9"}) {
                const std::string condition = str(key, op, value);
                CAPTURE(condition);
                if (error_of([&] { parse_condition(condition); }) != "(no error)") continue;
                const std::set<std::string> expected = fulfil(file, condition);
                CHECK(fulfil(*store, condition) == expected);
                n_some += !expected.empty() && expected.size() <= values.size() ? 1 : 0;
            }
        }
    }
    CHECK(n_some > 20);
}

TEST_CASE_FIXTURE(Fixture, "PostgreSQL: the server goes away and comes back") {
    if (server == nullptr) return;
    put(*store, "kept", passages_by("K", 3));
    const auto reader = open_store(url, StoreMode::read);
    CHECK(all_of(*reader).size() == 3);
    const int64_t version = reader->version();
    // An open transaction is lost, whatever of it had reached the server.
    store->begin();
    put(*store, "lost", passages_by("L", 2));
    CHECK(store->remove("kept"));
    server->crash();
    const std::string away = error_of([&] { all_of(*reader); });
    CHECK(contains(away, "postgresql:///postgres?host="));
    CHECK(contains(away, "#" + schema + ": cannot be reached ("));
    CHECK(away.find('\n') == std::string::npos);
    const std::string lost = error_of([&] { store->commit(); });
    CHECK(contains(lost, "the connection was lost ("));
    CHECK(contains(lost, "the transaction that was open is lost, nothing of it was kept"));
    // Until it is given up, nothing more can be written.
    CHECK(contains(error_of([&] { put(*store, "more", {}); }), "the transaction is lost"));
    CHECK(contains(error_of([&] { store->commit(); }), "the transaction is lost"));
    store->rollback();
    CHECK(contains(error_of([&] { put(*store, "more", {}); }), "cannot be reached"));
    CHECK(contains(error_of([&] { open_store(url, StoreMode::read); }), "cannot be reached"));
    server->start();
    // Nobody is opened anew.
    CHECK(all_of(*reader).size() == 3);
    CHECK(reader->version() == version);
    CHECK(!reader->find("lost"));
    put(*store, "more", passages_by("M", 1));
    CHECK(all_of(*reader).size() == 4);
    CHECK(reader->version() > version);
    // Between two calls: neither reader nor writer notices.
    server->crash();
    server->start();
    CHECK(all_of(*reader).size() == 4);
    put(*store, "again", passages_by("N", 1));
    CHECK(all_of(*reader).size() == 5);
    CHECK(problems().empty());
    // In the middle of a scan, after rows were handed out: an end, and no row twice.
    put(*store, "many", passages_by("O", 20000));
    int64_t n_seen = 0;
    const std::string broken = error_of([&] {
        reader->for_each_vector({}, [&](int64_t, std::span<const uint16_t>) {
            if (++n_seen == 1) server->crash();
        });
    });
    CHECK(contains(broken, "the connection was lost ("));
    CHECK(n_seen >= 1);
    CHECK(n_seen < 20005);
    server->start();
    n_seen = 0;
    int64_t last = -1;
    reader->for_each_vector({}, [&](int64_t n, std::span<const uint16_t> vector) {
        CHECK(n > last);
        CHECK(vector.size() == 2);
        last = n;
        ++n_seen;
    });
    CHECK(n_seen == 20005);
    // Who stops a scan in the middle goes on with the next call.
    CHECK_THROWS_AS(reader->for_each_vector({}, [](int64_t, std::span<const uint16_t>) { throw 1; }), int);
    CHECK(reader->numbers(-1, 10).size() == 10);
}

TEST_CASE_FIXTURE(Fixture, "PostgreSQL: what somebody changed in the tables is found") {
    if (server == nullptr) return;
    put(*store, "a", passages_by("A", 3));
    put(*store, "b", passages_by("B", 3));
    CHECK(problems().empty());
    const auto refused = [&](const std::string& change) {
        sql(change);
        size_t n = 0;
        for (const int64_t number : store->numbers(-1, 100)) {
            const std::string said = error_of([&] { store->get({&number, 1}); });
            if (contains(said, "is not what was written: index that document again")) ++n;
        }
        return n;
    };
    for (const char* column : {"record", "text", "title || 'x'::bytea"}) {
        CAPTURE(column);
        const std::string name = std::string(column).substr(0, std::string(column).find(' '));
        const std::string changed =
            name == "title" ? "title = title || 'x'::bytea" : name + " = set_byte(" + name + ", 3, 0)";
        CHECK(refused("UPDATE @passages SET " + changed + " WHERE place = 1") == 2);
        put(*store, "a", passages_by("A", 3));
        put(*store, "b", passages_by("B", 3));
        CHECK(refused("SELECT 1") == 0);
    }
    const auto found = [&](const std::string& change, const std::string& problem) {
        sql(change);
        const std::vector<std::string> said = problems();
        REQUIRE(said.size() == 1);
        CHECK(contains(said[0], problem));
        put(*store, "a", passages_by("A", 3));
        put(*store, "b", passages_by("B", 3));
    };
    found("UPDATE @documents SET metadata = '{\"x\": 1}', fields = '{\"x\": 1}' WHERE id = 'a'",
          "document a: not what was written");
    found("UPDATE @documents SET fields = '{\"x\": 1}' WHERE id = 'a'", "document a: its fields are not");
    found("UPDATE @vectors SET vector = set_byte(vector, 1, 7) WHERE n = (SELECT min(n) FROM @vectors)",
          ": not what was written");
    found("UPDATE @passages SET words = 'other:1' WHERE n = (SELECT min(n) FROM @passages)",
          ": not those of its text");
    CHECK(problems().empty());
    sql("DELETE FROM @documents WHERE id = 'b'");
    REQUIRE(problems().size() == 1);
    CHECK(contains(problems()[0], "the counters do not fit the passages"));
    sql("DROP TABLE @vectors");
    CHECK(contains(error_of([&] { store->stats(); }), "damaged, or not a passage store ("));
}

TEST_CASE_FIXTURE(Fixture, "PostgreSQL: newer, foreign, missing, forbidden: one clear line") {
    if (server == nullptr) return;
    const auto said = [&](const std::string& place, StoreMode mode) {
        try {
            const auto opened = open_store(place, mode);
            if (mode != StoreMode::read) opened->remove("x");
        } catch (const Error& error) {
            CHECK(error.message().find('\n') == std::string::npos);
            CHECK(!contains(error.message(), "secret"));
            return str(static_cast<int>(error.status()), " ", error.message());
        }
        return std::string("(no error)");
    };
    const std::string bad = str(static_cast<int>(Status::bad_input), " ");
    const std::string runtime = str(static_cast<int>(Status::runtime), " ");
    const std::string usage = str(static_cast<int>(Status::usage), " ");
    CHECK(contains(said(server->url("none"), StoreMode::read),
                   "#none: expected a passage store, found no such schema (refrag index makes it)"));
    CHECK(said(server->url("none"), StoreMode::write).starts_with(bad));
    server->sql("CREATE SCHEMA other");
    server->sql("CREATE TABLE other.notes (n int)");
    CHECK(contains(said(server->url("other"), StoreMode::create), "found a schema with other tables"));
    sql("UPDATE @format SET format = 9");
    CHECK(contains(said(url, StoreMode::create), "of format 1, found format 9, which a newer refrag wrote"));
    sql("UPDATE @format SET format = 1");
    CHECK(said(url, StoreMode::create) == "(no error)");

    // Users: one with a password, who may look and not write.
    server->sql("CREATE ROLE guarded LOGIN PASSWORD 'secret'");
    const std::string at = "@/postgres?host=" + server->dir() + "#" + schema;
    CHECK(contains(said("postgresql://guarded:secretx" + at, StoreMode::read),
                   "password authentication failed"));
    CHECK(said("postgresql://guarded:secretx" + at, StoreMode::read).starts_with(runtime));
    CHECK(contains(said("postgresql://guarded" + at, StoreMode::read), "no password supplied"));
    CHECK(contains(said("postgresql://guarded:secret" + at, StoreMode::read), "no right to do that ("));
    sql("GRANT USAGE ON SCHEMA " + schema + " TO guarded");
    sql("GRANT SELECT ON ALL TABLES IN SCHEMA " + schema + " TO guarded");
    CHECK(said("postgresql://guarded:secret" + at, StoreMode::read) == "(no error)");
    CHECK(contains(said("postgresql://guarded:secret" + at, StoreMode::write), "no right to do that ("));
    CHECK(contains(said(server->url("fresh", "guarded:secret"), StoreMode::create), "no right to do that ("));

    CHECK(contains(said(server->url("refrag", "postgres", "nowhere"), StoreMode::read),
                   "database \"nowhere\" does not exist"));
    CHECK(contains(said("postgresql://u:secret@127.0.0.1:1/x", StoreMode::read),
                   "postgresql://127.0.0.1:1/x#refrag: cannot be reached ("));
    CHECK(contains(said("postgres:///x?host=" + server->dir() + "/none", StoreMode::read),
                   "cannot be reached ("));
    for (const char* wrong :
         {"postgresql://u:secret@[::1/x", "postgresql://u:secret%zz@h/x", "postgres://h/x?nix=secret@",
          "postgresql://h/x#Refrag", "postgresql://u:p#secret@h/x", "postgresql://h/x#pg_catalog",
          "postgresql://h/x#a\"b"}) {
        CAPTURE(wrong);
        CHECK(said(wrong, StoreMode::create).starts_with(usage));
    }
    CHECK(contains(error_of([&] { open_store(url, StoreMode::read)->remove("x"); }),
                   "opened for reading alone"));
    // A writer who waits too long for another.
    const auto holder = open_store(url, StoreMode::write);
    put(*store, "held", passages_by("H", 1));
    holder->begin();
    CHECK(holder->remove("held"));
    const std::string hasty =
        "postgresql://postgres" + at.substr(0, at.find('#')) + "&options=-clock_timeout%3D50#" + schema;
    CHECK(contains(said(hasty, StoreMode::write), "(no error)"));
    const auto waits = open_store(hasty, StoreMode::write);
    CHECK(contains(error_of([&] { waits->remove("held"); }), "another writer was in the way"));
    holder->rollback();
    CHECK(waits->remove("held"));
    CHECK(problems().empty());
}

TEST_CASE("PostgreSQL: words become the vector that the server would make") {
    PostgresServer* const server = PostgresServer::shared();
    if (server == nullptr) return;
    PostgresConnection connection(parse_postgres_place(server->url()));
    connection.connect();
    const auto given = [&](const std::vector<std::string>& title, const std::vector<std::string>& text,
                           const std::string& literal) {
        PostgresParameters values;
        const std::string made = values.add_text(literal) + "::tsvector";
        return word_vector(title, text) == connection.run("SELECT " + made, values).bytes(0, 0);
    };
    CHECK(given({}, {}, ""));
    CHECK(given({"mill"}, {"mill", "ab", "a", "b", "mill"}, "mill:1A,2,6 ab:3 a:4 b:5"));
    CHECK(given({}, {"\xc3\xa9t\xc3\xa9", "z"}, "\xc3\xa9t\xc3\xa9:1 z:2"));
    const std::vector<std::string> many(300, "x");
    std::string positions = "x:1";
    for (int i = 2; i <= 255; ++i) positions += str(",", i);
    CHECK(given({}, many, positions));
    std::vector<std::string> far(16382, "x");
    for (const char* last : {"y", "y", "y", "z"}) far.emplace_back(last);
    CHECK(given({}, far, positions + " y:16383 z:16383"));
    CHECK(any_of(std::vector<std::string>{"a", "b'c\\"}) == "'a' | 'b''c\\\\'");
    CHECK(index_words("The MILL's a/b.c \xff 12e5") ==
          std::vector<std::string>{"the", "mill", "s", "a", "b", "c", "12e5"});
    const std::string wide = index_words(std::string(499, 'a') + "\xc3\xa9\xc3\xa9").at(0);
    CHECK(wide == std::string(499, 'a'));
}

TEST_CASE_FIXTURE(Fixture, "PostgreSQL: index and ask as a user runs them; passwords are in no message") {
    if (server == nullptr) return;
    TempDir dir;
    dir.write("p.jsonl", kPassages);
    const auto refrag = [&](const std::string& command, const std::string& place, const std::string& rest) {
        return refrag_run(dir, command + " '" + place + "' " + rest);
    };
    const std::string place = server->url("by_command");
    const Ran made = refrag("index", place, dir.file("p.jsonl") + " " + kModel + "-k 4");
    CHECK(made.code == 0);
    CHECK(contains(made.err, "documents 2: new 2, changed 0, unchanged 0"));
    CHECK(contains(refrag("index", place, dir.file("p.jsonl") + " " + kModel + "-k 4").err, "unchanged 2"));
    CHECK(refrag("index", place, "--verify").out == "whole: 2 passages\n");
    CHECK(contains(refrag("index", place, "--stats").out, "passages    2\n"));
    // The answer of a store in a file.
    CHECK(refrag("index", dir.file("s.db"), dir.file("p.jsonl") + " " + kModel + "-k 4").code == 0);
    const std::string question = std::string(kModel) + "-q 'Where is the mill?' -n 4";
    const Ran answer = refrag("ask", place, question);
    CHECK(answer.code == 0);
    CHECK(answer.out == refrag("ask", dir.file("s.db"), question).out);
    const auto fails = [&](const Ran& ran, int code, const std::string& part) {
        CHECK(ran.code == code);
        CHECK(contains(ran.err, part));
        CHECK(std::count(ran.err.begin(), ran.err.end(), '\n') == 1);
        CHECK(!contains(ran.err, "secret"));
    };
    const std::string with_password = server->url("by_command", "postgres:secret");
    fails(refrag("index", with_password, "--delete nobody"), 3, "#by_command: no document of the id nobody");
    fails(refrag("ask", server->url(schema, "postgres:secret"), question), 3,
          ": nothing has been indexed yet");
    fails(refrag("ask", "postgresql://u:secret@127.0.0.1:1/x", question), 1, "cannot be reached");
    fails(refrag("ask", server->url("refrag", "postgres:secret", "nowhere"), question), 1, "does not exist");
    fails(refrag("ask", "postgresql://u:secret@h/x#No", question), 2, "expected a schema of small letters");
}
