// Passages that clients put under a name of their own, encoded once and referred to by id. They live as long
// as the process; their embeddings outlive it in the cache (--cache).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "refrag/passage.h"
#include "refrag/passages.h"

namespace refrag {

struct KeptPassage {
    Passage passage;
    std::shared_ptr<SharedPassage> shared;
    int64_t created = 0;  // seconds since 1970
};

// Any number of threads may use it at the same time.
class PassageTable {
  public:
    PassageTable(size_t max_passages, uint64_t max_bytes)
        : max_passages_(max_passages), max_bytes_(max_bytes) {}

    // In place of one of the same id. False where there is no room.
    bool put(KeptPassage passage);
    std::optional<KeptPassage> find(std::string_view id) const;
    bool remove(std::string_view id);
    // At most `limit` after the id `after`, in the order of ids.
    std::vector<KeptPassage> list(std::string_view after, size_t limit) const;
    size_t size() const;
    size_t max_passages() const { return max_passages_; }
    uint64_t max_bytes() const { return max_bytes_; }

  private:
    static uint64_t bytes_of(const KeptPassage& passage) {
        return passage.passage.id.size() + passage.passage.title.size() + passage.passage.text.size();
    }

    const size_t max_passages_;
    const uint64_t max_bytes_;  // of ids, titles and texts
    mutable std::mutex mutex_;
    std::map<std::string, KeptPassage, std::less<>> passages_;
    uint64_t bytes_ = 0;
};

}  // namespace refrag
