// Byte-pair encoding of one word: start from single bytes, then always merge the neighbouring pair whose rule
// has the lowest rank, the leftmost of equals first, until no rule applies. Independent of files and of
// Unicode.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace refrag {

// What a rule does: its rank (its line in the merges list) and the token it makes.
struct Merge {
    uint32_t rank;
    int32_t id;
};

constexpr uint32_t no_rank = UINT32_MAX;

// (left id, right id) -> Merge: open addressing, at most half full, so that a miss costs about one probe.
class MergeTable {
  public:
    explicit MergeTable(size_t n_merges = 0);
    // False where the pair already has a rule. Ids must be >= 0; at most the n_merges given may be added.
    bool add(int32_t left, int32_t right, Merge merge);
    // rank is no_rank where there is no rule.
    Merge find(int32_t left, int32_t right) const {
        const uint64_t key = key_of(left, right);
        for (size_t i = slot_of(key);; i = (i + 1) & mask_) {
            const Slot& slot = slots_[i];
            if (slot.key == key) return slot.merge;
            if (slot.key == no_key) return {no_rank, -1};
        }
    }

  private:
    struct Slot {
        uint64_t key;
        Merge merge;
    };
    static constexpr uint64_t no_key = UINT64_MAX;
    static uint64_t key_of(int32_t left, int32_t right) {
        return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
    }
    size_t slot_of(uint64_t key) const {
        return static_cast<size_t>(key * 0x9E3779B97F4A7C15u >> 32) & mask_;
    }

    std::vector<Slot> slots_;
    size_t mask_;
};

// One token of a word and the bytes it covers.
struct BpePiece {
    int32_t id;
    uint32_t bytes;
};

// The rules of one vocabulary. Immutable in use.
struct Bpe {
    std::array<int32_t, 256> byte_ids{};  // the token of each single byte
    MergeTable merges;

    // Appends the tokens of a word to `out`. Time n log n in the worst case, about n in practice; words of up
    // to 2^32 - 2 bytes.
    void encode(std::string_view word, std::vector<BpePiece>& out) const;

  private:
    void encode_short(std::string_view word, std::vector<BpePiece>& out) const;
    void encode_long(std::string_view word, std::vector<BpePiece>& out) const;
};

}  // namespace refrag
