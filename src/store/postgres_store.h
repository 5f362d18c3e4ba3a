// A passage store in PostgreSQL, for many writers and readers on many machines. Its tables are described in
// postgres_schema.sql; they lie in a schema of their own, made by StoreMode::create.
//
//   writers    any number at a time. Of two that put the same document the last one wins, whole: its row is
//              locked while its passages are exchanged.
//   search     BM25 with FTS5's formula, k1 = 1.2, b = 0.75, a word in the title counted twice, and stems by
//              Porter as there: the SQLite store gives the same scores, but for words with accents (kept
//              here) and for one character between letters that is a digit to one and not to the other.
//   a server that goes away  is Status::runtime. Who reads connects again by himself; a transaction that was
//              open is lost, and says so.
//
// No state is kept in a session, so that a pooler of transactions (PgBouncer) may stand between.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "store/passage_store.h"
#include "store/postgres.h"

namespace refrag {

class PostgresStore : public PassageStore {
  public:
    // place: see parse_postgres_place().
    PostgresStore(const std::string& place, StoreMode mode);
    ~PostgresStore() override;

    const std::string& name() const override { return place_.name; }
    std::optional<StoreStamp> stamp() override;

    void begin() override;
    void commit() override;
    void rollback() noexcept override;
    void set_stamp(const StoreStamp& stamp) override;
    StoreStamp stamp_if_empty(const StoreStamp& stamp) override;
    // Within begin() and commit() written with those that follow, by COPY.
    void put(const Document& document, std::span<const NewPassage> passages) override;
    bool remove(std::string_view id) override;
    void replace_record(int64_t n, std::string_view record, std::span<const float> vector) override;

    std::optional<Document> find(std::string_view id) override;
    void for_each_document(const std::function<void(const Document&)>& use) override;
    std::vector<Found> search_words(std::span<const std::string> words, int64_t limit,
                                    const Filter& filter) override;
    void for_each_vector(const Filter& filter,
                         const std::function<void(int64_t n, std::span<const uint16_t>)>& use) override;
    std::vector<StoredPassage> get(std::span<const int64_t> numbers) override;
    std::vector<int64_t> numbers(int64_t after, int64_t limit) override;
    StoreStats stats() override;
    // Of indexes and pages the server has its own checks (amcheck, data checksums).
    void verify_structure(const std::function<void(const std::string&)>& problem) override;
    int64_t version() override;

  private:
    void write_stamp(const StoreStamp& stamp, const std::string& on_conflict);
    class Change;
    struct Waiting {
        Document document;
        std::vector<NewPassage> passages;
    };
    // begun: the server has not heard of it. lost: what was written since begin() is gone; rollback() ends
    // it.
    enum class TransactionState { none, begun, open, lost };
    // Of a question's stems.
    struct WordCounts {
        std::vector<double> idf;
        double mean_words = 1.0;  // of a passage
    };

    void make_schema();
    void check_format();
    template <typename Body>
    auto reading(Body&& body);
    void read_rows(const std::string& sql, const PostgresParameters& parameters,
                   const std::function<void(const PostgresResult& row)>& use);
    // Of words that index_words() gave.
    std::vector<std::string> stems_of(PostgresConnection& connection, const std::vector<std::string>& words);
    WordCounts count_words(const std::vector<std::string>& stems);
    std::vector<Found> best_passages(const std::vector<std::string>& stems, const WordCounts& counts,
                                     const std::vector<std::string>& candidates, int64_t limit,
                                     const Filter& filter);
    StoredPassage read_passage(const PostgresResult& rows, int64_t row) const;
    void check_words(const std::function<void(const std::string&)>& problem);

    // With write_mutex_ held.
    void open_transaction();
    void end_transaction();
    void abort() noexcept;
    void flush();
    std::vector<int64_t> upsert_documents();
    void insert_passages(const std::vector<int64_t>& documents);
    void remove_passages(std::span<const int64_t> documents);

    const PostgresPlace place_;
    const bool writes_;
    std::mutex write_mutex_;
    PostgresConnection write_;
    TransactionState state_ = TransactionState::none;
    std::vector<Waiting> waiting_;
    std::unordered_map<std::string, size_t> waiting_places_;  // by id
    size_t waiting_bytes_ = 0;
    int64_t passages_added_ = 0;  // by this transaction
    int64_t words_added_ = 0;
    std::mutex read_mutex_;
    PostgresConnection read_;
    std::mutex stem_mutex_;
    std::unordered_map<std::string, std::string> stems_;
};

}  // namespace refrag
