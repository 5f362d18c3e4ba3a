// See kv_cache.h. The host's tables are the truth; a slot's part of the device's is uploaded by the reserve()
// that follows a change, so that giving pages back needs neither the device nor memory.
#include "models/kv_cache.h"

#include <algorithm>

namespace refrag {
namespace {

// Pages of a head that the table has room for at first: 512 entries.
constexpr int64_t kFirstTablePages = 16;

}  // namespace

KvCache::KvCache(Backend& backend, int32_t n_slots, int32_t n_layers, int32_t n_kv_heads, int32_t head_dim,
                 int64_t max_entries, DType dtype, int64_t n_blocks)
    : backend_(backend),
      n_slots_(n_slots),
      heads_(n_layers * n_kv_heads),
      max_pages_(static_cast<int32_t>(blocks_for(max_entries))),
      max_entries_(max_entries) {
    REFRAG_CHECK(n_slots > 0 && max_entries > 0 && max_entries <= INT32_MAX - kPageEntries, Status::usage,
                 "KV cache: expected at least one slot and 1 to ", INT32_MAX - kPageEntries,
                 " entries, found ", n_slots, " slots of ", max_entries);
    REFRAG_CHECK(n_blocks >= 0, Status::usage, "KV cache: expected 0 or more blocks, found ", n_blocks);
    if (n_blocks == 0) n_blocks = int64_t{n_slots} * max_pages_;
    // A slot's pages are all different, so no row of the table is longer than the pool.
    max_pages_ = static_cast<int32_t>(std::min<int64_t>(max_pages_, n_blocks));
    int64_t n_pages = 0;
    REFRAG_CHECK(!__builtin_mul_overflow(n_blocks, heads_, &n_pages) && n_pages <= INT32_MAX,
                 Status::out_of_memory, "KV cache: ", n_blocks, " blocks of ", heads_,
                 " pages are more than the ", INT32_MAX, " pages that a page table can number");
    const size_t page_bytes = static_cast<size_t>(2 * kPageEntries * head_dim) * dtype_bytes(dtype);
    const size_t n_heads = head_row(n_slots_, 0);
    length_.assign(n_heads, 0);
    table_.resize(n_heads);
    changed_.assign(static_cast<size_t>(n_slots_), false);
    references_.assign(static_cast<size_t>(n_pages), 0);
    free_.resize(static_cast<size_t>(n_pages));
    for (int64_t i = 0; i < n_pages; ++i) {
        free_[static_cast<size_t>(i)] = static_cast<int32_t>(n_pages - 1 - i);
    }
    pages_ = Buffer(backend_, static_cast<size_t>(n_pages) * page_bytes);
    length_device_ = Buffer(backend_, n_heads * sizeof(int32_t));
    backend_.upload(length_device_.data(), length_.data(), length_device_.bytes());
    view_ = {pages_.data(), dtype,    static_cast<int32_t*>(length_device_.data()),
             nullptr,       n_layers, n_kv_heads,
             head_dim,      0};
    widen_table(std::min<int64_t>(kFirstTablePages, max_pages_));
}

int32_t KvCache::take_page() {
    const int32_t number = free_.back();
    free_.pop_back();
    references_[static_cast<size_t>(number)] = 1;
    return number;
}

void KvCache::put_page(int32_t number) noexcept {
    // free_ was made with room for every page.
    if (--references_[static_cast<size_t>(number)] == 0) free_.push_back(number);
}

void KvCache::copy_page(int32_t from, int32_t to) {
    const auto page = [&](int32_t number) {
        Tensor t{nullptr, view_.dtype, 2 * kPageEntries, view_.head_dim};
        t.data = static_cast<std::byte*>(pages_.data()) + static_cast<size_t>(number) * t.bytes();
        return t;
    };
    backend_.copy(page(to), page(from));
}

void KvCache::set_length(int32_t slot, int32_t n) noexcept {
    std::fill_n(length_.begin() + static_cast<std::ptrdiff_t>(head_row(slot, 0)), heads_, n);
    changed_[static_cast<size_t>(slot)] = true;
}

uint64_t KvCache::most_table_bytes(int32_t n_slots, int32_t n_heads, int64_t n_pages) {
    // The old table, which work under way may read, is at most as wide as the new one less a page.
    const int64_t before = n_pages > kFirstTablePages ? n_pages - 1 : 0;
    return static_cast<uint64_t>(n_slots) * static_cast<uint64_t>(n_heads) *
           static_cast<uint64_t>(n_pages + before) * sizeof(int32_t);
}

void KvCache::widen_table(int64_t n_pages) {
    if (n_pages <= view_.max_pages) return;
    const int64_t doubled = std::max<int64_t>(n_pages, int64_t{2} * view_.max_pages);
    const auto width = static_cast<size_t>(std::min<int64_t>(doubled, max_pages_));
    // Of all slots at once, in memory of its own: work under way reads the old table, and an error here
    // leaves the cache as it was.
    std::vector<int32_t> table(table_.size() * width, -1);
    for (size_t row = 0; row < table_.size(); ++row) {
        std::copy(table_[row].begin(), table_[row].end(),
                  table.begin() + static_cast<std::ptrdiff_t>(row * width));
    }
    Buffer device(backend_, table.size() * sizeof(int32_t));
    backend_.upload(device.data(), table.data(), device.bytes());
    staged_.resize(static_cast<size_t>(heads_) * width);
    page_table_device_ = std::move(device);
    view_.page_table = static_cast<const int32_t*>(page_table_device_.data());
    view_.max_pages = static_cast<int32_t>(width);
}

void KvCache::upload_slot(int32_t slot) {
    // A slot's rows lie side by side, so that one upload brings them: every 32 entries of its life.
    size_t n_used = 0;  // of the longest head: what lies behind it is never read
    for (int32_t h = 0; h < heads_; ++h) n_used = std::max(n_used, pages_of(slot, h).size());
    auto* const table = static_cast<int32_t*>(page_table_device_.data());
    const auto row = static_cast<size_t>(view_.max_pages);
    std::fill(staged_.begin(), staged_.end(), -1);
    for (int32_t h = 0; h < heads_; ++h) {
        const std::vector<int32_t>& pages = pages_of(slot, h);
        std::copy(pages.begin(), pages.end(), staged_.begin() + static_cast<std::ptrdiff_t>(row) * h);
    }
    // Up to the last head's last page in use.
    const size_t n = n_used == 0 ? 0 : row * static_cast<size_t>(heads_ - 1) + n_used;
    if (n > 0) backend_.upload(table + head_row(slot, 0) * row, staged_.data(), n * sizeof(int32_t));
    backend_.upload(view_.length + head_row(slot, 0), length_.data() + head_row(slot, 0),
                    static_cast<size_t>(heads_) * sizeof(int32_t));
    changed_[static_cast<size_t>(slot)] = false;
}

void KvCache::expect(int32_t slot, int64_t n_entries) {
    const auto n = static_cast<size_t>(std::min<int64_t>(blocks_for(n_entries), max_pages_));
    for (int32_t h = 0; h < heads_; ++h) pages_of(slot, h).reserve(n);
}

void KvCache::reserve(int32_t slot, int32_t n) {
    const int32_t held = length(slot);
    REFRAG_CHECK(held + static_cast<int64_t>(n) <= max_entries_, Status::runtime, "KV cache: slot ", slot,
                 " holds ", held, " entries and cannot take ", n, " more: its limit is ", max_entries_);
    // Count before taking anything, so that an error leaves the cache as it was.
    const auto wanted = static_cast<size_t>(blocks_for(int64_t{held} + n));
    const auto first = static_cast<size_t>(held / kPageEntries);  // the first page that will be written
    int64_t need = 0;
    for (int32_t h = 0; n > 0 && h < heads_; ++h) {
        const std::vector<int32_t>& pages = pages_of(slot, h);
        need += std::ssize(pages) < static_cast<int64_t>(wanted) ? static_cast<int64_t>(wanted - pages.size())
                                                                 : 0;
        for (size_t i = first; i < std::min(pages.size(), wanted); ++i)
            need += is_shared_page(pages[i]) ? 1 : 0;
    }
    REFRAG_CHECK(need <= free_pages(), Status::out_of_memory, "KV cache: ", need, " pages needed, ",
                 free_pages(), " free of ", n_pages());
    widen_table(static_cast<int64_t>(wanted));
    if (need > 0) {
        // As far as the table goes, so that growing within it allocates nothing.
        for (int32_t h = 0; h < heads_; ++h) pages_of(slot, h).reserve(static_cast<size_t>(view_.max_pages));
        changed_[static_cast<size_t>(slot)] = true;
        for (int32_t h = 0; h < heads_; ++h) {
            std::vector<int32_t>& pages = pages_of(slot, h);
            for (size_t i = first; i < std::min(pages.size(), wanted); ++i) {
                if (!is_shared_page(pages[i])) continue;
                const int32_t old = pages[i], fresh = take_page();
                try {
                    copy_page(old, fresh);
                } catch (...) {
                    put_page(fresh);
                    throw;
                }
                pages[i] = fresh;
                put_page(old);
            }
            while (pages.size() < wanted) pages.push_back(take_page());
        }
    }
    if (changed_[static_cast<size_t>(slot)]) upload_slot(slot);
}

void KvCache::advance(int32_t slot, int32_t n) {
    for (int32_t h = 0; h < heads_; ++h) length_[head_row(slot, h)] += n;
    REFRAG_DCHECK(length(slot) <= max_entries_);
}

void KvCache::truncate(int32_t slot, int32_t n) noexcept {
    const auto keep = static_cast<size_t>(blocks_for(n));
    for (int32_t h = 0; h < heads_; ++h) {
        std::vector<int32_t>& pages = pages_of(slot, h);
        while (pages.size() > keep) {
            put_page(pages.back());
            pages.pop_back();
        }
    }
    set_length(slot, n);
}

void KvCache::share_prefix(int32_t from, int32_t to, int32_t n) {
    REFRAG_DCHECK(length(to) == 0 && n <= length(from) && from != to);
    truncate(to, 0);  // also gives back pages reserved but never written
    const auto n_shared = static_cast<size_t>(blocks_for(n));
    for (int32_t h = 0; h < heads_; ++h) pages_of(to, h).reserve(n_shared);
    for (int32_t h = 0; h < heads_; ++h) {
        for (size_t i = 0; i < n_shared; ++i) {
            const int32_t number = pages_of(from, h)[i];
            ++references_[static_cast<size_t>(number)];
            pages_of(to, h).push_back(number);
        }
    }
    set_length(to, n);
}

KvBlock KvCache::hold_block(int32_t slot, int32_t index) {
    REFRAG_DCHECK((index + 1) * kPageEntries <= length(slot));
    KvBlock block;
    block.reserve(static_cast<size_t>(heads_));
    for (int32_t h = 0; h < heads_; ++h) block.push_back(pages_of(slot, h)[static_cast<size_t>(index)]);
    for (const int32_t number : block) ++references_[static_cast<size_t>(number)];
    return block;
}

void KvCache::drop_block(const KvBlock& block) noexcept {
    for (const int32_t number : block) put_page(number);
}

void KvCache::append_block(int32_t slot, const KvBlock& block) {
    const int32_t held = length(slot);
    REFRAG_DCHECK(held % kPageEntries == 0 && held + kPageEntries <= max_entries_);
    REFRAG_DCHECK(std::ssize(block) == heads_);
    const auto at = static_cast<size_t>(held / kPageEntries);
    for (int32_t h = 0; h < heads_; ++h) pages_of(slot, h).reserve(at + 1);
    truncate(slot, held);  // also gives back pages reserved but never written
    for (int32_t h = 0; h < heads_; ++h) {
        const int32_t number = block[static_cast<size_t>(h)];
        ++references_[static_cast<size_t>(number)];
        pages_of(slot, h).push_back(number);
    }
    set_length(slot, held + kPageEntries);
}

}  // namespace refrag
