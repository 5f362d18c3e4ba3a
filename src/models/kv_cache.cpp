// See kv_cache.h. The host's tables are the truth; a slot's rows are uploaded when they change.
#include "models/kv_cache.h"

#include <algorithm>

namespace refrag {

KvCache::KvCache(Backend& backend, int32_t n_slots, int32_t n_layers, int32_t n_kv_heads, int32_t head_dim,
                 int64_t max_entries, DType dtype)
    : backend_(backend),
      n_slots_(n_slots),
      heads_(n_layers * n_kv_heads),
      max_pages_(static_cast<int32_t>((max_entries + kPageEntries - 1) / kPageEntries)),
      max_entries_(max_entries),
      page_cols_(head_dim) {
    REFRAG_CHECK(n_slots > 0 && max_entries > 0 && max_entries <= INT32_MAX - kPageEntries, Status::usage,
                 "KV cache: expected at least one slot and 1 to ", INT32_MAX - kPageEntries,
                 " entries, found ", n_slots, " slots of ", max_entries);
    const int64_t n_pages = static_cast<int64_t>(n_slots_) * heads_ * max_pages_;
    REFRAG_CHECK(n_pages <= INT32_MAX, Status::out_of_memory, "KV cache: ", n_pages,
                 " pages are more than the ", INT32_MAX, " that a page table can number");
    const size_t page_bytes = static_cast<size_t>(2 * kPageEntries * page_cols_) * dtype_bytes(dtype);
    length_.assign(static_cast<size_t>(n_slots_), 0);
    page_table_.assign(static_cast<size_t>(n_pages), -1);
    references_.assign(static_cast<size_t>(n_pages), 0);
    free_.resize(static_cast<size_t>(n_pages));
    for (int64_t i = 0; i < n_pages; ++i) {
        free_[static_cast<size_t>(i)] = static_cast<int32_t>(n_pages - 1 - i);
    }
    pages_ = Buffer(backend_, static_cast<size_t>(n_pages) * page_bytes);
    const size_t n_lengths = static_cast<size_t>(n_slots_) * static_cast<size_t>(heads_);
    length_device_ = Buffer(backend_, n_lengths * sizeof(int32_t));
    page_table_device_ = Buffer(backend_, page_table_.size() * sizeof(int32_t));
    const std::vector<int32_t> zeros(n_lengths, 0);
    backend_.upload(length_device_.data(), zeros.data(), n_lengths * sizeof(int32_t));
    view_ = {pages_.data(),
             dtype,
             static_cast<int32_t*>(length_device_.data()),
             static_cast<const int32_t*>(page_table_device_.data()),
             n_layers,
             n_kv_heads,
             head_dim,
             max_pages_};
}

int32_t& KvCache::page(int32_t slot, int32_t layer_head, int32_t index) {
    const int64_t row = static_cast<int64_t>(slot) * heads_ + layer_head;
    return page_table_[static_cast<size_t>(row * max_pages_ + index)];
}

void KvCache::put_page(int32_t number) {
    if (--references_[static_cast<size_t>(number)] == 0) free_.push_back(number);
}

void KvCache::upload_slot(int32_t slot) {
    const size_t row = static_cast<size_t>(heads_) * static_cast<size_t>(max_pages_);
    const size_t begin = static_cast<size_t>(slot) * row;
    auto* table = static_cast<int32_t*>(page_table_device_.data());
    backend_.upload(table + begin, page_table_.data() + begin, row * sizeof(int32_t));
}

void KvCache::set_length(int32_t slot, int32_t n) {
    length_[static_cast<size_t>(slot)] = n;
    const std::vector<int32_t> lengths(static_cast<size_t>(heads_), n);
    backend_.upload(view_.length + static_cast<int64_t>(slot) * heads_, lengths.data(),
                    lengths.size() * sizeof(int32_t));
}

void KvCache::reserve(int32_t slot, int32_t n) {
    const int32_t held = length(slot);
    REFRAG_CHECK(held + static_cast<int64_t>(n) <= max_entries_, Status::runtime, "KV cache: slot ", slot,
                 " holds ", held, " entries and cannot take ", n, " more: its limit is ", max_entries_);
    if (n == 0) return;
    const int32_t first = held / kPageEntries;  // the first page that will be written
    const int32_t last = (held + n - 1) / kPageEntries;
    const bool first_held = held % kPageEntries != 0;
    // Count before taking anything, so that an error leaves the cache as it was.
    int64_t need = 0;
    for (int32_t h = 0; h < heads_; ++h) {
        const bool copies = first_held && references_[static_cast<size_t>(page(slot, h, first))] > 1;
        for (int32_t i = first; i <= last; ++i) need += page(slot, h, i) < 0 ? 1 : 0;
        need += copies ? 1 : 0;
    }
    REFRAG_CHECK(need <= free_pages(), Status::out_of_memory, "KV cache: ", need, " pages needed, ",
                 free_pages(), " free");
    if (need == 0) return;
    for (int32_t h = 0; h < heads_; ++h) {
        for (int32_t i = first; i <= last; ++i) {
            int32_t& number = page(slot, h, i);
            const bool shared = number >= 0 && references_[static_cast<size_t>(number)] > 1;
            if (number >= 0 && !shared) continue;
            const int32_t old = number;
            const int32_t fresh = free_.back();
            free_.pop_back();
            references_[static_cast<size_t>(fresh)] = 1;
            number = fresh;
            if (shared) {
                // Given back before the copy, so that a copy that fails loses no page; the other slots that
                // hold it keep its entries where they are.
                put_page(old);
                auto* base = static_cast<std::byte*>(pages_.data());
                Tensor to{nullptr, view_.dtype, 2 * kPageEntries, page_cols_};
                Tensor from = to;
                to.data = base + static_cast<size_t>(fresh) * to.bytes();
                from.data = base + static_cast<size_t>(old) * to.bytes();
                backend_.copy(to, from);
            }
        }
    }
    upload_slot(slot);
}

void KvCache::advance(int32_t slot, int32_t n) {
    length_[static_cast<size_t>(slot)] += n;
    REFRAG_DCHECK(length(slot) <= max_entries_);
}

void KvCache::truncate(int32_t slot, int32_t n) {
    REFRAG_DCHECK(n >= 0 && n <= length(slot));
    const int32_t keep = (n + kPageEntries - 1) / kPageEntries;
    for (int32_t h = 0; h < heads_; ++h) {
        for (int32_t i = keep; i < max_pages_; ++i) {
            int32_t& number = page(slot, h, i);
            if (number < 0) break;
            put_page(number);
            number = -1;
        }
    }
    set_length(slot, n);
    upload_slot(slot);
}

void KvCache::share_prefix(int32_t from, int32_t to, int32_t n) {
    REFRAG_DCHECK(length(to) == 0 && n <= length(from) && from != to);
    truncate(to, 0);  // also gives back pages reserved but never written
    const int32_t n_pages = (n + kPageEntries - 1) / kPageEntries;
    for (int32_t h = 0; h < heads_; ++h) {
        for (int32_t i = 0; i < n_pages; ++i) {
            const int32_t number = page(from, h, i);
            ++references_[static_cast<size_t>(number)];
            page(to, h, i) = number;
        }
    }
    set_length(to, n);
    upload_slot(to);
}

}  // namespace refrag
