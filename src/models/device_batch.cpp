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

Batch BatchPlan::upload(Backend& backend, Arena& arena) const {
    Batch batch;
    batch.n_seq = n_seq();
    batch.n_rows = n_rows();
    batch.max_rows = max_rows_;
    batch.max_entries = max_entries_;
    batch.row_begin = upload_vector(backend, arena, row_begin_);
    batch.start = upload_vector(backend, arena, start_);
    batch.slot = upload_vector(backend, arena, slot_);
    batch.position = upload_vector(backend, arena, position_);
    batch.n_uncached = static_cast<int32_t>(std::count(slot_.begin(), slot_.end(), -1));
    return batch;
}

}  // namespace refrag
