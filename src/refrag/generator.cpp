// See generator.h.
#include "refrag/generator.h"

#include <algorithm>

#include "refrag/scoring.h"
#include "refrag/timer.h"

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

uint64_t Generator::block_bytes(const LlamaConfig& config, DType kv) {
    const uint64_t page_bytes = 2 * kPageEntries * static_cast<uint64_t>(config.head_dim) * dtype_bytes(kv);
    return page_bytes * static_cast<uint64_t>(config.n_layers) * static_cast<uint64_t>(config.n_kv_heads);
}

uint64_t Generator::cache_bytes(const LlamaConfig& config, DType kv, int32_t n_slots, int64_t max_context) {
    return static_cast<uint64_t>(n_slots) * static_cast<uint64_t>(KvCache::blocks_for(max_context)) *
           block_bytes(config, kv);
}

int64_t Generator::most_entries(int64_t n_rows, int64_t max_new) const {
    if (max_new < 0) return std::min(max_context(), pool_entries());
    return std::min(max_context(), n_rows + max_new);
}

bool Generator::can_hold(int64_t n_rows, int64_t max_new) const {
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
    if (!start.names.empty()) reused = prefixes_.restore(slot, start.names);
    if (n_blocks - KvCache::blocks_for(reused) > available_blocks()) {
        kv_.truncate(slot, 0);
        return std::nullopt;
    }
    // All memory first: what follows cannot fail.
    try {
        order_.reserve(order_.size() + 1);
        kv_.expect(slot, n_blocks * kPageEntries);
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
    order_.push_back(slot);
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

void Generator::keep_prefix(int32_t slot) {
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
            parts_.push_back({slot, static_cast<int32_t>(n)});
            left -= n;
        }
    }
}

Tensor Generator::feed_decoder(double& logits_began_ms) {
    plan_.clear();
    source_.clear();
    chunk_rows_.clear();
    outputs_.clear();
    last_rows_.clear();
    int64_t n_chunk_rows = 0;
    for (const auto& [slot, n] : parts_) {
        Sequence& sequence = at(slot);
        // Promised when it began: what is missing is held by kept prefixes alone.
        prefixes_.make_room(KvCache::blocks_for(kv_.length(slot) + n) -
                            KvCache::blocks_for(kv_.length(slot)));
        kv_.reserve(slot, n);
        plan_.add_cached(slot, kv_.length(slot), n);
        int64_t named = 0;
        for (size_t i = sequence.fed; i < sequence.fed + static_cast<size_t>(n); ++i) {
            const int32_t row = sequence.source[i];
            REFRAG_DCHECK(row >= 0 || -1 - row == sequence.chunk_rows_fed + named);
            source_.push_back(row >= 0 ? row : static_cast<int32_t>(-1 - (n_chunk_rows + named++)));
        }
        if (named > 0) chunk_rows_.push_back({slot, named});
        n_chunk_rows += named;
        if (sequence.fed + static_cast<size_t>(n) == sequence.source.size()) {
            outputs_.push_back(slot);
            last_rows_.push_back(plan_.n_rows() - 1);
        }
    }

    const auto fed = [&] {
        for (const auto& [slot, n] : parts_) {
            kv_.advance(slot, n);
            at(slot).fed += static_cast<size_t>(n);
        }
    };
    // Nothing but generating: what is fed, and whose logits are wanted, is a token of each.
    const bool decodes =
        std::all_of(parts_.begin(), parts_.end(), [&](const Part& part) { return at(part.slot).generating; });
    if (decodes) {
        const Tensor logits = decoder_.decode(backend_, decode_workspace_, plan_, source_, kv_);
        logits_began_ms = now_ms();
        fed();
        return logits;
    }

    const int64_t dim = decoder_.config().dim;
    const Tensor chunk_rows = arena_.tensor(n_chunk_rows, dim);
    int64_t begin = 0;
    for (const auto& [slot, n] : chunk_rows_) {
        Sequence& sequence = at(slot);
        const Tensor from{sequence.chunk_rows.data(), DType::f32, sequence.chunk_rows_fed + n, dim};
        backend_.copy(chunk_rows.row_slice(begin, n), from.row_slice(sequence.chunk_rows_fed, n));
        sequence.chunk_rows_fed += n;
        begin += n;
    }
    const Tensor hidden = decoder_.forward(backend_, plan_, source_, chunk_rows, kv_, arena_);
    fed();
    if (outputs_.empty()) return {};
    logits_began_ms = now_ms();
    const Tensor last = arena_.tensor(std::ssize(outputs_), dim);
    backend_.gather_rows(last, hidden, upload_vector(backend_, arena_, last_rows_));
    return decoder_.logits(backend_, last, arena_);
}

void Generator::feed() {
    const ArenaScope scratch(arena_);
    double started_ms = 0.0;
    const Tensor logits = feed_decoder(started_ms);
    if (outputs_.empty()) return;
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

const std::vector<Generator::Ended>& Generator::step(int64_t max_rows) {
    ended_.clear();
    plan_rows(max_rows);
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
        sequence.chunk_rows = Buffer{};
        const bool is_first = !sequence.generating;
        sequence.generating = true;
        Ended end{slot, false, nullptr};
        try {
            if (is_first) keep_prefix(slot);
            Logits logits{std::span(logits_).subspan(i * n_logits, n_logits), {}};
            if (!drawn_.empty()) logits.drawn = drawn_[i];
            if (!ids_.empty()) logits.ids = std::span(ids_).subspan(i * n_logits, n_logits);
            const std::optional<int32_t> id = sequence.next(logits, logits_ms_);
            end.context_full = id && kv_.length(slot) >= sequence.n_entries;
            if (id && !end.context_full) {
                sequence.source.assign(1, *id);
                sequence.fed = 0;
                if (!sequence.names.empty()) sequence.names.push_back(token_row_name(*id));
                continue;
            }
            keep_prefix(slot);
        } catch (...) {
            end.error = std::current_exception();
        }
        stop(slot);
        ended_.push_back(end);
    }
    return ended_;
}

}  // namespace refrag
