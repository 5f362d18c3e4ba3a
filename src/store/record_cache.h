// The chunk-embedding cache that outlives a process: a directory with one SQLite file of passage records
// (passage_record.h), named by what made them, so that a hit is never wrong. Any number of processes share
// it. What is damaged is a miss; what is beyond the size is let go of, the longest unused first.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "store/database.h"
#include "store/write_behind.h"

namespace refrag {

inline constexpr uint64_t default_record_cache_bytes = uint64_t{4} << 30;

class RecordCache : public WriteBehind {
  public:
    // Makes the directory where it is missing. A damaged cache file is thrown away and begun anew; a file
    // that is something else is Status::bad_input. Status::runtime where there can be no cache: no right to
    // write, a full disk.
    RecordCache(const std::string& dir, EmbeddingForm form, uint64_t max_bytes = default_record_cache_bytes,
                CacheWarning warn = {});
    // Writes what waits. A file that was found damaged is removed.
    ~RecordCache() override;

    std::string path() const { return path_; }

  private:
    std::optional<std::string> look_up(const Sha256Digest& key) override;
    void write(const std::vector<Entry>& entries) override;
    void open();
    uint64_t used_bytes();
    void evict();

    const std::string path_;
    const uint64_t max_bytes_;

    std::mutex read_mutex_;  // of the reading connection
    std::unique_ptr<Database> reader_;
    std::unique_ptr<Database> writer_;  // the thread's
};

}  // namespace refrag
