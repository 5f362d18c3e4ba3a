// Passages that stay cut and encoded between requests, by their names: several questions of one `run`, the
// requests of a batch, the rows of an evaluation. The longest unused are let go of first.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>

#include "refrag/passage.h"

namespace refrag {

// About a million tokens as chunks of 16 with embeddings of 1024 values.
inline constexpr uint64_t default_passage_cache_bytes = uint64_t{256} << 20;

// Any number of threads may use it at the same time.
class PassageCache {
  public:
    // Texts, ids and embeddings are kept up to max_bytes together, counted whenever a passage is asked for.
    // What requests are working with stays beyond that until they let go of it.
    // keeper: what outlives the process; null: nothing does.
    explicit PassageCache(uint64_t max_bytes = default_passage_cache_bytes,
                          std::shared_ptr<PassageKeeper> keeper = nullptr)
        : max_bytes_(max_bytes), keeper_(std::move(keeper)) {}
    ~PassageCache();
    PassageCache(const PassageCache&) = delete;
    PassageCache& operator=(const PassageCache&) = delete;

    // The passage of this text: the one that is here, the keeper's, or a new one. chunk_len 0: the model's.
    std::shared_ptr<SharedPassage> share(const Model& model, std::string text, int32_t chunk_len = 0,
                                         std::string_view tenant = {});
    // The same for one whose record a store has. A record that is no good is an Error(bad_input) that says
    // why; a model without encoder takes records without embeddings.
    std::shared_ptr<SharedPassage> share(const Model& model, std::string text, int32_t chunk_len,
                                         EmbeddingForm form, std::string_view record);
    // The same for what is cut already; the keeper has no part in it.
    std::shared_ptr<SharedPassage> share(const Model& model, std::shared_ptr<const CutPassage> cut);

    // This one, or the one of its name that is here already.
    std::shared_ptr<SharedPassage> put(std::shared_ptr<SharedPassage> passage) {
        return keep(std::move(passage));
    }

    size_t size() const;
    uint64_t bytes() const { return *bytes_; }

  private:
    std::shared_ptr<SharedPassage> find(const Sha256Digest& key);
    std::shared_ptr<SharedPassage> keep(std::shared_ptr<SharedPassage> passage);

    const uint64_t max_bytes_;
    const std::shared_ptr<PassageKeeper> keeper_;
    const std::shared_ptr<PassageBytes> bytes_ = std::make_shared<PassageBytes>(0);
    mutable std::mutex mutex_;
    std::list<std::shared_ptr<SharedPassage>> passages_;  // last used first
    using Place = std::list<std::shared_ptr<SharedPassage>>::iterator;
    std::unordered_map<Sha256Digest, Place, Sha256DigestHash> places_;
};

}  // namespace refrag
