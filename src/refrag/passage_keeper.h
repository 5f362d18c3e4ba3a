// Where encoded passages outlive a process: what a PassageCache asks before a passage is encoded, and hands
// what was encoded. Implementations are in store/.
#pragma once

#include <optional>
#include <string>

#include "base/sha256.h"
#include "refrag/embedding_form.h"

namespace refrag {

// Any number of threads may use it at the same time. A keeper that fails is a keeper that has nothing: it
// never throws, and says what is wrong in its own way.
class PassageKeeper {
  public:
    PassageKeeper() = default;
    PassageKeeper(const PassageKeeper&) = delete;
    PassageKeeper& operator=(const PassageKeeper&) = delete;
    virtual ~PassageKeeper() = default;

    // How embeddings are kept, and so how they are rounded. Always the same.
    virtual EmbeddingForm form() const noexcept = 0;
    // The record (passage_record.h) of this name; the caller checks it.
    virtual std::optional<std::string> find(const Sha256Digest& key) noexcept = 0;
    // A record that find() gave and that was no good: it is forgotten.
    virtual void forget(const Sha256Digest& key) noexcept = 0;
    // Whether keep() is called at all: one that only rounds has no use for records.
    virtual bool takes_records() const noexcept { return true; }
    // Takes a record to keep; returns soon.
    virtual void keep(const Sha256Digest& key, std::string record) noexcept = 0;
};

}  // namespace refrag
