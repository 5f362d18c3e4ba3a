// The chunk-embedding cache that outlives a process: a directory with one SQLite file of passage records
// (passage_record.h), named by what made them, so that a hit is never wrong. Any number of processes share
// it. What is damaged is a miss; what is beyond the size is let go of, the longest unused first.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "refrag/passage_keeper.h"
#include "store/database.h"

namespace refrag {

// Takes one line, once, when a cache cannot do its work: the program goes on without it.
using CacheWarning = std::function<void(const std::string&)>;

inline constexpr uint64_t default_record_cache_bytes = uint64_t{4} << 30;

class RecordCache : public PassageKeeper {
  public:
    // Makes the directory where it is missing. A damaged cache file is thrown away and begun anew; a file
    // that is something else is Status::bad_input. Status::runtime where there can be no cache: no right to
    // write, a full disk.
    RecordCache(const std::string& dir, EmbeddingForm form, uint64_t max_bytes = default_record_cache_bytes,
                CacheWarning warn = {});
    // Writes what waits. A file that was found damaged is removed.
    ~RecordCache() override;

    EmbeddingForm form() const noexcept override { return form_; }
    std::optional<std::string> find(const Sha256Digest& key) noexcept override;
    void forget(const Sha256Digest& key) noexcept override;
    // Written behind, in the order they came; what comes faster than the disk takes it is dropped.
    void keep(const Sha256Digest& key, std::string record) noexcept override;

    // Returns when all that was kept so far is written, or dropped.
    void flush();
    std::string path() const { return path_; }

  private:
    struct Entry {
        Sha256Digest key;
        std::string record;  // empty: to be forgotten
    };
    void open();
    void write_behind();
    void write(const std::vector<Entry>& entries);
    uint64_t used_bytes();
    void evict();
    // Says what is wrong, once. Damage ends the cache's work; a lock or a full disk may pass.
    void complain(const Error& error) noexcept;

    const std::string path_;
    const EmbeddingForm form_;
    const uint64_t max_bytes_;
    const CacheWarning warn_;

    std::mutex read_mutex_;  // of the reading connection
    std::unique_ptr<Database> reader_;
    std::unique_ptr<Database> writer_;  // the thread's

    std::mutex mutex_;  // of all that follows
    std::condition_variable changed_;
    std::vector<Entry> waiting_;
    std::unordered_map<Sha256Digest, std::string, Sha256DigestHash> unwritten_;
    uint64_t unwritten_bytes_ = 0;
    bool writing_ = false;
    bool stop_ = false;
    bool warned_ = false;
    bool broken_ = false;
    std::thread thread_;
};

}  // namespace refrag
