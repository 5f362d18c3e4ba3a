// Two ways to the same merges. Words of everyday length: an array of symbols and a scan for the best pair,
// which beats any queue at that size. Longer words: symbols in a linked list, and the places where a rule may
// apply queued by rank, in windows that stay in a core's cache, so that a megabyte without a space costs
// about as much for each byte as a line does.
#include "text/bpe.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <span>

#include "base/check.h"
#include "base/utf8.h"

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

void WordIds::add(std::string word, int32_t id) {
    longest_ = std::max(longest_, word.size());
    ids_.emplace(std::move(word), id);
}

int32_t WordIds::find(std::string_view word) const {
    const auto found = ids_.find(word);
    return found == ids_.end() ? -1 : found->second;
}

void CharIds::add(char32_t code, int32_t id) {
    const size_t page = code >> 8;
    if (page >= pages_.size()) pages_.resize(page + 1);
    if (pages_[page] == nullptr) {
        pages_[page] = std::make_shared<std::array<int32_t, 256>>();
        pages_[page]->fill(-1);
    }
    (*pages_[page])[code & 0xFF] = id;
}

namespace {

constexpr size_t few_symbols = 48;

constexpr size_t max_word_bytes = UINT32_MAX - 1;

// Of a word merged in windows: how many symbols a window adds, and how many of those before it goes over
// again. A symbol costs 16 bytes and the queue's.
constexpr size_t window_symbols = 16384;
constexpr size_t window_overlap = 512;

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

// Symbols as a linked list over pieces that stand in a row. A symbol is named by the place of its first piece
// and covers [place, next(place)); pieces inside a symbol have id -1.
class Symbols {
  public:
    void assign(std::span<const BpePiece> symbols) {
        pieces_.assign(symbols.begin(), symbols.end());
        links_.resize(symbols.size());
        for (uint32_t i = 0; i < links_.size(); ++i) links_[i] = i + 1;
    }
    uint32_t end() const { return static_cast<uint32_t>(pieces_.size()); }
    const BpePiece& operator[](uint32_t place) const { return pieces_[place]; }
    uint32_t next(uint32_t place) const { return links_[place]; }
    // Needs place > 0. The piece before is a symbol of its own, or the last of a longer one, which links to
    // its first.
    uint32_t previous(uint32_t place) const {
        return pieces_[place - 1].id >= 0 ? place - 1 : links_[place - 1];
    }
    // Makes the symbol at `place` and the one after it into one.
    void join(uint32_t place, int32_t id) {
        const uint32_t right = links_[place];
        const uint32_t end = links_[right];
        pieces_[place].id = id;
        pieces_[place].bytes += pieces_[right].bytes;
        pieces_[right].id = -1;
        links_[place] = end;
        links_[end - 1] = place;
    }

  private:
    std::vector<BpePiece> pieces_;
    std::vector<uint32_t> links_;  // first piece: where the next symbol begins; last of several: where this
                                   // one begins
};

}  // namespace

// Merges the symbols until no rule applies.
void merge_all(const MergeTable& merges, Symbols& symbols) {
    std::map<uint32_t, Places>
        queue;  // rank -> places; a place whose symbols have changed since is passed over
    const uint32_t n = symbols.end();
    const auto merge_at = [&](uint32_t place) {
        return merges.find(symbols[place].id, symbols[symbols.next(place)].id);
    };
    uint32_t latest_rank = no_rank;  // one character over and over offers the same rule over and over
    Places* latest = nullptr;
    const auto offer = [&](uint32_t place) {
        const Merge merge = merge_at(place);
        if (merge.rank == no_rank) return;
        if (merge.rank != latest_rank) {
            latest = &queue[merge.rank];
            latest_rank = merge.rank;
        }
        latest->push(place);
    };
    for (uint32_t i = 0; i + 1 < n; ++i) offer(i);

    while (!queue.empty()) {
        const auto lowest = queue.begin();
        if (lowest->second.empty()) {
            if (lowest->first == latest_rank) latest_rank = no_rank;
            queue.erase(lowest);
            continue;
        }
        const uint32_t place = lowest->second.pop();
        if (symbols[place].id < 0 || symbols.next(place) == n) continue;
        const Merge merge = merge_at(place);
        if (merge.rank != lowest->first) continue;

        symbols.join(place, merge.id);
        if (symbols.next(place) != n) offer(place);
        if (place > 0) offer(symbols.previous(place));
    }
}

// Takes a word's first symbols one by one, and merges them up to every place that no merge can reach across.
class Bpe::Feeder {
  public:
    Feeder(const Bpe& bpe, size_t word_bytes, std::vector<BpePiece>& pieces, const Emit& emit)
        : bpe_(bpe), pieces_(pieces), emit_(emit), cuts_(bpe.has_joints && word_bytes > few_symbols) {
        pieces_.clear();
    }

    void add(int32_t id, uint32_t bytes) {
        if (cuts_ && bpe_.joints.find(previous_, id).rank == no_rank) {
            merge();
            if (pieces_.size() >= emitted_together) {
                emit_(pieces_);
                pieces_.clear();
                first_ = 0;
            }
        }
        pieces_.push_back({id, bytes + skipped_});
        skipped_ = 0;
        previous_ = id;
    }
    // Bytes that have no symbol: they go to the one before, or else to the next.
    void skip(uint32_t bytes) {
        if (!pieces_.empty())
            pieces_.back().bytes += bytes;
        else
            skipped_ += bytes;
    }
    void finish() {
        merge();
        emit_(pieces_);
    }

  private:
    static constexpr size_t emitted_together = 1024;  // so that they are still in the cache

    void merge() {
        bpe_.merge(first_, pieces_);
        first_ = pieces_.size();
    }

    const Bpe& bpe_;
    std::vector<BpePiece>& pieces_;
    const Emit& emit_;
    size_t first_ = 0;  // the symbols from here on are not merged yet
    bool cuts_;         // not in everyday words, where looking costs more than it saves
    int32_t previous_ = -1;
    uint32_t skipped_ = 0;
};

void Bpe::encode(std::string_view word, std::vector<BpePiece>& scratch, const Emit& emit) const {
    REFRAG_CHECK(word.size() <= max_word_bytes, Status::runtime, "a word of ", word.size(),
                 " bytes without a break cannot be tokenised: expected at most ", max_word_bytes);
    Feeder feeder(*this, word.size(), scratch, emit);
    const int32_t whole = word.size() <= whole_words.longest() ? whole_words.find(word) : -1;
    if (whole >= 0) {
        feeder.add(whole, static_cast<uint32_t>(word.size()));
    } else if (byte_level && all_bytes) {
        for (const char c : word) feeder.add(byte_ids[static_cast<unsigned char>(c)], 1);
    } else {
        feed_characters(word, feeder);
    }
    feeder.finish();
}

// Hugging Face's rules for what has no symbol: an unknown character waits until a known one comes, so that
// those after it can be fused with it; characters spelled by bytes do not end the wait.
void Bpe::feed_characters(std::string_view word, Feeder& feeder) const {
    uint32_t unknown_bytes = 0;  // of the unk_id that waits
    for (size_t at = 0; at < word.size();) {
        const Utf8Step step = byte_level ? Utf8Step{0, 1, true, false} : decode_utf8(word, at);
        const std::string_view bytes = word.substr(at, step.bytes);
        at += step.bytes;
        const int32_t id =
            byte_level ? byte_ids[static_cast<unsigned char>(bytes[0])] : char_ids.find(step.code);
        if (id >= 0) {
            if (unknown_bytes > 0) feeder.add(unk_id, unknown_bytes);
            unknown_bytes = 0;
            feeder.add(id, step.bytes);
            continue;
        }
        const auto has_piece = [&](char c) { return byte_ids[static_cast<unsigned char>(c)] >= 0; };
        if (!byte_level && std::all_of(bytes.begin(), bytes.end(), has_piece)) {
            for (const char c : bytes) feeder.add(byte_ids[static_cast<unsigned char>(c)], 1);
        } else if (unk_id < 0) {
            feeder.skip(step.bytes);
        } else {
            if (unknown_bytes > 0 && !fuse_unk) {
                feeder.add(unk_id, unknown_bytes);
                unknown_bytes = 0;
            }
            unknown_bytes += step.bytes;
        }
    }
    if (unknown_bytes > 0) feeder.add(unk_id, unknown_bytes);
}

void Bpe::merge(size_t first, std::vector<BpePiece>& out) const {
    const size_t n = out.size() - first;
    if (n > few_symbols)
        merge_many(first, out);
    else if (n > 1)
        merge_few(first, out);
}

void Bpe::merge_few(size_t first, std::vector<BpePiece>& out) const {
    BpePiece* const symbols = out.data() + first;
    std::array<uint32_t, few_symbols> ranks;  // of the pair (i, i + 1)
    std::array<int32_t, few_symbols> merged;  // what that pair becomes
    size_t n = out.size() - first;
    const auto look_up = [&](size_t i) {
        const Merge merge = merges.find(symbols[i].id, symbols[i + 1].id);
        ranks[i] = merge.rank;
        merged[i] = merge.id;
    };
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
    out.resize(first + n);
}

// Rests on a fact about any set of rules: tokens t1 .. tn are the encoding of their text if and only if each
// neighbouring two of them are the encoding of theirs. (As long as no merge has crossed a border between
// tokens, what happens inside two of them is what would happen if they stood alone; so the first merge to
// cross a border would cross it there too.) Hence two encodings of overlapping texts may be joined at a token
// that both have in the same place. A long word is merged in windows that fit a core's cache, each beginning
// with a token of those before; where the window makes another token there, it is begun further back.
void Bpe::merge_many(size_t first, std::vector<BpePiece>& out) const {
    const std::span<const BpePiece> word = std::span<const BpePiece>(out).subspan(first);
    std::vector<BpePiece> tokens;
    std::vector<size_t> ends;  // of each token, in symbols
    Symbols symbols;
    size_t done = 0;  // symbols of the word that `tokens` covers
    // Both grow where windows do not join, so that rules made to prevent it cost n log n at most.
    size_t overlap = window_overlap;
    size_t advance = window_symbols;
    while (done < word.size()) {
        size_t kept = tokens.size();  // the window begins after so many, with the last of those it may change
        while (kept > 0 && done - (kept > 1 ? ends[kept - 2] : 0) < overlap) --kept;
        if (kept > 0) --kept;
        const size_t begin = kept > 0 ? ends[kept - 1] : 0;
        const size_t end = std::min(word.size(), done + advance);
        symbols.assign(word.subspan(begin, end - begin));
        merge_all(merges, symbols);
        if (begin > 0 && (symbols[0].id != tokens[kept].id || symbols.next(0) != ends[kept] - begin)) {
            overlap = 2 * (done - begin);
            advance = std::max(advance, overlap);
            continue;
        }
        tokens.resize(kept);
        ends.resize(kept);
        for (uint32_t i = 0; i < symbols.end(); i = symbols.next(i)) {
            tokens.push_back(symbols[i]);
            ends.push_back(begin + symbols.next(i));
        }
        done = end;
    }
    std::copy(tokens.begin(), tokens.end(), out.begin() + static_cast<ptrdiff_t>(first));
    out.resize(first + tokens.size());
}

}  // namespace refrag
