// From a question to a store's passages: by words (BM25), by vectors (dense: the cosine of the question's and
// a passage's mean chunk embedding, an exact scan), or both, fused by reciprocal rank (Cormack et al. 2009):
//     score = sum over the lists that hold the passage of 1 / (60 + its rank there, from 1)
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/arena.h"
#include "refrag/model.h"
#include "refrag/pooling.h"
#include "store/passage_store.h"

namespace refrag {

enum class Retrieval { words, dense, both };

const char* retrieval_name(Retrieval retrieval);
// Status::usage for another word.
Retrieval parse_retrieval(std::string_view option, std::string_view word);

struct RetrieveOptions {
    Retrieval retrieval = Retrieval::both;
    int64_t top = 8;
    // Each list's length before they are fused.
    int64_t candidates = 100;
    Filter filter = {};
    // The question's, of the length of those that documents brought; empty: by the model's encoder.
    std::vector<float> embedding = {};
};

// What a question's vector is where passages have the mean of their chunk embeddings: [d_enc], of length 1.
// Status::usage of a model without encoder.
std::vector<float> question_vector(Backend& backend, const Model& model, std::string_view question,
                                   int32_t chunk_len, Arena& arena);

// All vectors of a store in memory, as they are scanned. Read anew when the store has changed, or for another
// filter.
class VectorIndex {
  public:
    // The `limit` passages whose vectors have the largest dot products with `query`. Vectors of another
    // length take no part. Time: 2 bytes of memory read for each value.
    std::vector<Found> search(PassageStore& store, const Filter& filter, const std::vector<float>& query,
                              int64_t limit);
    size_t size() const { return numbers_.size(); }

  private:
    void load(PassageStore& store, const Filter& filter, size_t dim);

    bool loaded_ = false;
    int64_t version_ = 0;
    std::string filter_key_;
    size_t dim_ = 0;
    std::vector<int64_t> numbers_;
    std::vector<uint16_t> values_;  // [n, dim] bf16
};

// Sum over i of query[i] * row[i]. dim values each; one order of summation everywhere.
float dot_bf16(const float* query, const uint16_t* row, size_t dim);

// rank lists -> one, best first; equal scores by number.
std::vector<Found> fuse(const std::vector<std::vector<Found>>& lists, int64_t limit);

// The best passages' numbers with their scores. query: as question_vector gives it, unused for words alone.
std::vector<Found> retrieve(PassageStore& store, VectorIndex& vectors, std::string_view question,
                            const std::vector<float>& query, const RetrieveOptions& options);

}  // namespace refrag
