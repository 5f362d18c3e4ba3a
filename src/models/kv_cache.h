// The paged KV cache: one pool of pages, which page belongs to which (slot, layer, KV head), and how many
// entries each of those holds. A slot takes pages as its sequence grows, so the pool may be smaller than
// n_slots * max_entries. Pages are reference-counted: slots can share a prefix, and whole blocks of a prefix
// can be kept when their slot is emptied; a shared page is copied before it is written. The ops see the cache
// as a KvView (ops/backend.h). Not thread-safe: one cache is driven by one thread at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/arena.h"
#include "ops/backend.h"

namespace refrag {

// One page of each (layer, KV head), in that order: kPageEntries entries of a sequence.
using KvBlock = std::vector<int32_t>;

class KvCache {
  public:
    // n_slots sequences of at most max_entries entries each, over a pool of n_blocks blocks; 0: as many as
    // all slots can take. The pool is allocated here and stays in place. Bytes: n_blocks * n_layers *
    // n_kv_heads * 2 * 32 * head_dim * sizeof(dtype). The page table grows with the longest sequence that
    // there was: 4 bytes * n_slots * n_layers * n_kv_heads * view().max_pages; while it grows, the old one is
    // held too (most_table_bytes). Status::usage for sizes that make no sense, Status::out_of_memory beyond
    // 2^31 - 1 pages.
    KvCache(Backend& backend, int32_t n_slots, int32_t n_layers, int32_t n_kv_heads, int32_t head_dim,
            int64_t max_entries, DType dtype = DType::f32, int64_t n_blocks = 0);

    int32_t n_slots() const { return n_slots_; }
    int64_t max_entries() const { return max_entries_; }
    size_t device_bytes() const { return pages_.bytes(); }
    int32_t n_heads() const { return heads_; }  // n_layers * n_kv_heads: the pages of a block
    int64_t n_pages() const { return std::ssize(references_); }
    int64_t free_pages() const { return std::ssize(free_); }
    int64_t free_blocks() const { return free_pages() / heads_; }
    // Blocks that a sequence of so many entries takes.
    static int64_t blocks_for(int64_t n_entries) { return (n_entries + kPageEntries - 1) / kPageEntries; }

    // What page tables can take of the device's memory at a time, where no sequence has more than n_pages
    // pages for each of n_heads = n_layers * n_kv_heads heads.
    static uint64_t most_table_bytes(int32_t n_slots, int32_t n_heads, int64_t n_pages);

    // Entries that `slot` holds; of one layer and KV head, or, where all hold as many, of each.
    int32_t length(int32_t slot) const { return length_[head_row(slot, 0)]; }
    int32_t length(int32_t slot, int32_t layer, int32_t kv_head) const {
        return length_[head_row(slot, layer * view_.n_kv_heads + kv_head)];
    }

    // Takes the host's memory for a slot of so many entries, so that growing up to them allocates nothing.
    void expect(int32_t slot, int64_t n_entries);
    // Makes sure that `slot` can take n more entries: takes pages, and copies a shared page that would be
    // written. Whatever changed in the slot since the last call is then in device memory; call it before ops
    // read or write the slot. Status::runtime with both numbers when the sequence would pass max_entries,
    // Status::out_of_memory when the pool has too few pages or the table cannot grow. Nothing changes on
    // these errors. Where the backend fails, the slot holds what it held, perhaps in more pages than that
    // takes (truncate gives them back).
    void reserve(int32_t slot, int32_t n);
    // The ops have appended n entries to every head of `slot` (kv_append raises the lengths in device
    // memory).
    void advance(int32_t slot, int32_t n);
    // Keeps the first n entries and gives the other pages back; n = 0 empties the slot.
    void truncate(int32_t slot, int32_t n) noexcept;
    // `to` becomes a copy of the first n entries of `from` by sharing its pages. `to` must hold none.
    void share_prefix(int32_t from, int32_t to, int32_t n);

    // Block `index` of a slot, whose 32 entries it holds all, with a reference of the caller's own: the pages
    // live on when the slot lets go of them.
    KvBlock hold_block(int32_t slot, int32_t index);
    void drop_block(const KvBlock& block) noexcept;
    // Puts a held block behind a slot's entries, which must fill whole pages.
    void append_block(int32_t slot, const KvBlock& block);
    // Whether someone besides one holder has the block.
    bool is_shared(const KvBlock& block) const { return references_[static_cast<size_t>(block[0])] > 1; }

    // As it is now: a reserve() that makes the page table wider moves the table. That happens a few times in
    // a cache's life, since the width doubles, and recorded work that names the old table is then stale.
    const KvView& view() const { return view_; }

  private:
    size_t head_row(int32_t slot, int32_t head) const {
        return static_cast<size_t>(slot) * static_cast<size_t>(heads_) + static_cast<size_t>(head);
    }
    std::vector<int32_t>& pages_of(int32_t slot, int32_t head) { return table_[head_row(slot, head)]; }
    bool is_shared_page(int32_t number) const { return references_[static_cast<size_t>(number)] > 1; }
    int32_t take_page();
    void put_page(int32_t number) noexcept;
    void copy_page(int32_t from, int32_t to);
    void set_length(int32_t slot, int32_t n) noexcept;
    void widen_table(int64_t n_pages);
    void upload_slot(int32_t slot);

    Backend& backend_;
    int32_t n_slots_;
    int32_t heads_;
    int32_t max_pages_;  // that one slot's head can ever have; view_.max_pages: what the table has room for
    int64_t max_entries_;
    std::vector<int32_t> length_;              // [n_slots, heads]
    std::vector<std::vector<int32_t>> table_;  // [n_slots, heads]: page numbers
    std::vector<bool> changed_;                // [n_slots]: since the upload
    std::vector<int32_t> references_;          // [n_pages]
    std::vector<int32_t> free_;                // page numbers, the next one last
    std::vector<int32_t> staged_;              // one slot's table, kept for its memory
    Buffer pages_;
    Buffer length_device_;      // [n_slots, heads]
    Buffer page_table_device_;  // [n_slots, heads, view_.max_pages]
    KvView view_;
};

}  // namespace refrag
