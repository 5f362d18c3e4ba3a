// A passage on its way into the decoder. CutPassage: its chunks. EncodedPassage: their embeddings too, which
// can be kept, because they depend on nothing else (paper, section 2). Both are immutable and are shared by
// pointer between requests, engines and threads. SharedPassage makes them when they are first needed, once
// for all who hold it.
//
// Names (SHA-256), so that equal names mean equal bytes:
//   content = SHA-256(text as chunked)            maker = Model::passage_maker(chunk length, form)
//   key     = SHA-256(maker, content, tenant)
// An id or a title is no part of them beyond what the text holds: a request says which document it means.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/sha256.h"
#include "refrag/chunker.h"
#include "refrag/embedding_form.h"
#include "refrag/model.h"
#include "refrag/passage_keeper.h"

namespace refrag {

Sha256Digest passage_key(const Sha256Digest& maker, const Sha256Digest& content,
                         std::string_view tenant = {});

// A text and its chunks.
class CutPassage {
  public:
    // Status::usage unless chunk_len >= 1.
    CutPassage(const Model& model, std::string text, int32_t chunk_len);
    // A window of a longer text: `tokens` are some that follow one another of those of `text`. The passage's
    // text is their bytes. Named by its ids too: a text tokenised alone may have others.
    CutPassage(const Model& model, std::string_view text, std::span<const Token> tokens, int32_t chunk_len);
    // From chunks that were kept elsewhere; their spans tile the text.
    CutPassage(std::string text, int32_t chunk_len, std::vector<Chunk> chunks);

    const std::string& text() const { return text_; }
    int32_t chunk_len() const { return chunk_len_; }
    const std::vector<Chunk>& chunks() const { return chunks_; }  // byte spans are those of text()
    size_t n_tokens() const { return n_tokens_; }
    const Sha256Digest& content() const { return content_; }
    uint64_t host_bytes() const;  // about what it holds

  private:
    std::string text_;
    int32_t chunk_len_;
    std::vector<Chunk> chunks_;
    size_t n_tokens_ = 0;
    Sha256Digest content_;
};

class EncodedPassage {
  public:
    // `memory`: chunk_emb [n_chunks, d_enc] F32 in the model's device's memory, all of it written.
    EncodedPassage(std::shared_ptr<const CutPassage> cut, const Sha256Digest& key, Buffer memory,
                   int32_t d_enc);
    // From values [n_chunks, d_enc] that were kept elsewhere. Status::usage when there are more or fewer.
    EncodedPassage(const Model& model, std::shared_ptr<const CutPassage> cut, const Sha256Digest& key,
                   std::span<const float> chunk_emb);

    const std::shared_ptr<const CutPassage>& cut() const { return cut_; }
    const Sha256Digest& key() const { return key_; }
    // [n_chunks, d_enc], before projection. Work that reads it must have ended when the passage is let go.
    Tensor chunk_emb() const;
    // A copy on the host; waits for the backend's work.
    std::vector<float> download(Backend& backend) const;

  private:
    std::shared_ptr<const CutPassage> cut_;
    Sha256Digest key_;
    Buffer memory_;
    int32_t d_enc_;
};

// The bytes that the passages of a cache hold; outlives those that were dropped from it.
using PassageBytes = std::atomic<uint64_t>;

// Any number of threads may use it at the same time; the model must outlive it.
class SharedPassage {
  public:
    // Cut and encoded when needed. chunk_len 0: the model's. With a keeper the embeddings are rounded to its
    // form, which the name says, and once encoded it is handed them.
    SharedPassage(const Model& model, std::string text, int32_t chunk_len = 0, std::string_view tenant = {},
                  std::shared_ptr<PassageKeeper> keeper = nullptr);
    // What is cut, or cut and encoded, already.
    SharedPassage(const Model& model, std::shared_ptr<const CutPassage> cut);
    explicit SharedPassage(std::shared_ptr<const EncodedPassage> encoded);

    const Sha256Digest& key() const { return key_; }
    int32_t chunk_len() const { return chunk_len_; }
    // Cuts on the first call. After an error it is as before.
    std::shared_ptr<const CutPassage> cut(const Model& model);
    // Null until all chunks have been encoded: a passage is encoded whole or not at all.
    std::shared_ptr<const EncodedPassage> encoded() const;

  private:
    friend class PassageCache;
    friend int64_t encode_passages(Backend& backend, const Model& model,
                                   std::span<const std::shared_ptr<SharedPassage>> passages,
                                   int64_t budget_rows, Arena& arena);
    // The whole passage from memory_, rounded and kept where there is a keeper; under mutex_.
    void finish_encoding(Backend& backend, const Model& model);
    void hold(uint64_t bytes);                             // that many more
    void count_in(std::shared_ptr<PassageBytes> counter);  // of the cache that keeps it
    void count_out() noexcept;

    const Sha256Digest key_;
    const int32_t chunk_len_;
    const std::shared_ptr<PassageKeeper> keeper_;

    mutable std::mutex mutex_;  // of all that follows
    std::string text_;          // until it is cut
    std::shared_ptr<const CutPassage> cut_;
    std::shared_ptr<const EncodedPassage> encoded_;
    // While it is being encoded: chunk_emb, of which n_encoded_ rows are written.
    Buffer memory_;
    size_t n_encoded_ = 0;

    std::mutex count_mutex_;  // of these two
    uint64_t bytes_ = 0;
    std::shared_ptr<PassageBytes> counter_;
};

// Encodes chunks of `passages` that are not encoded yet, in order, as one batch: chunks of about budget_rows
// encoder rows in all, at least one. Returns the rows, and has waited for them; each passage's encoded() says
// whether it is whole. Two threads that need the same passage divide its chunks between them.
int64_t encode_passages(Backend& backend, const Model& model,
                        std::span<const std::shared_ptr<SharedPassage>> passages, int64_t budget_rows,
                        Arena& arena);
// All of them.
void encode_passages(Backend& backend, const Model& model,
                     std::span<const std::shared_ptr<SharedPassage>> passages, Arena& arena);

}  // namespace refrag
