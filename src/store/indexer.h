// Documents into a store: what is unchanged is skipped, the rest is cut into passages, encoded in batches and
// written, a batch a transaction. Whatever ends the process, what was committed stays, and the next run goes
// on from there.
#pragma once

#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/arena.h"
#include "refrag/model.h"
#include "refrag/passage_cache.h"
#include "store/documents.h"
#include "store/encoded_lines.h"
#include "store/passage_store.h"

namespace refrag {

struct IndexOptions {
    int64_t passage_tokens = 160;  // a passage's, at most
    int32_t chunk_len = 0;         // k; 0: the model's
    EmbeddingForm form = EmbeddingForm::bf16;
    // Takes what is refused of a document, which is then left out; empty: it is thrown.
    BadLine on_bad = {};
};

struct IndexCounts {
    int64_t n_documents = 0;  // read
    int64_t n_added = 0;      // that were not there
    int64_t n_replaced = 0;   // that had changed
    int64_t n_unchanged = 0;
    int64_t n_passages = 0;  // written
    int64_t n_chunks = 0;    // of them
    int64_t n_repeated = 0;  // passages whose text had been encoded before, here
};

// How `model` encodes for a store.
StoreStamp stamp_of(const Model& model, const IndexOptions& options);

// Status::bad_input where the store was made by another model, with both names.
void check_stamp(const std::string& store, const StoreStamp& found, const StoreStamp& expected);

// A passage as it is stored: record and vector of what `passage` holds once it is encoded. own: the user's
// embedding of its document; empty: the mean of the chunk embeddings, of length 1.
void fill_passage(Backend& backend, const Model& model, EmbeddingForm form, SharedPassage& passage,
                  std::span<const float> own, NewPassage& out);

// Takes a batch of encoded documents.
using EncodedSink = std::function<void(std::vector<EncodedDocument> batch)>;

class Indexer {
  public:
    // Into a store. Stamps an empty one. Status::bad_input where another model encoded what the store holds.
    Indexer(PassageStore& store, const Model& model, const IndexOptions& options);
    // To whoever takes it; everything counts as new. `sink` is called on another thread, one call at a time.
    Indexer(EncodedSink sink, const Model& model, const IndexOptions& options);
    ~Indexer();
    Indexer(const Indexer&) = delete;
    Indexer& operator=(const Indexer&) = delete;

    // Status::bad_input for a document whose id came before in this run with another content.
    void add(SourceDocument source);
    // All documents of a file, as long as go_on (may be empty) says so. progress: bytes read so far.
    void add_file(const std::string& file, const std::function<bool()>& go_on = {},
                  const std::function<void(uint64_t bytes)>& progress = {});
    // Writes what waits; returns when it is committed.
    void finish();

    const IndexCounts& counts() const { return counts_; }

  private:
    struct Waiting {
        EncodedDocument encoded;
        std::vector<std::shared_ptr<SharedPassage>> shared;
        std::vector<float> own;
    };
    void encode_waiting();
    void encode_one_by_one();
    void refuse(const Error& error) const;
    void wait_for_write();

    PassageStore* store_ = nullptr;  // where it is known what is there already
    const EncodedSink sink_;
    const Model& model_;
    const IndexOptions options_;
    const StoreStamp stamp_;
    std::unique_ptr<Backend> backend_;  // outlives what takes memory through it
    Arena arena_;
    PassageCache cache_;
    std::shared_ptr<PassageKeeper> rounds_;
    std::vector<Waiting> waiting_;
    int64_t waiting_tokens_ = 0;
    std::future<void> writing_;
    std::unordered_map<std::string, Sha256Digest> seen_;  // ids of this run
    IndexCounts counts_;
};

// Writes a batch in one transaction: all of it, or nothing.
void write_batch(PassageStore& store, std::span<const EncodedDocument> batch);

// Other records for every passage of a store, by `model`, and vectors of them in place of any that were the
// user's own. Resumable: what is done is named by the model. progress: passages done of all.
void reencode(PassageStore& store, const Model& model, const IndexOptions& options,
              const std::function<void(int64_t done, int64_t total)>& progress);

}  // namespace refrag
