// Beginnings of prompts whose K and V are kept: a tree of blocks (32 rows each) over a KvCache's pages. Two
// prompts share a block where they are equal row for row from the first row on: token ids, and for compressed
// chunks what they are made of. Which chunks are expanded is part of that, since an expanded chunk is tokens.
// K and V of a row depend on the rows before it alone, so equal prefixes have equal pages.
//
// Only whole blocks are kept, so a shared page is never written. One thread, the cache's.
#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/sha256.h"
#include "models/kv_cache.h"

namespace refrag {

// What a row of a prompt is: equal names, equal rows. Of a token its id; of a chunk row 128 bits of the
// digest of what it is made of, with its place there.
struct RowName {
    uint64_t high = 0;  // 0: a token
    uint64_t low = 0;
    bool operator==(const RowName&) const = default;
};
RowName token_row_name(int32_t id);
RowName chunk_row_name(const Sha256Digest& of, int64_t index);

class PrefixCache {
  public:
    // `kv` must outlive it.
    explicit PrefixCache(KvCache& kv) : kv_(kv) {}
    ~PrefixCache() { clear(); }
    PrefixCache(const PrefixCache&) = delete;
    PrefixCache& operator=(const PrefixCache&) = delete;

    // Puts the longest kept prefix of a prompt into an empty slot. The prompt's last row is never among it,
    // since its logits are wanted. Returns its rows, a multiple of 32. Allocates nothing where the slot has
    // the memory (KvCache::expect); what it throws leaves in the slot what was put there.
    int32_t restore(int32_t slot, std::span<const RowName> rows);
    // Keeps the whole blocks of what a slot holds, also in place of equal ones that are kept already; `rows`
    // name all its entries or the first of them. n_idle() and free blocks together do not get fewer. Where
    // the host's memory runs out it keeps fewer.
    void keep(int32_t slot, std::span<const RowName> rows) noexcept;

    // Blocks that are kept for nobody: make_room() can give them back. Time: linear in n_blocks().
    int64_t n_idle() const;
    // Gives back blocks that no slot uses, the longest unused first, until the pool has n free ones or none
    // is left. Time: linear in those given back and those in use that were used before them.
    void make_room(int64_t n_blocks) noexcept;
    void clear() noexcept;
    int64_t n_blocks() const { return std::ssize(nodes_); }

  private:
    struct Node;
    using Nodes = std::list<Node>;
    struct Node {
        uint64_t id = 0;
        Node* parent = nullptr;  // null: a prompt's first block
        uint64_t hash = 0;
        std::vector<RowName> rows;
        KvBlock block;
        int64_t n_children = 0;
        Nodes::iterator self;
        mutable bool before_used = false;  // n_idle's: a block behind it is in use
    };
    static uint64_t hash_of(const Node* parent, std::span<const RowName> rows);
    Node* find(const Node* parent, uint64_t hash, std::span<const RowName> rows) const;
    Node& add(Node* parent, uint64_t hash, std::span<const RowName> rows, KvBlock block);
    void touch(Node& node) noexcept;
    Nodes::iterator erase(Nodes::iterator at) noexcept;

    KvCache& kv_;
    Nodes nodes_;  // the longest unused first, each behind those that continue it
    std::unordered_multimap<uint64_t, Node*> by_hash_;
    uint64_t next_id_ = 1;
};

}  // namespace refrag
