// See generator.h.
#include "refrag/generator.h"

#include <algorithm>

#include "refrag/scoring.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

static_assert(max_parallel < kPrefillRows, "a step must have rows left for prompts");

KvCache checked_cache(Backend& backend, const Llama& decoder, int32_t n_slots, int64_t max_context) {
    const int64_t window = decoder.config().max_seq_len;
    REFRAG_CHECK(n_slots >= 1 && n_slots <= max_parallel, Status::usage, "parallel sequences: expected 1 to ",
                 max_parallel, ", found ", n_slots);
    REFRAG_CHECK(max_context >= 1 && max_context <= window, Status::usage, "context size: expected at most ",
                 window, " positions (the decoder's max_position_embeddings), found ", max_context);
    return decoder.make_kv_cache(backend, n_slots, max_context);
}

}  // namespace

Generator::Generator(Backend& backend, const Llama& decoder, int32_t n_slots, int64_t max_context)
    : backend_(backend),
      decoder_(decoder),
      kv_(checked_cache(backend, decoder, n_slots, max_context)),
      arena_(backend),
      sequences_(static_cast<size_t>(n_slots)) {}

uint64_t Generator::cache_bytes(const LlamaConfig& config, DType kv, int32_t n_slots, int64_t max_context) {
    const auto pages = static_cast<uint64_t>((max_context + kPageEntries - 1) / kPageEntries);
    const uint64_t page_bytes = 2 * kPageEntries * static_cast<uint64_t>(config.head_dim) * dtype_bytes(kv);
    const auto heads = static_cast<uint64_t>(config.n_layers) * static_cast<uint64_t>(config.n_kv_heads);
    return static_cast<uint64_t>(n_slots) * heads * pages * page_bytes;
}

int32_t Generator::start(std::vector<int32_t> source, Buffer slots, NextToken next, int32_t n_logits,
                         Draw draw) {
    REFRAG_DCHECK(has_free_slot() && !source.empty() && std::ssize(source) <= max_context());
    int32_t slot = 0;
    while (std::find(order_.begin(), order_.end(), slot) != order_.end()) ++slot;
    kv_.truncate(slot, 0);
    at(slot) = Sequence{std::move(source), 0,        std::move(slots), 0, false,
                        std::move(next),   n_logits, std::move(draw)};
    order_.push_back(slot);
    return slot;
}

void Generator::stop(int32_t slot) noexcept {
    // The slot's pages are its own and stay with it: giving them back is start's business, because it may
    // fail for want of memory and this may not.
    std::erase(order_, slot);
    at(slot) = Sequence{};
}

void Generator::plan_rows() {
    parts_.clear();
    int64_t left = kPrefillRows;
    for (const bool generating : {true, false}) {
        for (const int32_t slot : order_) {
            const Sequence& sequence = sequences_[static_cast<size_t>(slot)];
            if (sequence.generating != generating) continue;
            const int64_t n =
                std::min(left, std::ssize(sequence.source) - static_cast<int64_t>(sequence.fed));
            if (n > 0) parts_.push_back({slot, static_cast<int32_t>(n)});
            left -= n;
        }
    }
}

void Generator::feed() {
    const ArenaScope scratch(arena_);
    plan_.clear();
    source_.clear();
    slot_rows_.clear();
    outputs_.clear();
    last_rows_.clear();
    int64_t n_slot_rows = 0;
    for (const auto& [slot, n] : parts_) {
        Sequence& sequence = at(slot);
        kv_.reserve(slot, n);
        plan_.add_cached(slot, kv_.length(slot), n);
        int64_t named = 0;
        for (size_t i = sequence.fed; i < sequence.fed + static_cast<size_t>(n); ++i) {
            const int32_t row = sequence.source[i];
            REFRAG_DCHECK(row >= 0 || -1 - row == sequence.slots_fed + named);
            source_.push_back(row >= 0 ? row : static_cast<int32_t>(-1 - (n_slot_rows + named++)));
        }
        if (named > 0) slot_rows_.push_back({slot, named});
        n_slot_rows += named;
        if (sequence.fed + static_cast<size_t>(n) == sequence.source.size()) {
            outputs_.push_back(slot);
            last_rows_.push_back(plan_.n_rows() - 1);
        }
    }

    const int64_t dim = decoder_.config().dim;
    const Tensor slots = arena_.tensor(n_slot_rows, dim);
    int64_t begin = 0;
    for (const auto& [slot, n] : slot_rows_) {
        Sequence& sequence = at(slot);
        const Tensor from{sequence.slots.data(), DType::f32, sequence.slots_fed + n, dim};
        backend_.copy(slots.row_slice(begin, n), from.row_slice(sequence.slots_fed, n));
        sequence.slots_fed += n;
        begin += n;
    }
    const Tensor hidden = decoder_.forward(backend_, plan_, source_, slots, kv_, arena_);
    for (const auto& [slot, n] : parts_) {
        kv_.advance(slot, n);
        at(slot).fed += static_cast<size_t>(n);
    }
    if (outputs_.empty()) return;

    const double started_ms = now_ms();
    const Tensor last = arena_.tensor(std::ssize(outputs_), dim);
    backend_.gather_rows(last, hidden, upload_vector(backend_, arena_, last_rows_));
    const Tensor logits = decoder_.logits(backend_, last, arena_);
    ids_.clear();
    logits_.clear();
    n_logits_ = 0;
    if (draw(logits)) {
        logits_ms_ = now_ms() - started_ms;
        return;
    }
    n_logits_ = logits_wanted();
    Tensor wanted = logits;
    if (n_logits_ < logits.cols) {
        wanted = arena_.tensor(logits.rows, n_logits_);
        const Tensor ids = arena_.tensor(logits.rows, n_logits_, DType::i32);
        backend_.top_logits(wanted, static_cast<int32_t*>(ids.data), logits);
        ids_.resize(static_cast<size_t>(ids.size()));
        backend_.download(ids_.data(), ids.data, ids.bytes());
    }
    logits_.resize(static_cast<size_t>(wanted.size()));
    backend_.download(logits_.data(), wanted.data, wanted.bytes());
    logits_ms_ = now_ms() - started_ms;
}

bool Generator::draw(Tensor logits) {
    draws_.clear();
    drawn_.clear();
    if (!backend_.device().is_remote() || logits.cols < Backend::kMaxTopLogits) return false;
    for (const int32_t slot : outputs_) {
        const Sequence& sequence = at(slot);
        const std::optional<TokenDraw> draw = sequence.draw ? sequence.draw() : std::nullopt;
        if (!draw) return false;
        draws_.push_back(*draw);
    }
    const ArenaScope scratch(arena_);
    const TokenDraw* const draws = upload_vector(backend_, arena_, draws_);
    const Tensor ids = arena_.tensor(1, std::ssize(draws_), DType::i32);
    backend_.draw(static_cast<int32_t*>(ids.data), logits, draws);
    drawn_.resize(draws_.size());
    backend_.download(drawn_.data(), ids.data, ids.bytes());
    if (std::find(drawn_.begin(), drawn_.end(), -1) == drawn_.end()) return true;
    drawn_.clear();
    return false;
}

int64_t Generator::logits_wanted() const {
    const int64_t vocab = decoder_.config().vocab_size;
    if (!backend_.device().is_remote()) return vocab;
    int64_t most = 0;
    for (const int32_t slot : outputs_) {
        const int64_t n = sequences_[static_cast<size_t>(slot)].n_logits;
        if (n == 0 || n > Backend::kMaxTopLogits) return vocab;
        most = std::max(most, n);
    }
    return std::min(most, vocab);
}

const std::vector<Generator::Ended>& Generator::step() {
    ended_.clear();
    plan_rows();
    if (parts_.empty()) return ended_;
    ended_.reserve(parts_.size());  // nothing below may fail for want of memory
    try {
        feed();
    } catch (...) {
        // What the cache holds of these sequences is unknown now; all others were not touched.
        for (const auto& [slot, n] : parts_) ended_.push_back({slot, false, std::current_exception()});
        for (const Ended& end : ended_) stop(end.slot);
        return ended_;
    }
    const auto n_logits = static_cast<size_t>(n_logits_);
    for (size_t i = 0; i < outputs_.size(); ++i) {
        const int32_t slot = outputs_[i];
        Sequence& sequence = at(slot);
        sequence.slots = Buffer{};
        sequence.generating = true;
        Ended end{slot, false, nullptr};
        try {
            Logits logits{std::span(logits_).subspan(i * n_logits, n_logits), {}};
            if (!drawn_.empty()) logits.drawn = drawn_[i];
            if (!ids_.empty()) logits.ids = std::span(ids_).subspan(i * n_logits, n_logits);
            const std::optional<int32_t> id = sequence.next(logits, logits_ms_);
            end.context_full = id && kv_.length(slot) >= max_context();
            if (id && !end.context_full) {
                sequence.source.assign(1, *id);
                sequence.fed = 0;
                continue;
            }
        } catch (...) {
            end.error = std::current_exception();
        }
        stop(slot);
        ended_.push_back(end);
    }
    return ended_;
}

}  // namespace refrag
