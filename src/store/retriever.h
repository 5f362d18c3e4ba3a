// From a question to passages of a store, ready for a request: retrieve, read, take over the stored
// embeddings.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/arena.h"
#include "refrag/passage_cache.h"
#include "store/passage_store.h"
#include "store/retrieve.h"

namespace refrag {

// What was found for one question, best first.
struct Retrieved {
    std::vector<StoredPassage> passages;
    std::vector<std::shared_ptr<SharedPassage>> shared;  // of the same passages
    double ms = 0.0;                                     // all of it
};

// Status::bad_input for a store in which nothing has been indexed.
StoreStamp stamp_in(PassageStore& store);

// One thread at a time. Store and model must outlive it.
class Retriever {
  public:
    // options.retrieval `both` means words alone where there is nothing that a question's vector could come
    // from. Status::usage for `dense` then. Status::bad_input for an empty store, or one of another model.
    // warn: takes a line where a stored record is no good and its passage is encoded here.
    Retriever(PassageStore& store, const Model& model, std::shared_ptr<PassageCache> cache,
              RetrieveOptions options, std::function<void(const std::string&)> warn = {});

    Retrieved find(std::string_view question) { return find(question, options_.top, options_.filter); }
    // The same with another number of passages, and other conditions.
    Retrieved find(std::string_view question, int64_t top, const Filter& filter);
    int32_t chunk_len() const { return stamp_.chunk_len; }

  private:
    PassageStore& store_;
    const Model& model_;
    const std::shared_ptr<PassageCache> cache_;
    RetrieveOptions options_;
    const std::function<void(const std::string&)> warn_;
    const StoreStamp stamp_;
    std::unique_ptr<Backend> backend_;  // outlives what takes memory through it
    Arena arena_;
    VectorIndex vectors_;
};

}  // namespace refrag
