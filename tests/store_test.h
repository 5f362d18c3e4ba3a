// What the tests of passage stores share: a store over the tiny model, some documents, and tests that every
// kind of store goes through.
#pragma once

#include <doctest/doctest.h>

#include "golden.h"
#include "postgres_server.h"
#include "store/indexer.h"
#include "store/retrieve.h"
#include "support.h"

namespace refrag_test {

using namespace refrag;

// A store over the tiny model: a SQLite file, or a schema of its own in PostgreSQL.
struct StoreFixture : TinyRefrag {
    TempDir dir;
    std::string path = dir.file("s.db");  // or a URL
    IndexOptions options{.passage_tokens = 40, .chunk_len = 4};

    // False, and SKIP is said, where no server can be started.
    bool use_postgres() {
#ifdef REFRAG_WITH_POSTGRES
        PostgresServer* const server = PostgresServer::shared();
        if (server == nullptr) return false;
        path = server->url(server->new_schema());
        return true;
#else
        skip("built without PostgreSQL");
        return false;
#endif
    }
    IndexCounts index(std::vector<SourceDocument> documents) {
        const auto opened = open_store(path, StoreMode::create);
        PassageStore& store = *opened;
        Indexer indexer(store, model, options);
        for (SourceDocument& document : documents) indexer.add(std::move(document));
        indexer.finish();
        return indexer.counts();
    }
    std::vector<std::string> found(std::string_view question, const RetrieveOptions& how) {
        const auto opened = open_store(path, StoreMode::read);
        PassageStore& store = *opened;
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

inline SourceDocument document(const std::string& id, const std::string& text,
                               const std::string& metadata = "{}") {
    SourceDocument out;
    out.id = id;
    out.text = text;
    out.metadata = metadata;
    return out;
}

inline std::vector<SourceDocument> some_documents() {
    return {
        document("mill", "The old mill stands on a hill above the river.", R"({"year": 1850, "lang": "en"})"),
        document("lantern", "A red lantern hangs over the door.", R"({"year": 1921, "lang": "en"})"),
        document("ship", "Ships carry barley to the town.",
                 R"({"year": 1999.5, "lang": "de", "at": {"port": "North"}})"),
        document("signs", "AND OR NOT \"quoted\" - * what")};
}

using Ids = std::vector<std::string>;

}  // namespace refrag_test

// A test over each kind of store. ID names its fixture.
#define TEST_EVERY_STORE(id, name)                \
    namespace {                                   \
    struct id : refrag_test::StoreFixture {       \
        void body();                              \
    };                                            \
    }                                             \
    TEST_CASE_FIXTURE(id, name " (SQLite)") {     \
        body();                                   \
    }                                             \
    TEST_CASE_FIXTURE(id, name " (PostgreSQL)") { \
        if (use_postgres()) body();               \
    }                                             \
    void id::body()
