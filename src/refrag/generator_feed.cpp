// See generator.h. One pass of the decoder over the rows of a step, and what is read of it. Nothing here
// changes a sequence: a pass that fails leaves all as it was.
#include <algorithm>

#include "refrag/generator.h"
#include "refrag/scoring.h"
#include "refrag/timer.h"

namespace refrag {

void Generator::list_rows() {
    plan_.clear();
    source_.clear();
    chunk_rows_.clear();
    outputs_.clear();
    last_rows_.clear();
    int32_t n_chunk_rows = 0;
    for (const Part& part : parts_) {
        const auto& [slot, n, scores_end] = part;
        const Sequence& sequence = at(slot);
        // Promised when it began: what is missing is held by kept prefixes alone.
        prefixes_.make_room(KvCache::blocks_for(kv_.length(slot) + n) -
                            KvCache::blocks_for(kv_.length(slot)));
        kv_.reserve(slot, n);
        plan_.add_cached(slot, kv_.length(slot), n);
        int32_t named = 0;
        for (size_t i = sequence.fed; i < sequence.fed + static_cast<size_t>(n); ++i) {
            const int32_t row = sequence.source[i];
            REFRAG_DCHECK(row >= 0 || -1 - row == sequence.chunk_rows_fed + named);
            source_.push_back(row >= 0 ? row : -1 - (n_chunk_rows + named++));
        }
        if (named > 0) chunk_rows_.push_back({slot, named});
        n_chunk_rows += named;
        if (sequence.generates && sequence.fed + static_cast<size_t>(n) == sequence.source.size()) {
            outputs_.push_back(slot);
            last_rows_.push_back(plan_.n_rows() - 1);
        }
    }
}

void Generator::score(Tensor hidden) {
    for (size_t p = 0; p < parts_.size(); ++p) {
        Part& part = parts_[p];
        const Sequence& sequence = at(part.slot);
        const auto first = static_cast<int64_t>(sequence.fed);
        std::vector<int32_t> rows, targets;
        for (size_t i = sequence.n_scored; i < sequence.scores.size(); ++i) {
            const auto& [row, target] = sequence.scores[i];
            if (row >= first + part.n) break;
            rows.push_back(plan_.row_begin(static_cast<int32_t>(p)) + static_cast<int32_t>(row - first));
            targets.push_back(target);
        }
        if (!rows.empty()) {
            const ArenaScope scratch(arena_);
            const Tensor wanted = arena_.tensor(std::ssize(rows), hidden.cols);
            backend_.gather_rows(wanted, hidden, upload_vector(backend_, arena_, rows));
            for (TokenLogprobs& logprobs :
                 row_logprobs(backend_, decoder_, wanted, targets, sequence.n_top, arena_))
                scored_.push_back(std::move(logprobs));
        }
        part.scores_end = scored_.size();
    }
}

Tensor Generator::feed_decoder(double& logits_began_ms) {
    list_rows();
    // Nothing but generating: what is fed, and whose logits are wanted, is a token of each.
    const bool decodes =
        std::all_of(parts_.begin(), parts_.end(), [&](const Part& part) { return at(part.slot).generating; });
    if (decodes) {
        const Tensor logits = decoder_.decode(backend_, decode_workspace_, plan_, source_, kv_);
        logits_began_ms = now_ms();
        return logits;
    }

    const int64_t dim = decoder_.config().dim;
    int64_t n_chunk_rows = 0;
    for (const auto& [slot, n] : chunk_rows_) n_chunk_rows += n;
    const Tensor chunk_rows = arena_.tensor(n_chunk_rows, dim);
    int64_t begin = 0;
    for (const auto& [slot, n] : chunk_rows_) {
        const Sequence& sequence = at(slot);
        const Tensor from{sequence.chunk_rows.data(), DType::f32, sequence.chunk_rows_fed + n, dim};
        backend_.copy(chunk_rows.row_slice(begin, n), from.row_slice(sequence.chunk_rows_fed, n));
        begin += n;
    }
    const Tensor hidden = decoder_.forward(backend_, plan_, source_, chunk_rows, kv_, arena_);
    score(hidden);
    if (outputs_.empty()) return {};
    logits_began_ms = now_ms();
    const Tensor last = arena_.tensor(std::ssize(outputs_), dim);
    backend_.gather_rows(last, hidden, upload_vector(backend_, arena_, last_rows_));
    return decoder_.logits(backend_, last, arena_);
}

void Generator::feed() {
    const ArenaScope scratch(arena_);
    scored_.clear();
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

}  // namespace refrag
