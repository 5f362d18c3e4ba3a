// A passage store in one SQLite file: tables, a full-text index (FTS5), a log beside it while it is open
// (WAL). Readers go on while one process writes; a second writer waits.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "store/database.h"
#include "store/passage_store.h"

namespace refrag {

class SqliteStore : public PassageStore {
  public:
    SqliteStore(const std::string& path, StoreMode mode);
    ~SqliteStore() override;

    const std::string& name() const override { return path_; }
    std::optional<StoreStamp> stamp() override;

    void begin() override;
    void commit() override;
    void rollback() noexcept override;
    void set_stamp(const StoreStamp& stamp) override;
    StoreStamp stamp_if_empty(const StoreStamp& stamp) override;
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
    void verify_structure(const std::function<void(const std::string&)>& problem) override;
    int64_t version() override;

  private:
    class Change;  // a transaction of its own, where none is under way
    struct Writer;
    Writer& writer();
    void remove_passages(int64_t document);
    void write_stamp(const StoreStamp& stamp);  // under write_mutex_
    StoredPassage read_passage(const Statement& row) const;
    void check_vectors(const std::function<void(const std::string&)>& problem);

    const std::string path_;
    // One connection writes and one reads, so that lookups go on while a batch is written.
    std::mutex write_mutex_;
    std::unique_ptr<Database> write_;
    std::unique_ptr<Writer> statements_;
    std::unique_ptr<Transaction> transaction_;
    std::mutex read_mutex_;
    std::unique_ptr<Database> read_;
};

}  // namespace refrag
