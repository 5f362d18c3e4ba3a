// See generator.h. Sequences that come, wait for their rows and go; generator_feed.cpp feeds them.
#include "refrag/generator.h"

#include <algorithm>

namespace refrag {
namespace {

static_assert(max_parallel < Generator::kStepRows, "a step must have rows left for prompts");

KvCache checked_cache(Backend& backend, const Llama& decoder, int32_t n_slots, int64_t max_context,
                      int64_t kv_blocks) {
    const int64_t window = decoder.config().max_seq_len;
    REFRAG_CHECK(n_slots >= 1 && n_slots <= max_parallel, Status::usage, "parallel sequences: expected 1 to ",
                 max_parallel, ", found ", n_slots);
    REFRAG_CHECK(max_context >= 1 && max_context <= window, Status::usage, "context size: expected at most ",
                 window, " positions (the decoder's max_position_embeddings), found ", max_context);
    return decoder.make_kv_cache(backend, n_slots, max_context, kv_blocks);
}

}  // namespace

Generator::Generator(Backend& backend, const Llama& decoder, int32_t n_slots, int64_t max_context,
                     int64_t kv_blocks)
    : backend_(backend),
      decoder_(decoder),
      kv_(checked_cache(backend, decoder, n_slots, max_context, kv_blocks)),
      decode_workspace_(decoder.make_decode_workspace(backend, n_slots)),
      arena_(backend),
      sequences_(static_cast<size_t>(n_slots)) {}

uint64_t Generator::block_bytes(const DecoderConfig& config, DType kv) {
    const uint64_t page_bytes = 2 * kPageEntries * static_cast<uint64_t>(config.head_dim) * dtype_bytes(kv);
    return page_bytes * static_cast<uint64_t>(config.n_layers) * static_cast<uint64_t>(config.n_kv_heads);
}

uint64_t Generator::cache_bytes(const DecoderConfig& config, DType kv, int32_t n_slots, int64_t max_context) {
    return static_cast<uint64_t>(n_slots) * static_cast<uint64_t>(KvCache::blocks_for(max_context)) *
           block_bytes(config, kv);
}

int64_t Generator::most_entries(int64_t n_rows, int64_t max_new) const {
    if (max_new < 0) return std::min(max_context(), pool_entries());
    return std::min(max_context(), n_rows + max_new);
}

bool Generator::can_hold(int64_t n_rows, int64_t max_new) const {
    if (max_new == 0) return n_rows <= pool_entries();
    // A sequence without a limit of its own ends where the pool does, but not before its first id.
    return std::max(n_rows + 1, most_entries(n_rows, max_new)) <= pool_entries();
}

int64_t Generator::n_promised() const {
    int64_t n = 0;
    for (const int32_t slot : order_) {
        const int64_t held = KvCache::blocks_for(kv_.length(slot));
        n += std::max<int64_t>(0, sequences_[static_cast<size_t>(slot)].n_blocks - held);
    }
    return n;
}

size_t Generator::n_generating() const {
    return static_cast<size_t>(std::count_if(order_.begin(), order_.end(), [&](int32_t slot) {
        return sequences_[static_cast<size_t>(slot)].generating;
    }));
}

int64_t Generator::n_unread() const {
    int64_t n = 0;
    for (const int32_t slot : order_) {
        const Sequence& sequence = sequences_[static_cast<size_t>(slot)];
        if (!sequence.generating) n += std::ssize(sequence.source) - static_cast<int64_t>(sequence.fed);
    }
    return n;
}

std::optional<int32_t> Generator::start(Start& start) {
    REFRAG_DCHECK(!start.source.empty() && std::ssize(start.source) <= max_context());
    REFRAG_DCHECK(start.names.empty() || start.names.size() == start.source.size());
    if (!has_free_slot()) return std::nullopt;
    int32_t slot = 0;
    while (std::find(order_.begin(), order_.end(), slot) != order_.end()) ++slot;
    kv_.truncate(slot, 0);
    const int64_t n_entries = most_entries(std::ssize(start.source), start.max_new);
    const int64_t n_blocks = KvCache::blocks_for(n_entries);
    int32_t reused = 0;
    // All memory first: what follows cannot fail.
    try {
        order_.reserve(order_.size() + 1);
        kv_.expect(slot, n_blocks * kPageEntries);
        if (!start.names.empty()) {
            // The hidden state of a row that is taken over is not there to be scored.
            size_t n = start.names.size();
            if (!start.scores.empty()) n = std::min(n, static_cast<size_t>(start.scores.front().row) + 1);
            reused = prefixes_.restore(slot, std::span(start.names).first(n));
        }
        if (n_blocks - KvCache::blocks_for(reused) > available_blocks()) {
            kv_.truncate(slot, 0);
            return std::nullopt;
        }
        if (!start.names.empty()) start.names.reserve(static_cast<size_t>(n_blocks) * kPageEntries + 1);
    } catch (...) {
        kv_.truncate(slot, 0);
        throw;
    }
    Sequence& sequence = at(slot);
    sequence = Sequence{};
    sequence.source = std::move(start.source);
    sequence.fed = static_cast<size_t>(reused);
    sequence.chunk_rows = std::move(start.chunk_rows);
    for (size_t i = 0; i < sequence.fed; ++i) sequence.chunk_rows_fed += sequence.source[i] < 0 ? 1 : 0;
    sequence.names = std::move(start.names);
    sequence.n_blocks = n_blocks;
    sequence.n_entries = n_entries;
    sequence.n_reused = reused;
    sequence.next = std::move(start.next);
    sequence.n_logits = start.n_logits;
    sequence.draw = std::move(start.draw);
    sequence.generates = start.max_new != 0;
    sequence.scores = std::move(start.scores);
    sequence.n_top = start.n_top;
    sequence.scored = std::move(start.scored);
    order_.push_back(slot);
    ++counts_.prompts;
    counts_.prefix_hits += reused > 0 ? 1 : 0;
    counts_.rows_reused += reused;
    return slot;
}

int32_t Generator::start(std::vector<int32_t> source, Buffer chunk_rows, NextToken next, int32_t n_logits,
                         Draw draw) {
    Start request;
    request.source = std::move(source);
    request.chunk_rows = std::move(chunk_rows);
    request.next = std::move(next);
    request.n_logits = n_logits;
    request.draw = std::move(draw);
    const std::optional<int32_t> slot = start(request);
    REFRAG_CHECK(slot, Status::out_of_memory, "KV cache: no slot, or too few pages, for a sequence of ",
                 request.source.size(), " rows");
    return *slot;
}

void Generator::keep_prefix(int32_t slot) noexcept {
    // The last id was not fed.
    const std::span<const RowName> names = at(slot).names;
    prefixes_.keep(slot, names.first(std::min(names.size(), static_cast<size_t>(kv_.length(slot)))));
}

void Generator::stop(int32_t slot) noexcept {
    std::erase(order_, slot);
    kv_.truncate(slot, 0);
    at(slot) = Sequence{};
}

void Generator::plan_rows(int64_t max_rows) {
    parts_.clear();
    int64_t left = max_rows;
    for (const bool generating : {true, false}) {
        for (const int32_t slot : order_) {
            const Sequence& sequence = sequences_[static_cast<size_t>(slot)];
            if (sequence.generating != generating) continue;
            const int64_t unread = std::ssize(sequence.source) - static_cast<int64_t>(sequence.fed);
            const int64_t n = generating ? 1 : std::min(left, unread);
            if (n <= 0) continue;
            parts_.push_back({slot, static_cast<int32_t>(n), 0});
            left -= n;
        }
    }
}

void Generator::advance() {
    for (const auto& [slot, n, scores_end] : parts_) {
        Sequence& sequence = at(slot);
        kv_.advance(slot, n);
        sequence.fed += static_cast<size_t>(n);
        if (!sequence.generating) counts_.prompt_rows += n;
    }
    for (const auto& [slot, n] : chunk_rows_) at(slot).chunk_rows_fed += n;
}

std::exception_ptr Generator::try_feed() noexcept {
    try {
        feed();
        advance();
        return nullptr;
    } catch (...) {
        // The device may have appended some of the rows, and raised some lengths: the next reserve() writes
        // the host's again.
        for (const Part& part : parts_) kv_.truncate(part.slot, kv_.length(part.slot));
        return std::current_exception();
    }
}

std::optional<int32_t> Generator::next_of(int32_t slot, size_t output) {
    const auto n_logits = static_cast<size_t>(n_logits_);
    Logits logits{std::span(logits_).subspan(output * n_logits, n_logits), {}};
    if (!drawn_.empty()) logits.drawn = drawn_[output];
    if (!ids_.empty()) logits.ids = std::span(ids_).subspan(output * n_logits, n_logits);
    return at(slot).next(logits, logits_ms_);
}

void Generator::hand_out() {
    size_t output = 0, score = 0;
    for (const auto& [slot, n, scores_end] : parts_) {
        Sequence& sequence = at(slot);
        const bool all_read = sequence.fed == sequence.source.size(), is_first = !sequence.generating;
        const bool has_output = all_read && sequence.generates;
        Ended end{slot, false, nullptr};
        bool goes_on = !all_read;
        try {
            for (size_t i = score; i < scores_end; ++i)
                sequence.scored(sequence.scores[sequence.n_scored++], std::move(scored_[i]));
            if (all_read) {
                sequence.chunk_rows = Buffer{};
                sequence.generating = true;
                if (is_first) keep_prefix(slot);
                std::optional<int32_t> id;
                if (has_output) id = next_of(slot, output);
                end.context_full = id && kv_.length(slot) >= sequence.n_entries;
                goes_on = id && !end.context_full;
                if (goes_on) {
                    sequence.source.assign(1, *id);
                    sequence.fed = 0;
                    if (!sequence.names.empty()) sequence.names.push_back(token_row_name(*id));
                } else if (!is_first) {
                    keep_prefix(slot);
                }
            }
        } catch (...) {
            goes_on = false;
            end.error = std::current_exception();
        }
        score = scores_end;
        output += has_output ? 1 : 0;
        if (goes_on) continue;
        stop(slot);
        ended_.push_back(end);
    }
}

const std::vector<Generator::Ended>& Generator::step(int64_t max_rows) {
    ended_.clear();
    plan_rows(max_rows);
    if (parts_.empty()) return ended_;
    ended_.reserve(parts_.size());  // nothing below may fail for want of memory
    redone_.reserve(parts_.size());
    ++counts_.steps;
    std::exception_ptr error = try_feed();
    if (!error) {
        hand_out();
        return ended_;
    }
    redone_.assign(parts_.begin(), parts_.end());
    const bool redo = redone_.size() > 1;
    counts_.steps_redone += redo ? 1 : 0;
    for (const Part& part : redone_) {
        parts_.assign(1, part);
        if (redo) error = try_feed();
        if (!error) {
            hand_out();
        } else {
            stop(part.slot);
            ended_.push_back({part.slot, false, error});
        }
    }
    return ended_;
}

}  // namespace refrag
