// Two ways to the same merges. Words of everyday length: an array of symbols and a scan for the best pair,
// which beats any queue at that size. Longer words: symbols in a linked list, and the places where a rule may
// apply queued by rank, so that a megabyte without a space costs about as much for each byte as a line does.
#include "text/bpe.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <map>

#include "base/check.h"

namespace refrag {

MergeTable::MergeTable(size_t n_merges) {
    size_t n_slots = 2;
    while (n_slots < 2 * n_merges + 2) n_slots *= 2;
    slots_.assign(n_slots, {no_key, {no_rank, -1}});
    mask_ = n_slots - 1;
}

bool MergeTable::add(int32_t left, int32_t right, Merge merge) {
    const uint64_t key = key_of(left, right);
    size_t i = slot_of(key);
    while (slots_[i].key != no_key) {
        if (slots_[i].key == key) return false;
        i = (i + 1) & mask_;
    }
    slots_[i] = {key, merge};
    return true;
}

namespace {

constexpr size_t max_short_bytes = 48;

constexpr size_t max_word_bytes = UINT32_MAX - 1;

// The places of a long word where one rule may apply, lowest first. Nearly all arrive in rising order and go
// to `run_`; the few late ones go to a small heap beside it.
class Places {
  public:
    void push(uint32_t place) {
        if (run_.empty() || place >= run_.back()) {
            run_.push_back(place);
        } else {
            late_.push_back(place);
            std::push_heap(late_.begin(), late_.end(), std::greater<>());
        }
    }
    bool empty() const { return run_.empty() && late_.empty(); }
    uint32_t pop() {
        if (late_.empty() || (!run_.empty() && run_.front() <= late_.front())) {
            const uint32_t place = run_.front();
            run_.pop_front();
            return place;
        }
        std::pop_heap(late_.begin(), late_.end(), std::greater<>());
        const uint32_t place = late_.back();
        late_.pop_back();
        return place;
    }

  private:
    std::deque<uint32_t> run_;
    std::vector<uint32_t> late_;
};

// The symbols of a long word as a linked list in two arrays, 8 bytes a byte of text. A symbol is named by the
// place of its first byte and covers [place, next(place)); bytes inside a symbol have id -1.
class Symbols {
  public:
    Symbols(std::string_view word, const std::array<int32_t, 256>& byte_ids)
        : size_(static_cast<uint32_t>(word.size())), ids_(word.size()), links_(word.size()) {
        for (uint32_t i = 0; i < size_; ++i) {
            ids_[i] = byte_ids[static_cast<unsigned char>(word[i])];
            links_[i] = i + 1;
        }
    }
    uint32_t size() const { return size_; }
    int32_t id(uint32_t place) const { return ids_[place]; }
    uint32_t next(uint32_t place) const { return links_[place]; }
    // Needs place > 0. The byte before is a symbol of one byte, or the last of a longer one, which links to
    // its first.
    uint32_t previous(uint32_t place) const { return ids_[place - 1] >= 0 ? place - 1 : links_[place - 1]; }
    // Makes the symbol at `place` and the one after it into one.
    void join(uint32_t place, int32_t id) {
        const uint32_t right = links_[place];
        const uint32_t end = links_[right];
        ids_[place] = id;
        ids_[right] = -1;
        links_[place] = end;
        links_[end - 1] = place;
    }

  private:
    uint32_t size_;
    std::vector<int32_t> ids_;
    std::vector<uint32_t>
        links_;  // first byte: where the next symbol begins; last of several: where this one begins
};

}  // namespace

void Bpe::encode(std::string_view word, std::vector<BpePiece>& out) const {
    if (word.size() <= max_short_bytes)
        encode_short(word, out);
    else
        encode_long(word, out);
}

void Bpe::encode_short(std::string_view word, std::vector<BpePiece>& out) const {
    std::array<BpePiece, max_short_bytes> symbols;
    std::array<uint32_t, max_short_bytes> ranks;  // of the pair (i, i + 1)
    std::array<int32_t, max_short_bytes> merged;  // what that pair becomes
    size_t n = word.size();
    const auto look_up = [&](size_t i) {
        const Merge merge = merges.find(symbols[i].id, symbols[i + 1].id);
        ranks[i] = merge.rank;
        merged[i] = merge.id;
    };
    for (size_t i = 0; i < n; ++i) symbols[i] = {byte_ids[static_cast<unsigned char>(word[i])], 1};
    for (size_t i = 0; i + 1 < n; ++i) look_up(i);

    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; ++i)
            if (ranks[i] < ranks[best]) best = i;
        if (ranks[best] == no_rank) break;

        symbols[best] = {merged[best], symbols[best].bytes + symbols[best + 1].bytes};
        --n;
        for (size_t i = best + 1; i < n; ++i) {
            symbols[i] = symbols[i + 1];
            ranks[i] = ranks[i + 1];
            merged[i] = merged[i + 1];
        }
        if (best > 0) look_up(best - 1);
        if (best + 1 < n) look_up(best);
    }
    out.insert(out.end(), symbols.begin(), symbols.begin() + static_cast<std::ptrdiff_t>(n));
}

void Bpe::encode_long(std::string_view word, std::vector<BpePiece>& out) const {
    REFRAG_CHECK(word.size() <= max_word_bytes, Status::runtime, "a word of ", word.size(),
                 " bytes without a break cannot be tokenised: expected at most ", max_word_bytes);
    Symbols symbols(word, byte_ids);
    const uint32_t n = symbols.size();
    std::map<uint32_t, Places>
        queue;  // rank -> places; a place whose symbols have changed since is passed over
    const auto merge_at = [&](uint32_t place) {
        return merges.find(symbols.id(place), symbols.id(symbols.next(place)));
    };
    const auto offer = [&](uint32_t place) {
        const Merge merge = merge_at(place);
        if (merge.rank != no_rank) queue[merge.rank].push(place);
    };
    for (uint32_t i = 0; i + 1 < n; ++i) offer(i);

    while (!queue.empty()) {
        const auto lowest = queue.begin();
        if (lowest->second.empty()) {
            queue.erase(lowest);
            continue;
        }
        const uint32_t place = lowest->second.pop();
        if (symbols.id(place) < 0 || symbols.next(place) == n) continue;
        const Merge merge = merge_at(place);
        if (merge.rank != lowest->first) continue;

        symbols.join(place, merge.id);
        if (symbols.next(place) != n) offer(place);
        if (place > 0) offer(symbols.previous(place));
    }
    for (uint32_t i = 0; i < n; i = symbols.next(i)) out.push_back({symbols.id(i), symbols.next(i) - i});
}

}  // namespace refrag
