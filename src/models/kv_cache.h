// The paged KV cache: which page belongs to which (slot, layer, KV head), and how many entries each holds.
// Pages are reference-counted, so slots can share a prefix; a shared page is copied before it is written.
// The ops see it as a KvView (ops/backend.h). Not thread-safe: one cache is driven by one thread at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/arena.h"
#include "ops/backend.h"

namespace refrag {

class KvCache {
  public:
    // Room for n_slots sequences of max_entries entries each; pages are handed out as sequences grow.
    // Bytes: n_slots * n_layers * n_kv_heads * ceil(max_entries / 32) * 2 * 32 * head_dim * sizeof(dtype).
    KvCache(Backend& backend, int32_t n_slots, int32_t n_layers, int32_t n_kv_heads, int32_t head_dim,
            int64_t max_entries, DType dtype = DType::f32);

    int32_t n_slots() const { return n_slots_; }
    int64_t max_entries() const { return max_entries_; }
    size_t device_bytes() const { return pages_.bytes(); }
    int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }

    // Entries that `slot` holds (without pruning the same for every layer and head).
    int32_t length(int32_t slot) const { return length_[static_cast<size_t>(slot)]; }

    // Makes sure that `slot` can take n more entries: hands out pages, and copies a shared page that would be
    // written. Status::runtime with both numbers when the sequence would pass max_entries. Nothing changes on
    // error.
    void reserve(int32_t slot, int32_t n);
    // The ops have appended n entries to every head of `slot` (kv_append raises the lengths in device
    // memory).
    void advance(int32_t slot, int32_t n);
    // Keeps the first n entries and gives the other pages back; n = 0 empties the slot.
    void truncate(int32_t slot, int32_t n);
    // `to` becomes a copy of the first n entries of `from` by sharing its pages. `to` must be empty.
    void share_prefix(int32_t from, int32_t to, int32_t n);

    const KvView& view() const { return view_; }

  private:
    int32_t& page(int32_t slot, int32_t layer_head, int32_t index);
    void put_page(int32_t number);
    void upload_slot(int32_t slot);
    void set_length(int32_t slot, int32_t n);

    Backend& backend_;
    int32_t n_slots_;
    int32_t heads_;      // n_layers * n_kv_heads
    int32_t max_pages_;  // per (slot, layer, KV head)
    int64_t max_entries_;
    int64_t page_cols_;                // head_dim
    std::vector<int32_t> length_;      // [n_slots]
    std::vector<int32_t> page_table_;  // [n_slots, heads, max_pages]; -1 where there is none
    std::vector<int32_t> references_;  // [n_pages]
    std::vector<int32_t> free_;        // page numbers, the next one last
    Buffer pages_;
    Buffer length_device_;      // [n_slots, heads]
    Buffer page_table_device_;  // as page_table_
    KvView view_;
};

}  // namespace refrag
