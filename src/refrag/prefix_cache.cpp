// See prefix_cache.h.
#include "refrag/prefix_cache.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

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

PrefixCache::Node* PrefixCache::find(const Node* parent, uint64_t hash, std::span<const RowName> rows) const {
    const auto [begin, end] = by_hash_.equal_range(hash);
    for (auto at = begin; at != end; ++at) {
        Node& node = *at->second;
        if (node.parent == parent && std::equal(rows.begin(), rows.end(), node.rows.begin(), node.rows.end()))
            return &node;
    }
    return nullptr;
}

// Called for a prompt's blocks in their order, so that each comes to lie right before the one that it
// continues, and the first at the end.
void PrefixCache::touch(Node& node) noexcept {
    nodes_.splice(node.parent == nullptr ? nodes_.end() : node.parent->self, nodes_, node.self);
}

PrefixCache::Node& PrefixCache::add(Node* parent, uint64_t hash, std::span<const RowName> rows,
                                    KvBlock block) {
    Nodes fresh(1);
    Node& node = fresh.front();
    node.rows.assign(rows.begin(), rows.end());
    by_hash_.emplace(hash, &node);
    node.id = next_id_++;
    node.parent = parent;
    node.hash = hash;
    node.block = std::move(block);
    node.self = fresh.begin();
    nodes_.splice(nodes_.end(), fresh);
    if (parent != nullptr) ++parent->n_children;
    return node;
}

PrefixCache::Nodes::iterator PrefixCache::erase(Nodes::iterator at) noexcept {
    if (at->parent != nullptr) --at->parent->n_children;
    kv_.drop_block(at->block);
    auto named = by_hash_.equal_range(at->hash).first;
    while (named->second != &*at) ++named;
    by_hash_.erase(named);
    return nodes_.erase(at);
}

int32_t PrefixCache::restore(int32_t slot, std::span<const RowName> rows) {
    REFRAG_DCHECK(kv_.length(slot) == 0);
    Node* parent = nullptr;
    for (size_t i = 0; (i + 1) * kPageEntries < rows.size(); ++i) {
        const std::span<const RowName> block = block_of(rows, i);
        Node* const node = find(parent, hash_of(parent, block), block);
        if (node == nullptr) break;
        kv_.append_block(slot, node->block);
        touch(*node);
        parent = node;
    }
    return kv_.length(slot);
}

void PrefixCache::keep(int32_t slot, std::span<const RowName> rows) noexcept {
    Node* parent = nullptr;
    for (size_t i = 0; (i + 1) * kPageEntries <= rows.size(); ++i) {
        const std::span<const RowName> block = block_of(rows, i);
        const uint64_t hash = hash_of(parent, block);
        Node* node = find(parent, hash, block);
        KvBlock held;
        try {
            held = kv_.hold_block(slot, static_cast<int32_t>(i));
            if (node == nullptr) {
                node = &add(parent, hash, block, held);
            } else {
                // Equal rows that another slot read. The slot's own page takes its place, so that what is
                // kept behind it never holds idle pages fast: those are promised to others.
                node->block.swap(held);
                kv_.drop_block(held);
            }
        } catch (...) {
            kv_.drop_block(held);
            return;
        }
        touch(*node);
        parent = node;
    }
}

int64_t PrefixCache::n_idle() const {
    // Of a block that a slot uses, those before it may have come from another slot, which has let go of
    // them; they stay as long as it does. What continues a block comes before it here.
    int64_t n = 0;
    for (const Node& node : nodes_) {
        const bool used = kv_.is_shared(node.block) || node.before_used;
        node.before_used = false;
        if (used && node.parent != nullptr) node.parent->before_used = true;
        n += used ? 0 : 1;
    }
    return n;
}

void PrefixCache::make_room(int64_t n_blocks) noexcept {
    for (auto at = nodes_.begin(); at != nodes_.end() && kv_.free_blocks() < n_blocks;) {
        const bool stays = at->n_children > 0 || kv_.is_shared(at->block);
        at = stays ? std::next(at) : erase(at);
    }
}

void PrefixCache::clear() noexcept {
    for (const Node& node : nodes_) kv_.drop_block(node.block);
    by_hash_.clear();
    nodes_.clear();
}

}  // namespace refrag
