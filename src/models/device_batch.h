// Builds a ragged Batch (ops/backend.h) on the host and puts it into a backend's memory.
#pragma once

#include <cstdint>
#include <vector>

#include "base/arena.h"
#include "ops/backend.h"

namespace refrag {

// Where a batch's arrays lie in device memory.
struct BatchArrays {
    // Uninitialised, for up to n_seq sequences of up to n_rows rows together.
    BatchArrays(Arena& arena, int64_t n_seq, int64_t n_rows);
    int32_t* row_begin;  // [n_seq + 1]
    int32_t* start;      // [n_seq]
    int32_t* slot;       // [n_seq]
    float* position;     // [n_rows]
};

// The host's side of a batch: sequences are added one after another.
class BatchPlan {
  public:
    // A cached, causal sequence of n rows in `slot`, which holds `start` entries; positions start, start + 1,
    // ...
    void add_cached(int32_t slot, int32_t start, int32_t n);
    // A bidirectional sequence of n rows without a cache.
    void add_encoder(int32_t n);

    // As new, its memory kept.
    void clear();

    int32_t n_seq() const { return static_cast<int32_t>(slot_.size()); }
    int32_t n_rows() const { return row_begin_.back(); }
    int32_t max_rows() const { return max_rows_; }  // of a sequence
    int32_t row_begin(int32_t seq) const { return row_begin_[static_cast<size_t>(seq)]; }

    // Uploads the arrays, into memory taken from `arena`.
    Batch upload(Backend& backend, Arena& arena) const;
    // The same into arrays that are there, and large enough.
    Batch upload(Backend& backend, const BatchArrays& arrays) const;

  private:
    void add(int32_t slot, int32_t start, int32_t n);
    std::vector<int32_t> row_begin_{0};
    std::vector<int32_t> start_;
    std::vector<int32_t> slot_;
    std::vector<float> position_;
    int32_t max_rows_ = 0;
    int32_t max_entries_ = 0;
};

template <typename T>
void upload_vector(Backend& backend, T* device, const std::vector<T>& values) {
    if (!values.empty()) backend.upload(device, values.data(), values.size() * sizeof(T));
}
// Copies a host vector into device memory taken from `arena`.
template <typename T>
T* upload_vector(Backend& backend, Arena& arena, const std::vector<T>& values) {
    auto* device = static_cast<T*>(arena.allocate(values.size() * sizeof(T)));
    upload_vector(backend, device, values);
    return device;
}

}  // namespace refrag
