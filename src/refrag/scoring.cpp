// See scoring.h.
#include "refrag/scoring.h"

#include <algorithm>

namespace refrag {
namespace {

// Rows whose logits are held at once: 512 rows of 128,256 logits are 250 MB.
constexpr int64_t kLogitRows = 512;
// Rows of chunks read alone in one call.
constexpr int64_t kAloneRows = 2048;

}  // namespace

Tensor prefill(Backend& backend, const Llama& decoder, std::span<const int32_t> source, Tensor chunk_rows,
               KvCache& kv, int32_t slot, int64_t n_last, Arena& arena) {
    const int64_t rows = std::ssize(source);
    REFRAG_DCHECK(n_last > 0 && n_last <= rows);
    const Tensor result = arena.tensor(n_last, decoder.config().dim);
    for (int64_t begin = 0; begin < rows; begin += kPrefillRows) {
        const int64_t n = std::min(kPrefillRows, rows - begin);
        const ArenaScope scratch(arena);
        BatchPlan plan;
        plan.add_cached(slot, kv.length(slot), static_cast<int32_t>(n));
        kv.reserve(slot, static_cast<int32_t>(n));
        const std::vector<int32_t> piece(source.begin() + begin, source.begin() + begin + n);
        const Tensor hidden = decoder.forward(backend, plan, piece, chunk_rows, kv, arena);
        kv.advance(slot, static_cast<int32_t>(n));
        const int64_t first_kept = std::max(begin, rows - n_last);
        if (first_kept < begin + n) {
            const int64_t kept = begin + n - first_kept;
            backend.copy(result.row_slice(first_kept - (rows - n_last), kept),
                         hidden.row_slice(first_kept - begin, kept));
        }
    }
    return result;
}

std::vector<float> prompt_nll(Backend& backend, const Llama& decoder, std::span<const int32_t> source,
                              Tensor chunk_rows, std::span<const ScoredRow> scores, KvCache& kv, int32_t slot,
                              Arena& arena) {
    if (scores.empty()) return {};
    const ArenaScope scratch(arena);
    const int64_t n_last = std::ssize(source) - scores.front().row;
    const Tensor last = prefill(backend, decoder, source, chunk_rows, kv, slot, n_last, arena);
    std::vector<int32_t> targets;
    std::vector<int32_t> index;
    for (const ScoredRow& score : scores) {
        targets.push_back(score.target);
        index.push_back(static_cast<int32_t>(score.row - scores.front().row));
    }
    Tensor hidden = last;
    if (std::ssize(scores) != n_last) {
        hidden = arena.tensor(std::ssize(scores), last.cols);
        backend.gather_rows(hidden, last, upload_vector(backend, arena, index));
    }
    return target_nll(backend, decoder, hidden, targets, arena);
}

std::vector<float> target_nll(Backend& backend, const Llama& decoder, Tensor hidden,
                              std::span<const int32_t> targets, Arena& arena) {
    REFRAG_DCHECK(hidden.rows == std::ssize(targets));
    std::vector<float> result(targets.size());
    for (int64_t begin = 0; begin < hidden.rows; begin += kLogitRows) {
        const int64_t n = std::min(kLogitRows, hidden.rows - begin);
        const ArenaScope scratch(arena);
        const Tensor logits = decoder.logits(backend, hidden.row_slice(begin, n), arena);
        const Tensor nll = arena.tensor(1, n);
        const std::vector<int32_t> piece(targets.begin() + begin, targets.begin() + begin + n);
        backend.nll(nll, logits, upload_vector(backend, arena, piece));
        backend.download(result.data() + begin, nll.data, nll.bytes());
    }
    return result;
}

std::vector<float> mean_nll_alone(Backend& backend, const Model& model,
                                  std::span<const std::vector<int32_t>> sequences, Arena& arena) {
    const Llama& decoder = model.decoder();
    std::vector<float> result(sequences.size(), 0.0f);
    size_t longest = 1;
    for (const std::vector<int32_t>& ids : sequences) longest = std::max(longest, ids.size());
    const size_t group = std::max<size_t>(1, static_cast<size_t>(kAloneRows) / longest);
    const size_t n_slots = std::min(group, std::max<size_t>(1, sequences.size()));
    KvCache kv = decoder.make_kv_cache(backend, static_cast<int32_t>(n_slots), static_cast<int64_t>(longest));
    for (size_t begin = 0; begin < sequences.size(); begin += n_slots) {
        const size_t end = std::min(sequences.size(), begin + n_slots);
        const ArenaScope scratch(arena);
        BatchPlan plan;
        std::vector<int32_t> source;   // first_id, then all ids of a sequence but its last
        std::vector<int32_t> targets;  // its ids
        for (size_t i = begin; i < end; ++i) {
            const auto slot = static_cast<int32_t>(i - begin);
            const std::vector<int32_t>& ids = sequences[i];
            kv.truncate(slot, 0);
            kv.reserve(slot, static_cast<int32_t>(ids.size()));
            plan.add_cached(slot, 0, static_cast<int32_t>(ids.size()));
            if (ids.empty()) continue;
            source.push_back(model.first_id());
            source.insert(source.end(), ids.begin(), ids.end() - 1);
            targets.insert(targets.end(), ids.begin(), ids.end());
        }
        const Tensor hidden = decoder.forward(backend, plan, source, Tensor{}, kv, arena);
        const std::vector<float> nll = target_nll(backend, decoder, hidden, targets, arena);
        size_t at = 0;
        for (size_t i = begin; i < end; ++i) {
            kv.advance(static_cast<int32_t>(i - begin), static_cast<int32_t>(sequences[i].size()));
            double sum = 0.0;
            for (size_t j = 0; j < sequences[i].size(); ++j) sum += static_cast<double>(nll[at++]);
            if (!sequences[i].empty())
                result[i] = static_cast<float>(sum / static_cast<double>(sequences[i].size()));
        }
    }
    return result;
}

}  // namespace refrag
