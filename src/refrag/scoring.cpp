// See scoring.h.
#include "refrag/scoring.h"

#include <algorithm>
#include <cmath>

namespace refrag {
namespace {

// Rows whose logits are held at once: 512, or what 64 MB hold (130 rows of 128,256 logits).
int64_t logit_rows(const Llama& decoder) {
    return std::clamp<int64_t>((int64_t{16} << 20) / decoder.config().vocab_size, 1, 512);
}
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

std::vector<TokenLogprobs> row_logprobs(Backend& backend, const Llama& decoder, Tensor hidden,
                                        std::span<const int32_t> targets, int32_t n_top, Arena& arena) {
    REFRAG_DCHECK(hidden.rows == std::ssize(targets) && n_top <= Backend::kMaxTopLogits);
    const int64_t n_ids = std::min<int64_t>(n_top, decoder.config().vocab_size);
    std::vector<TokenLogprobs> result(targets.size());
    std::vector<float> nll, nll_of_first, top;
    std::vector<int32_t> top_ids, first_ids;
    const auto nll_of = [&](Tensor logits, const std::vector<int32_t>& ids, std::vector<float>& out) {
        const Tensor values = arena.tensor(1, logits.rows);
        backend.nll(values, logits, upload_vector(backend, arena, ids));
        out.resize(ids.size());
        backend.download(out.data(), values.data, values.bytes());
    };
    const int64_t group = logit_rows(decoder);
    for (int64_t begin = 0; begin < hidden.rows; begin += group) {
        const int64_t n = std::min(group, hidden.rows - begin);
        const ArenaScope scratch(arena);
        const Tensor logits = decoder.logits(backend, hidden.row_slice(begin, n), arena);
        nll_of(logits, {targets.begin() + begin, targets.begin() + begin + n}, nll);
        if (n_ids > 0) {
            const Tensor values = arena.tensor(n, n_ids), ids = arena.tensor(n, n_ids, DType::i32);
            backend.top_logits(values, static_cast<int32_t*>(ids.data), logits);
            top.resize(static_cast<size_t>(values.size()));
            top_ids.resize(top.size());
            backend.download(top.data(), values.data, values.bytes());
            backend.download(top_ids.data(), ids.data, ids.bytes());
            // Of the others' log-probabilities the logits say only how far they are from the largest.
            first_ids.clear();
            for (int64_t i = 0; i < n; ++i) first_ids.push_back(top_ids[static_cast<size_t>(i * n_ids)]);
            nll_of(logits, first_ids, nll_of_first);
        }
        for (int64_t i = 0; i < n; ++i) {
            const auto row = static_cast<size_t>(begin + i);
            const auto target_nll = static_cast<double>(nll[static_cast<size_t>(i)]);
            REFRAG_CHECK(!std::isnan(target_nll), Status::runtime,
                         "the decoder's logits: expected numbers, found NaN");
            result[row].chosen = {targets[row], -target_nll};
            for (int64_t j = 0; j < n_ids; ++j) {
                const auto at = static_cast<size_t>(i * n_ids + j), first = static_cast<size_t>(i * n_ids);
                const double below = static_cast<double>(top[first]) - static_cast<double>(top[at]);
                const double first_nll = static_cast<double>(nll_of_first[static_cast<size_t>(i)]);
                const bool is_target = top_ids[at] == targets[row];
                result[row].top.push_back({top_ids[at], is_target ? -target_nll : -first_nll - below});
            }
        }
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
        const std::vector<TokenLogprobs> scores = row_logprobs(backend, decoder, hidden, targets, 0, arena);
        size_t at = 0;
        for (size_t i = begin; i < end; ++i) {
            kv.advance(static_cast<int32_t>(i - begin), static_cast<int32_t>(sequences[i].size()));
            double sum = 0.0;
            for (size_t j = 0; j < sequences[i].size(); ++j) sum -= scores[at++].chosen.logprob;
            if (!sequences[i].empty())
                result[i] = static_cast<float>(sum / static_cast<double>(sequences[i].size()));
        }
    }
    return result;
}

}  // namespace refrag
