// A passage on its way into the decoder: its text, its chunks, and the chunks' embeddings. Each step is done
// once and kept, so that a later question finds the passage cached (paper, section 2: chunk embeddings are
// precomputable).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "refrag/chunker.h"
#include "refrag/model.h"
#include "refrag/passages.h"

namespace refrag {

class ContextPassage {
  public:
    explicit ContextPassage(Passage passage) : passage_(std::move(passage)) {}

    const Passage& passage() const { return passage_; }
    // Cuts into chunks of chunk_len decoder tokens; does nothing when that has been done, and starts anew
    // when the chunk length is another.
    void tokenize(const Model& model, int32_t chunk_len);
    const std::vector<Chunk>& chunks() const { return chunks_; }
    size_t n_tokens() const { return n_tokens_; }

    bool has_embedding(size_t chunk) const { return encoded_[chunk]; }
    // chunk_emb [d_enc] of a chunk that has one.
    std::span<const float> embedding(size_t chunk) const;
    void set_embedding(size_t chunk, std::span<const float> values);

  private:
    Passage passage_;
    int32_t chunk_len_ = 0;  // 0: not tokenised yet
    size_t n_tokens_ = 0;
    size_t d_enc_ = 0;
    std::vector<Chunk> chunks_;
    std::vector<float> embeddings_;  // [n_chunks, d_enc]
    std::vector<bool> encoded_;      // [n_chunks]
};

// Keeps passages of the same content together, so that each is tokenised and encoded once whoever asks.
class PassagePool {
  public:
    // The passage with this content: the first that was given, or this one. Its id may be another's.
    std::shared_ptr<ContextPassage> share(Passage passage);
    size_t size() const { return size_; }

  private:
    std::unordered_map<size_t, std::vector<std::shared_ptr<ContextPassage>>> by_hash_;
    size_t size_ = 0;
};

// Passages in the order of a prompt; several prompts may refer to the same ones.
using PassageRefs = std::span<ContextPassage* const>;

// Encodes every chunk that is marked (all when `wanted` is empty) and has no embedding yet. `wanted` runs
// over the chunks of all passages in order. Returns how many were encoded.
size_t encode_chunks(Backend& backend, const Model& model, PassageRefs passages,
                     const std::vector<bool>& wanted, Arena& arena);
size_t encode_chunks(Backend& backend, const Model& model, std::span<ContextPassage> passages,
                     const std::vector<bool>& wanted, Arena& arena);

}  // namespace refrag
