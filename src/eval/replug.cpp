// See replug.h.
#include "eval/replug.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "refrag/scoring.h"

namespace refrag {

int32_t replug_token(std::span<const float> logits, int64_t n_sequences) {
    REFRAG_DCHECK(n_sequences >= 1 && std::ssize(logits) % n_sequences == 0);
    const size_t vocab = logits.size() / static_cast<size_t>(n_sequences);
    std::vector<double> sum(vocab, 0.0);  // of probabilities
    std::vector<double> weight(vocab);
    for (size_t begin = 0; begin < logits.size(); begin += vocab) {
        const std::span<const float> row = logits.subspan(begin, vocab);
        const auto largest = static_cast<double>(*std::max_element(row.begin(), row.end()));
        double total = 0.0;
        for (size_t i = 0; i < vocab; ++i) {
            weight[i] = std::exp(static_cast<double>(row[i]) - largest);
            total += weight[i];
        }
        for (size_t i = 0; i < vocab; ++i) sum[i] += weight[i] / total;
    }
    return static_cast<int32_t>(std::max_element(sum.begin(), sum.end()) - sum.begin());
}

std::vector<int32_t> replug(Backend& backend, const Model& model,
                            std::span<const std::vector<int32_t>> prompts, int64_t max_new_tokens,
                            Arena& arena) {
    const Llama& decoder = model.decoder();
    REFRAG_CHECK(!prompts.empty(), Status::usage, "replug: expected at least one passage");
    int64_t longest = 0;
    for (const std::vector<int32_t>& prompt : prompts) longest = std::max(longest, std::ssize(prompt));
    REFRAG_CHECK(longest + max_new_tokens <= decoder.config().max_seq_len, Status::runtime,
                 "replug: the longest prompt takes ", longest, " positions and its answer up to ",
                 max_new_tokens, ", the decoder's window has ", decoder.config().max_seq_len);
    const auto n = static_cast<int32_t>(prompts.size());
    const ArenaScope scratch(arena);
    KvCache kv = decoder.make_kv_cache(backend, n, longest + max_new_tokens);
    // The last hidden state of every sequence.
    const Tensor last = arena.tensor(n, decoder.config().dim);
    for (int32_t slot = 0; slot < n; ++slot) {
        const ArenaScope pass(arena);
        backend.copy(last.row_slice(slot, 1), prefill(backend, decoder, prompts[static_cast<size_t>(slot)],
                                                      Tensor{}, kv, slot, 1, arena));
    }

    std::vector<int32_t> ids;
    std::vector<float> logits(static_cast<size_t>(n) * static_cast<size_t>(decoder.config().vocab_size));
    BatchPlan plan;
    while (true) {
        {
            const ArenaScope pass(arena);
            const Tensor all = decoder.logits(backend, last, arena);
            backend.download(logits.data(), all.data, all.bytes());
        }
        const int32_t id = replug_token(logits, n);
        if (model.is_end(id)) return ids;
        ids.push_back(id);
        if (std::ssize(ids) == max_new_tokens) return ids;
        const ArenaScope pass(arena);
        plan.clear();
        for (int32_t slot = 0; slot < n; ++slot) {
            kv.reserve(slot, 1);
            plan.add_cached(slot, kv.length(slot), 1);
        }
        const std::vector<int32_t> source(prompts.size(), id);
        backend.copy(last, decoder.forward(backend, plan, source, Tensor{}, kv, arena));
        for (int32_t slot = 0; slot < n; ++slot) kv.advance(slot, 1);
    }
}

}  // namespace refrag
