// Byte-pair encoding of one word. Start from single symbols (bytes or characters). Merge the neighbouring
// pair whose rule has the lowest rank, the leftmost of equals first, until no rule applies. Independent of
// files and of Unicode's tables.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
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

// Character -> id in pages of 256, since vocabularies use few of them.
class CharIds {
  public:
    void add(char32_t code, int32_t id);
    // -1 where there is none.
    int32_t find(char32_t code) const {
        const size_t page = code >> 8;
        return page < pages_.size() && pages_[page] != nullptr ? (*pages_[page])[code & 0xFF] : -1;
    }

  private:
    std::vector<std::shared_ptr<std::array<int32_t, 256>>> pages_;
};

// Word -> id.
class WordIds {
  public:
    void add(std::string word, int32_t id);
    // -1 where there is none.
    int32_t find(std::string_view word) const;
    size_t longest() const { return longest_; }  // in bytes; 0 where there are no words

  private:
    struct Hash {
        using is_transparent = void;
        size_t operator()(std::string_view word) const { return std::hash<std::string_view>()(word); }
    };
    std::unordered_map<std::string, int32_t, Hash, std::equal_to<>> ids_;
    size_t longest_ = 0;
};

// The rules of one vocabulary. Immutable in use.
struct Bpe {
    // The first symbols of a word. Byte-level: byte_ids has the token of each byte. Otherwise each character
    // has its own in char_ids, and byte_ids has the pieces "<0x00>" .. "<0xFF>" that spell a character
    // without one if all its bytes have theirs (byte fallback). -1: none. What has no symbol at all becomes
    // unk_id, or nothing where that is -1.
    bool byte_level = true;
    bool all_bytes = false;  // byte-level, and no byte is without a token
    std::array<int32_t, 256> byte_ids = no_bytes();
    CharIds char_ids;
    int32_t unk_id = -1;
    bool fuse_unk = false;  // neighbouring unknown characters become one unk_id

    MergeTable merges;
    // The pairs of neighbouring first symbols that some merge may join across; a long word is cut wherever
    // another pair stands. Meaningless unless has_joints.
    bool has_joints = false;
    MergeTable joints;
    // Words that are tokens as they stand, whatever the merges say (ignore_merges).
    WordIds whole_words;

    // A long word is merged in windows: how many symbols each adds, and how many of those before it is sure
    // to go over again (both >= 1). They make no difference to the tokens.
    size_t window_advance = 16384;
    size_t window_overlap = 512;

    // Gives the tokens of a word, valid UTF-8, to `emit`, in order, in one part or several. Their bytes add
    // up to the word's, but for what has no symbol at its end. Time n log^2 n in the worst case, about n
    // in practice; words of up to 2^32 - 2 bytes. `scratch` saves allocations from word to word.
    using Emit = std::function<void(std::span<const BpePiece>)>;
    void encode(std::string_view word, std::vector<BpePiece>& scratch, const Emit& emit) const;

    static constexpr std::array<int32_t, 256> no_bytes() {
        std::array<int32_t, 256> ids{};
        for (int32_t& id : ids) id = -1;
        return ids;
    }

  private:
    class Feeder;
    void feed_characters(std::string_view word, Feeder& feeder) const;
};

}  // namespace refrag
