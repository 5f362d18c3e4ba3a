// A passage store: documents, the passages they are cut into, their chunk embeddings, and two ways to find
// them again, by words (BM25) and by vectors. What is stored is stamped with the model that encoded it.
// Implementations: sqlite_store.h (one file); postgres_store.h (many machines).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/sha256.h"
#include "refrag/embedding_form.h"
#include "store/filter.h"

namespace refrag {

// Who encoded what is stored. Passages of another maker do not mix with it.
struct StoreStamp {
    std::string model;      // how the user named it: for messages
    Sha256Digest maker;     // Model::passage_maker(chunk_len, form)
    int32_t chunk_len = 0;  // k
    EmbeddingForm form = EmbeddingForm::bf16;
    int32_t d_enc = 0;    // 0: a model without encoder, passages are cut alone
    int64_t n_vocab = 0;  // ids in records are below it
    bool operator==(const StoreStamp&) const = default;
};

struct Document {
    std::string id;      // unique in a store
    std::string source;  // the file that it came from; "" where there is none
    std::string title;
    std::string metadata = "{}";  // a JSON object
    Sha256Digest hash;  // of its text and all that its passages depend on: unchanged, not indexed again
    int64_t n_passages = 0;
};

// A passage of a document, on its way in.
struct NewPassage {
    int64_t begin = 0;  // byte span in the document's text
    int64_t end = 0;
    std::string title;
    std::string text;
    std::string record;         // passage_record.h
    std::vector<float> vector;  // of dense retrieval, of length 1; empty: none

    // As Passage::content(): what is chunked.
    std::string content() const { return title.empty() ? text : title + "\n" + text; }
};

// A passage as it was stored; its digest has been checked.
struct StoredPassage {
    int64_t n = 0;         // its number in the store
    std::string document;  // the document's id
    std::string metadata;  // the document's
    int64_t place = 0;     // among the document's passages, from 0
    int64_t begin = 0;
    int64_t end = 0;
    std::string title;
    std::string text;
    std::string record;

    // As Passage::content(): what was chunked.
    std::string content() const { return title.empty() ? text : title + "\n" + text; }
};

// A passage's number, and how well it fits: the larger the better.
struct Found {
    int64_t n = 0;
    double score = 0.0;
};

struct StoreStats {
    int64_t n_documents = 0;
    int64_t n_passages = 0;
    int64_t n_vectors = 0;
    int64_t record_bytes = 0;
    int64_t text_bytes = 0;
    int64_t store_bytes = 0;  // on disk, all in all
};

// Any number of threads may read at the same time as one writes. Status::runtime for a store that cannot be
// reached, is locked, read-only or full; Status::bad_input for one that is damaged.
class PassageStore {
  public:
    PassageStore() = default;
    PassageStore(const PassageStore&) = delete;
    PassageStore& operator=(const PassageStore&) = delete;
    virtual ~PassageStore() = default;

    virtual const std::string& name() const = 0;  // for messages
    // None: nothing has been indexed yet.
    virtual std::optional<StoreStamp> stamp() = 0;

    // Writing. All between begin() and commit() is kept, or nothing of it; without a begin() each call alone.
    virtual void begin() = 0;
    virtual void commit() = 0;
    virtual void rollback() noexcept = 0;
    virtual void set_stamp(const StoreStamp& stamp) = 0;
    // Stamps a store that has none; the stamp that it has then. Of several at once one goes first.
    virtual StoreStamp stamp_if_empty(const StoreStamp& stamp) = 0;
    // Replaces the document of this id.
    virtual void put(const Document& document, std::span<const NewPassage> passages) = 0;
    // Whether there was one.
    virtual bool remove(std::string_view id) = 0;
    // Other records and vectors for a passage, after its model has changed.
    virtual void replace_record(int64_t n, std::string_view record, std::span<const float> vector) = 0;

    // Reading.
    virtual std::optional<Document> find(std::string_view id) = 0;
    virtual void for_each_document(const std::function<void(const Document&)>& use) = 0;
    // The `limit` best passages that hold any of the words, by BM25. Words are words: nothing in them is
    // syntax.
    virtual std::vector<Found> search_words(std::span<const std::string> words, int64_t limit,
                                            const Filter& filter) = 0;
    // Passages with a vector, in the order of their numbers. [d] in bf16.
    virtual void for_each_vector(const Filter& filter,
                                 const std::function<void(int64_t n, std::span<const uint16_t>)>& use) = 0;
    // In the order of `numbers`; those that are not there any more are left out.
    virtual std::vector<StoredPassage> get(std::span<const int64_t> numbers) = 0;
    // Numbers of all passages above `after`, in order, at most `limit`.
    virtual std::vector<int64_t> numbers(int64_t after, int64_t limit) = 0;
    virtual StoreStats stats() = 0;
    // The store's own structures; `problem` takes a line for each fault. Passages are checked by get().
    virtual void verify_structure(const std::function<void(const std::string&)>& problem) = 0;
    // Changes when another process has changed the store.
    virtual int64_t version() = 0;
};

// How a store is opened.
enum class StoreMode { read, write, create };

// STORE as the command line names it: a file, or postgresql://... Status::usage where this build has no such
// store.
std::unique_ptr<PassageStore> open_store(const std::string& place, StoreMode mode);
// Whether it is a server's, and so no file.
bool is_postgres_place(std::string_view place);

// What a passage's digest is of: whatever is stored of it.
Sha256Digest passage_digest(std::string_view document, int64_t place, int64_t begin, int64_t end,
                            std::string_view title, std::string_view text, std::string_view record);
Sha256Digest document_digest(const Document& document);
// A digest as it was stored; all zeros of what is none.
Sha256Digest stored_digest(std::string_view bytes);
// A vector as bytes, [d] bf16, and the first bytes of its digest behind.
inline constexpr size_t vector_check_bytes = 8;
std::string vector_bytes(std::span<const float> vector);
// Whether these are as vector_bytes() made them.
bool vector_fits(std::string_view bytes);

}  // namespace refrag
