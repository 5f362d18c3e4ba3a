// See perplexity.h.
#include "eval/perplexity.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "eval/statistics.h"
#include "refrag/assemble.h"
#include "refrag/scoring.h"

namespace refrag {
namespace {

constexpr std::array<std::pair<const char*, EvalMode>, 4> kModes = {{{"none", EvalMode::none},
                                                                     {"full", EvalMode::full},
                                                                     {"last", EvalMode::last},
                                                                     {"refrag", EvalMode::refrag}}};

struct PlannedRow {
    PerplexityRow row;
    // What selects; where mode `last` depends on a choice, the first policy of the list that has its p.
    SelectPolicy policy = SelectPolicy::model;
};

// The evaluation of one context length's rows: how a window's context becomes decoder rows.
class WindowScorer {
  public:
    WindowScorer(const Model& model, std::string_view text, std::span<const Token> tokens,
                 const PerplexityOptions& options, int64_t context)
        : model_(model),
          text_(text),
          tokens_(tokens),
          options_(options),
          context_(context),
          backend_(model.device().make_backend()),
          kv_(model.decoder().make_kv_cache(
              *backend_, 1,
              std::min<int64_t>(model.decoder().config().max_seq_len, 1 + context + options.output))),
          arena_(*backend_) {}

    // Decoder positions of a window's context in a row.
    int64_t context_positions(const PerplexityRow& row) const {
        switch (row.mode) {
            case EvalMode::none:
                return 0;
            case EvalMode::full:
                return context_;
            case EvalMode::last:
            case EvalMode::refrag:
                break;
        }
        // Which chunks are expanded matters only if the last one is shorter and chosen; this is the most.
        const int64_t k = *row.chunk_len;
        const int64_t n_chunks = (context_ + k - 1) / k;
        const int64_t expanded = n_expand(*row.expand_fraction, n_chunks);
        return std::min(context_, n_chunks - expanded + expanded * k);
    }

    // Mean negative log-likelihood of the window's target ids.
    double score(const PlannedRow& planned, int64_t window) {
        const PerplexityRow& row = planned.row;
        const ArenaScope scratch(arena_);
        const int64_t begin = window * (context_ + options_.output);
        const std::span<const Token> context =
            tokens_.subspan(static_cast<size_t>(begin), static_cast<size_t>(context_));
        const std::span<const Token> output =
            tokens_.subspan(static_cast<size_t>(begin + context_), static_cast<size_t>(options_.output));
        DecoderInput input;
        input.add_token(model_.first_id());
        Tensor slots;
        if (row.mode == EvalMode::full) {
            for (const Token& token : context) input.add_token(token.id);
        } else if (row.mode == EvalMode::refrag) {
            slots = add_mixed(planned, window, context, input);
        } else if (row.mode == EvalMode::last) {
            const auto keep = static_cast<size_t>(refrag_positions(planned, window, context));
            for (const Token& token : context.last(keep)) input.add_token(token.id);
        }
        std::vector<int32_t> targets;
        for (const Token& token : output) targets.push_back(token.id);
        // The last target is predicted, never read.
        input.add_tokens(std::span(targets).first(targets.size() - 1));
        kv_.truncate(0, 0);
        const Tensor hidden =
            prefill(*backend_, model_.decoder(), input.source, slots, kv_, 0, options_.output, arena_);
        double sum = 0.0;
        for (const float nll : target_nll(*backend_, model_.decoder(), hidden, targets, arena_))
            sum += static_cast<double>(nll);
        return sum / static_cast<double>(targets.size());
    }

  private:
    std::vector<Chunk> chunks_of(std::span<const Token> context, int32_t chunk_len) const {
        return cut_chunks(text_, context, chunk_len, model_.encoder_vocabulary());
    }

    Tensor encode(std::span<const std::vector<int32_t>> sequences) {
        const Tensor emb = arena_.tensor(std::ssize(sequences), model_.d_enc());
        model_.encoder().encode(*backend_, sequences, emb, arena_);
        return emb;
    }

    std::vector<bool> choose(const PlannedRow& planned, int64_t window, const std::vector<Chunk>& chunks,
                             Tensor chunk_emb) {
        const int64_t n_chunks = std::ssize(chunks);
        const int64_t wanted = n_expand(*planned.row.expand_fraction, n_chunks);
        std::vector<float> scores;
        if (wanted == 0 || wanted == n_chunks || planned.policy == SelectPolicy::random ||
            planned.policy == SelectPolicy::recent) {
            // The choice needs no scores.
        } else if (planned.policy == SelectPolicy::model) {
            scores = model_.policy().logits(*backend_, chunk_emb, Tensor{}, arena_);
        } else {
            std::vector<std::vector<int32_t>> ids;
            ids.reserve(chunks.size());
            for (const Chunk& chunk : chunks) ids.push_back(chunk.ids);
            scores = mean_nll_alone(*backend_, model_, ids, arena_);
        }
        return select_chunks(planned.policy, scores, n_chunks, wanted,
                             options_.seed + static_cast<uint64_t>(window));
    }

    // Appends the context as slots and expanded chunks; returns the projected slots.
    Tensor add_mixed(const PlannedRow& planned, int64_t window, std::span<const Token> context,
                     DecoderInput& input) {
        const std::vector<Chunk> chunks = chunks_of(context, *planned.row.chunk_len);
        std::vector<std::vector<int32_t>> sequences;
        sequences.reserve(chunks.size());
        for (const Chunk& chunk : chunks) sequences.push_back(chunk.encoder_ids);
        const Tensor chunk_emb = encode(sequences);
        const std::vector<bool> expanded = choose(planned, window, chunks, chunk_emb);
        for (size_t i = 0; i < chunks.size(); ++i) input.add_chunk(chunks[i], expanded[i]);
        const Tensor slots = arena_.tensor(std::ssize(input.slot_chunk), model_.decoder().config().dim);
        const Tensor compressed = arena_.tensor(slots.rows, model_.d_enc());
        backend_->gather_rows(compressed, chunk_emb, upload_vector(*backend_, arena_, input.slot_chunk));
        model_.projector().forward(*backend_, slots, compressed, arena_);
        return slots;
    }

    // How many context positions `refrag` takes in this row and window.
    int64_t refrag_positions(const PlannedRow& planned, int64_t window, std::span<const Token> context) {
        if (context_ % *planned.row.chunk_len == 0) return context_positions(planned.row);
        DecoderInput input;
        add_mixed(planned, window, context, input);
        return std::ssize(input.source);
    }

    const Model& model_;
    std::string_view text_;
    std::span<const Token> tokens_;
    const PerplexityOptions& options_;
    int64_t context_;
    std::unique_ptr<Backend> backend_;
    KvCache kv_;
    Arena arena_;
};

// One context length's rows.
std::vector<PlannedRow> plan_rows(const Model& model, const PerplexityOptions& options, int64_t context) {
    std::vector<int32_t> chunk_lens = options.chunk_lens;
    if (chunk_lens.empty()) chunk_lens.push_back(model.config().chunk_len);
    std::vector<PlannedRow> rows;
    for (const EvalMode mode : options.modes) {
        PlannedRow planned;
        planned.row.mode = mode;
        planned.row.context = context;
        if (mode == EvalMode::none || mode == EvalMode::full) {
            rows.push_back(planned);
            continue;
        }
        for (const int32_t k : chunk_lens) {
            std::vector<double> fractions;  // of this k, so far
            for (const Selection& selection : plan_selections(options.expand_fractions, options.policies)) {
                const bool is_new = std::find(fractions.begin(), fractions.end(),
                                              selection.expand_fraction) == fractions.end();
                fractions.push_back(selection.expand_fraction);
                if (mode == EvalMode::last && !is_new) continue;
                planned.row.chunk_len = k;
                planned.row.expand_fraction = selection.expand_fraction;
                planned.policy = selection.policy;
                if (mode == EvalMode::refrag) planned.row.policy = selection.policy;
                rows.push_back(planned);
            }
        }
    }
    return rows;
}

// What the windows of one context length say, scores[i] being those of rows[i], none where it does not fit.
// Windows all have the same number of targets, so their mean is that of all target ids.
void summarize(std::vector<PlannedRow>& rows, const std::vector<std::vector<double>>& scores,
               SelectPolicy first_policy) {
    std::optional<double> none;
    std::optional<double> full;
    for (size_t i = 0; i < rows.size(); ++i) {
        if (scores[i].empty()) continue;
        PerplexityRow& row = rows[i].row;
        const Mean mean = mean_of(scores[i]);
        row.log_perplexity = mean.value;
        row.standard_error = mean.standard_error;
        if (row.mode == EvalMode::none) none = mean.value;
        if (row.mode == EvalMode::full) full = mean.value;
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        PerplexityRow& row = rows[i].row;
        if (!row.log_perplexity) continue;
        if (none && full && *none != *full)
            row.share_recovered = (*none - *row.log_perplexity) / (*none - *full);
        if (row.mode != EvalMode::refrag || row.policy == first_policy) continue;
        for (size_t base = 0; base < rows.size(); ++base) {
            const PerplexityRow& other = rows[base].row;
            if (other.policy != first_policy || other.chunk_len != row.chunk_len ||
                other.expand_fraction != row.expand_fraction || scores[base].empty())
                continue;
            const PairedDifference paired = paired_difference(scores[i], scores[base]);
            row.difference = paired.mean;
            row.ci95 = paired.ci95;
            break;
        }
    }
}

}  // namespace

EvalMode parse_eval_mode(const std::string& name) {
    for (const auto& [word, mode] : kModes) {
        if (name == word) return mode;
    }
    fail(Status::usage, "mode: expected none, full, last or refrag; found \"", name, "\"");
}

const char* eval_mode_name(EvalMode mode) {
    for (const auto& [word, value] : kModes) {
        if (value == mode) return word;
    }
    return "?";
}

void check_perplexity_options(const PerplexityOptions& options) {
    const std::vector<int64_t>& contexts = options.contexts;
    REFRAG_CHECK(!contexts.empty(), Status::usage, "context: expected at least one");
    for (auto at = contexts.begin(); at != contexts.end(); ++at) {
        REFRAG_CHECK(*at >= 1 && options.output >= 1, Status::usage,
                     "context and output: expected at least 1 id each, found ", *at, " and ", options.output);
        REFRAG_CHECK(std::find(contexts.begin(), at, *at) == at, Status::usage,
                     "context: expected each once, found ", *at, " twice");
    }
    REFRAG_CHECK(!options.modes.empty(), Status::usage, "modes: expected at least one");
    for (const int32_t k : options.chunk_lens)
        REFRAG_CHECK(k >= 1, Status::usage, "chunk length: expected at least 1, found ", k);
    plan_selections(options.expand_fractions, options.policies);  // refuses what makes no sense in them
    for (const SelectPolicy policy : options.policies) {
        REFRAG_CHECK(policy != SelectPolicy::bm25, Status::usage,
                     "policy bm25: a window of text has no question whose words could choose; expected one "
                     "of the others here (eval qa has questions)");
    }
}

std::vector<PerplexityRow> evaluate_perplexity(const Model& model, std::string_view text,
                                               const PerplexityOptions& options, const EvalProgress& progress,
                                               const WindowSink& sink) {
    check_perplexity_options(options);
    const std::vector<Token> tokens = model.tokenizer().encode(text);
    const int64_t most_ids =
        *std::max_element(options.contexts.begin(), options.contexts.end()) + options.output;
    REFRAG_CHECK(std::ssize(tokens) >= most_ids, Status::usage, "the text has ", tokens.size(),
                 " ids, expected at least ", most_ids, " (context + output)");
    const auto windows_of = [&](int64_t context) {
        const int64_t n = std::ssize(tokens) / (context + options.output);
        return options.limit > 0 ? std::min(n, options.limit) : n;
    };
    int64_t total = 0;
    for (const int64_t context : options.contexts)
        total += std::ssize(plan_rows(model, options, context)) * windows_of(context);

    std::vector<PerplexityRow> result;
    int64_t done = 0;
    for (const int64_t context : options.contexts) {
        std::vector<PlannedRow> rows = plan_rows(model, options, context);
        std::vector<std::vector<double>> scores(rows.size());
        WindowScorer scorer(model, text, tokens, options, context);
        for (size_t r = 0; r < rows.size(); ++r) {
            PerplexityRow& row = rows[r].row;
            row.n = windows_of(context);
            // The first token, the context and all targets but the last.
            const bool fits = 1 + scorer.context_positions(row) + options.output - 1 <=
                              model.decoder().config().max_seq_len;
            for (int64_t w = 0; fits && w < row.n; ++w) {
                scores[r].push_back(scorer.score(rows[r], w));
                if (sink) sink(row, w, scores[r].back());
                if (progress) progress(done + w + 1, total);
            }
            done += row.n;
        }
        summarize(rows, scores, options.policies.front());
        for (const PlannedRow& planned : rows) result.push_back(planned.row);
    }
    return result;
}

}  // namespace refrag
