// Two ways to the same merges. Words of everyday length: an array of symbols and a scan for the best pair,
// which beats any queue at that size. Longer words: symbols in a linked list, and a queue by rank of the
// places where a rule may apply. They are merged in windows that stay in a core's cache, so that a megabyte
// without a space costs about as much for each byte as a line does.
#include "text/bpe.h"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
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

// Merges out[first, end) in place: at most few_symbols.
void merge_few(const MergeTable& merges, size_t first, std::vector<BpePiece>& out) {
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

// The places of a window where one rule may apply, lowest first. Nearly all arrive in rising order and go to
// `run_`; the few late ones go to a small heap beside it.
class Places {
  public:
    void push(uint32_t place) {
        if (next_ == run_.size() || place >= run_.back()) {
            run_.push_back(place);
        } else {
            late_.push_back(place);
            std::push_heap(late_.begin(), late_.end(), std::greater<>());
        }
    }
    bool empty() const { return next_ == run_.size() && late_.empty(); }
    uint32_t pop() {
        if (late_.empty() || (next_ < run_.size() && run_[next_] <= late_.front())) {
            const uint32_t place = run_[next_++];
            if (next_ == run_.size()) {
                run_.clear();
                next_ = 0;
            }
            return place;
        }
        std::pop_heap(late_.begin(), late_.end(), std::greater<>());
        const uint32_t place = late_.back();
        late_.pop_back();
        return place;
    }

  private:
    std::vector<uint32_t> run_;
    size_t next_ = 0;  // of run_
    std::vector<uint32_t> late_;
};

// The places of a window where a rule may apply, by rank and then from the left. Memory is kept from rank to
// rank and from window to window.
class MergeQueue {
  public:
    struct Entry {
        uint32_t rank;
        uint32_t place;
    };
    void push(Entry entry) {
        // One character over and over offers the same rule over and over.
        if (entry.rank != latest_rank_) {
            latest_ = &places_of(entry.rank);
            latest_rank_ = entry.rank;
        }
        latest_->push(entry.place);
    }
    std::optional<Entry> pop() {
        while (!by_rank_.empty()) {
            const auto lowest = by_rank_.begin();
            if (!lowest->second.empty()) return Entry{lowest->first, lowest->second.pop()};
            if (lowest->first == latest_rank_) latest_rank_ = no_rank;
            spare_.push_back(by_rank_.extract(lowest));
        }
        return std::nullopt;
    }

  private:
    Places& places_of(uint32_t rank) {
        const auto at = by_rank_.lower_bound(rank);
        if (at != by_rank_.end() && at->first == rank) return at->second;
        if (spare_.empty()) return by_rank_.emplace_hint(at, rank, Places())->second;
        auto node = std::move(spare_.back());
        spare_.pop_back();
        node.key() = rank;
        return by_rank_.insert(at, std::move(node))->second;
    }

    std::map<uint32_t, Places> by_rank_;
    std::vector<std::map<uint32_t, Places>::node_type> spare_;
    uint32_t latest_rank_ = no_rank;
    Places* latest_ = nullptr;  // the places of latest_rank_, unless that is no_rank
};

// A stretch of a word and its symbols, a linked list over the pieces it began with. A symbol is named by the
// place of its first piece and covers [place, next(place)).
class Window {
  public:
    void assign(std::span<const BpePiece> word) {
        pieces_.resize(word.size());
        for (uint32_t i = 0; i < end(); ++i) pieces_[i] = {word[i].id, i + 1, {no_rank, -1}};
    }
    // Applies rules until none is left to apply.
    void merge_all(const MergeTable& merges) {
        for (uint32_t i = 0; i < end(); ++i) offer(merges, i);
        while (const std::optional<MergeQueue::Entry> lowest = queue_.pop()) {
            const uint32_t place = lowest->place;
            // Passed over where the symbols have changed since.
            if (pieces_[place].pair.rank != lowest->rank) continue;
            join(place);
            offer(merges, place);
            if (place > 0) offer(merges, previous(place));
        }
    }
    uint32_t end() const { return static_cast<uint32_t>(pieces_.size()); }
    int32_t id(uint32_t place) const { return pieces_[place].id; }
    uint32_t next(uint32_t place) const { return pieces_[place].link; }

  private:
    struct Piece {
        int32_t id;     // of the symbol that begins here; -1 inside a symbol
        uint32_t link;  // a symbol's first piece: where the next symbol begins; the last of several: where
                        // this one begins
        Merge pair;     // the rule for the symbol that begins here and the one after it
    };

    // Needs place > 0. The piece before is a symbol of its own, or the last of a longer one.
    uint32_t previous(uint32_t place) const {
        return pieces_[place - 1].id >= 0 ? place - 1 : pieces_[place - 1].link;
    }
    // Makes the symbol at `place` and the one after it into what their rule says.
    void join(uint32_t place) {
        const uint32_t right = pieces_[place].link;
        const uint32_t end = pieces_[right].link;
        pieces_[place].id = pieces_[place].pair.id;
        pieces_[right].id = -1;
        pieces_[right].pair.rank = no_rank;
        pieces_[place].link = end;
        pieces_[end - 1].link = place;
    }
    void offer(const MergeTable& merges, uint32_t place) {
        Piece& piece = pieces_[place];
        piece.pair = piece.link < end() ? merges.find(piece.id, pieces_[piece.link].id) : Merge{no_rank, -1};
        if (piece.pair.rank != no_rank) queue_.push({piece.pair.rank, place});
    }

    std::vector<Piece> pieces_;
    MergeQueue queue_;
};

// Merges long words, in windows that fit a core's cache.
//
// This rests on a fact about any set of rules. Two or more tokens are the encoding of their text if and only
// if each neighbouring two of them are the encoding of theirs. The reason: as long as no merge has crossed a
// border between tokens, two neighbours merge as if they stood alone. So the first merge to cross a border
// would cross it there too.
//
// Hence two encodings of overlapping stretches may be joined at a token that both have. (That is two
// neighbouring borders that both have: the text between them merges to the same token.)
//
// Each window begins with a token of what is done, and the join is made there. It begins far enough back that
// this token is likely to come out the same. If the token comes out differently, no later token agrees
// either; then the window is begun further back.
class LongMerger {
  public:
    explicit LongMerger(const Bpe& bpe) : bpe_(bpe) {}

    // Merges out[first, end) in place.
    void merge(size_t first, std::vector<BpePiece>& out) {
        const std::span<BpePiece> word = std::span<BpePiece>(out).subspan(first);
        size_t done = 0;
        tokens_.clear();
        ends_.clear();
        // Where windows do not join, the overlap at least doubles. So this happens at most log n times, and
        // rules made to cause it cost no more than n log n symbols in all.
        size_t overlap = bpe_.window_overlap;
        size_t advance = std::max(bpe_.window_advance, overlap);
        while (done < word.size()) {
            size_t kept = tokens_.size();
            const auto kept_end = [&] { return kept > 0 ? size_t{ends_[kept - 1]} : 0; };
            while (kept > 0 && done - kept_end() < overlap) --kept;
            const size_t begin = kept_end();
            const size_t end = std::min(word.size(), done + advance);
            window_.assign(word.subspan(begin, end - begin));
            window_.merge_all(bpe_.merges);
            if (kept > 0 && begin + window_.next(0) != ends_[kept]) {
                overlap = 2 * (done - begin);
                advance = std::max(advance, overlap);
                continue;
            }
            tokens_.resize(kept);
            ends_.resize(kept);
            for (uint32_t at = 0; at < window_.end();) {
                BpePiece token{window_.id(at), 0};
                for (const uint32_t next = window_.next(at); at < next; ++at)
                    token.bytes += word[begin + at].bytes;
                tokens_.push_back(token);
                ends_.push_back(static_cast<uint32_t>(begin) + at);
            }
            done = end;
        }
        std::copy(tokens_.begin(), tokens_.end(), word.begin());
        out.resize(first + tokens_.size());
    }

  private:
    const Bpe& bpe_;
    Window window_;
    std::vector<BpePiece> tokens_;  // the encoding of word[0, done)
    std::vector<uint32_t> ends_;    // of each token, in symbols of the word
};

}  // namespace

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
        const size_t n = pieces_.size() - first_;
        if (n > few_symbols)
            merge_many();
        else if (n > 1)
            merge_few(bpe_.merges, first_, pieces_);
        first_ = pieces_.size();
    }
    void merge_many();

    const Bpe& bpe_;
    std::vector<BpePiece>& pieces_;
    const Emit& emit_;
    size_t first_ = 0;  // the symbols from here on are not merged yet
    bool cuts_;         // not in everyday words, where looking costs more than it saves
    int32_t previous_ = -1;
    uint32_t skipped_ = 0;
    std::optional<LongMerger> long_merger_;  // once there is use for one
};

// Apart from merge(), which everyday words go through.
void Bpe::Feeder::merge_many() {
    if (!long_merger_) long_merger_.emplace(bpe_);
    long_merger_->merge(first_, pieces_);
}

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

}  // namespace refrag
