// See prefix_cache.h.
#include "refrag/prefix_cache.h"

#include <algorithm>
#include <cstring>

namespace refrag {
namespace {

// A bijection of 64 bits in which every input bit reaches every output bit (the finalizer of MurmurHash3).
uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

std::span<const RowName> block_of(std::span<const RowName> rows, size_t index) {
    return rows.subspan(index * kPageEntries, kPageEntries);
}

}  // namespace

RowName token_row_name(int32_t id) {
    return {0, static_cast<uint32_t>(id)};
}

RowName chunk_row_name(const Sha256Digest& of, int64_t index) {
    static_assert(sizeof(Sha256Digest) >= 16);
    RowName name;
    std::memcpy(&name.high, of.bytes.data(), 8);
    std::memcpy(&name.low, of.bytes.data() + 8, 8);
    name.high |= 1;  // no token's
    // An odd multiple is another number for each index.
    name.low += static_cast<uint64_t>(index) * 0x9e3779b97f4a7c15u;
    return name;
}

uint64_t PrefixCache::hash_of(const Node* parent, std::span<const RowName> rows) {
    uint64_t hash = parent == nullptr ? 0 : parent->id;
    for (const RowName& row : rows) hash = mixed(mixed(hash ^ row.high) ^ row.low);
    return hash;
}

PrefixCache::Node* PrefixCache::find(const Node* parent, std::span<const RowName> rows) const {
    const auto [begin, end] = nodes_.equal_range(hash_of(parent, rows));
    for (auto at = begin; at != end; ++at) {
        Node& node = *at->second;
        if (node.parent == parent && std::equal(rows.begin(), rows.end(), node.rows.begin(), node.rows.end()))
            return &node;
    }
    return nullptr;
}

int32_t PrefixCache::restore(int32_t slot, std::span<const RowName> rows) {
    REFRAG_DCHECK(kv_.length(slot) == 0);
    ++clock_;
    Node* parent = nullptr;
    for (size_t i = 0; (i + 1) * kPageEntries < rows.size(); ++i) {
        Node* const node = find(parent, block_of(rows, i));
        if (node == nullptr) break;
        kv_.append_block(slot, node->block);
        node->used = clock_;
        parent = node;
    }
    return kv_.length(slot);
}

void PrefixCache::keep(int32_t slot, std::span<const RowName> rows) {
    REFRAG_DCHECK(std::ssize(rows) <= kv_.length(slot));
    ++clock_;
    Node* parent = nullptr;
    for (size_t i = 0; (i + 1) * kPageEntries <= rows.size(); ++i) {
        const std::span<const RowName> block = block_of(rows, i);
        Node* node = find(parent, block);
        if (node == nullptr) {
            auto fresh = std::make_unique<Node>();
            fresh->id = next_id_++;
            fresh->parent = parent;
            fresh->rows.assign(block.begin(), block.end());
            node = fresh.get();
            const auto at = nodes_.emplace(hash_of(parent, block), std::move(fresh));
            try {
                node->block = kv_.hold_block(slot, static_cast<int32_t>(i));
            } catch (...) {
                nodes_.erase(at);
                throw;
            }
            if (parent != nullptr) ++parent->n_children;
        }
        node->used = clock_;
        parent = node;
    }
}

int64_t PrefixCache::n_idle() const {
    return std::count_if(nodes_.begin(), nodes_.end(),
                         [&](const auto& entry) { return !kv_.is_shared(entry.second->block); });
}

void PrefixCache::make_room(int64_t n_blocks) noexcept {
    while (kv_.free_blocks() < n_blocks) {
        // A block with others behind it stays until those are gone. Where a slot uses one, it uses all
        // before.
        auto oldest = nodes_.end();
        for (auto at = nodes_.begin(); at != nodes_.end(); ++at) {
            const Node& node = *at->second;
            if (node.n_children > 0 || kv_.is_shared(node.block)) continue;
            if (oldest == nodes_.end() || node.used < oldest->second->used) oldest = at;
        }
        if (oldest == nodes_.end()) return;
        if (Node* const parent = oldest->second->parent) --parent->n_children;
        kv_.drop_block(oldest->second->block);
        nodes_.erase(oldest);
    }
}

void PrefixCache::clear() noexcept {
    for (const auto& [hash, node] : nodes_) kv_.drop_block(node->block);
    nodes_.clear();
}

}  // namespace refrag
