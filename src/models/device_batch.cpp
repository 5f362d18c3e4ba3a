// See device_batch.h.
#include "models/device_batch.h"

#include <algorithm>

namespace refrag {

void BatchPlan::add(int32_t slot, int32_t start, int32_t n) {
    slot_.push_back(slot);
    start_.push_back(start);
    row_begin_.push_back(row_begin_.back() + n);
    for (int32_t i = 0; i < n; ++i) position_.push_back(static_cast<float>(start + i));
    max_rows_ = std::max(max_rows_, n);
    max_entries_ = std::max(max_entries_, start + n);
}

void BatchPlan::add_cached(int32_t slot, int32_t start, int32_t n) {
    add(slot, start, n);
}
void BatchPlan::add_encoder(int32_t n) {
    add(-1, 0, n);
}

void BatchPlan::clear() {
    row_begin_.resize(1);
    start_.clear();
    slot_.clear();
    position_.clear();
    max_rows_ = 0;
    max_entries_ = 0;
}

BatchArrays::BatchArrays(Arena& arena, int64_t n_seq, int64_t n_rows) {
    const auto integers = [&](int64_t n) {
        return static_cast<int32_t*>(arena.allocate(static_cast<size_t>(n) * sizeof(int32_t)));
    };
    row_begin = integers(n_seq + 1);
    start = integers(n_seq);
    slot = integers(n_seq);
    position = arena.tensor(1, n_rows).f32();
}

Batch BatchPlan::upload(Backend& backend, Arena& arena) const {
    return upload(backend, BatchArrays(arena, n_seq(), n_rows()));
}

Batch BatchPlan::upload(Backend& backend, const BatchArrays& arrays) const {
    upload_vector(backend, arrays.row_begin, row_begin_);
    upload_vector(backend, arrays.start, start_);
    upload_vector(backend, arrays.slot, slot_);
    upload_vector(backend, arrays.position, position_);
    Batch batch;
    batch.n_seq = n_seq();
    batch.n_rows = n_rows();
    batch.max_rows = max_rows_;
    batch.max_entries = max_entries_;
    batch.row_begin = arrays.row_begin;
    batch.start = arrays.start;
    batch.slot = arrays.slot;
    batch.position = arrays.position;
    batch.n_uncached = static_cast<int32_t>(std::count(slot_.begin(), slot_.end(), -1));
    return batch;
}

}  // namespace refrag
