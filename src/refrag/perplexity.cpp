// See perplexity.h.
#include "refrag/perplexity.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <utility>

#include "refrag/assemble.h"
#include "refrag/scoring.h"

namespace refrag {
namespace {

constexpr std::array<std::pair<const char*, EvalMode>, 4> kModes = {{{"none", EvalMode::none},
                                                                     {"full", EvalMode::full},
                                                                     {"last", EvalMode::last},
                                                                     {"refrag", EvalMode::refrag}}};

// One row's evaluation: how a window's context becomes decoder rows.
class WindowScorer {
  public:
    WindowScorer(const Model& model, std::string_view text, std::span<const Token> tokens,
                 const PerplexityOptions& options)
        : model_(model),
          text_(text),
          tokens_(tokens),
          options_(options),
          kv_(model.decoder().make_kv_cache(1, std::min<int64_t>(model.decoder().config().max_seq_len,
                                                                 1 + options.context + options.output))),
          arena_(model.backend()) {}

    // Decoder positions of a window's context in a row.
    int64_t context_positions(const PerplexityRow& row) const {
        switch (row.mode) {
            case EvalMode::none:
                return 0;
            case EvalMode::full:
                return options_.context;
            case EvalMode::last:
            case EvalMode::refrag:
                break;
        }
        // Which chunks are expanded matters only if the last one is shorter and chosen; this is the most.
        const int64_t k = *row.chunk_len;
        const int64_t n_chunks = (options_.context + k - 1) / k;
        const int64_t expanded = n_expand(*row.expand_fraction, n_chunks);
        return std::min(options_.context, n_chunks - expanded + expanded * k);
    }

    // Mean negative log-likelihood of the window's target ids.
    double score(const PerplexityRow& row, int64_t window) {
        const ArenaScope scratch(arena_);
        const int64_t begin = window * (options_.context + options_.output);
        const std::span<const Token> context =
            tokens_.subspan(static_cast<size_t>(begin), static_cast<size_t>(options_.context));
        const std::span<const Token> output = tokens_.subspan(static_cast<size_t>(begin + options_.context),
                                                              static_cast<size_t>(options_.output));
        DecoderInput input;
        input.add_token(model_.first_id());
        Tensor slots;
        if (row.mode == EvalMode::full) {
            for (const Token& token : context) input.add_token(token.id);
        } else if (row.mode == EvalMode::refrag) {
            slots = add_mixed(row, window, context, input);
        } else if (row.mode == EvalMode::last) {
            const auto keep = static_cast<size_t>(refrag_positions(row, window, context));
            for (const Token& token : context.last(keep)) input.add_token(token.id);
        }
        std::vector<int32_t> targets;
        for (const Token& token : output) targets.push_back(token.id);
        // The last target is predicted, never read.
        input.add_tokens(std::span(targets).first(targets.size() - 1));
        kv_.truncate(0, 0);
        const Tensor hidden = prefill(model_.decoder(), input.source, slots, kv_, 0, options_.output, arena_);
        double sum = 0.0;
        for (const float nll : target_nll(model_.decoder(), hidden, targets, arena_))
            sum += static_cast<double>(nll);
        return sum / static_cast<double>(targets.size());
    }

  private:
    std::vector<Chunk> chunks_of(std::span<const Token> context, int32_t chunk_len) const {
        return cut_chunks(text_, context, chunk_len, model_.encoder_vocabulary());
    }

    Tensor encode(std::span<const std::vector<int32_t>> sequences) {
        const Tensor emb = arena_.tensor(std::ssize(sequences), model_.d_enc());
        model_.encoder().encode(sequences, emb, arena_);
        return emb;
    }

    std::vector<bool> choose(const PerplexityRow& row, int64_t window, const std::vector<Chunk>& chunks,
                             Tensor chunk_emb) {
        const int64_t n_chunks = std::ssize(chunks);
        const int64_t wanted = n_expand(*row.expand_fraction, n_chunks);
        std::vector<float> scores;
        if (wanted == 0 || wanted == n_chunks || options_.policy == SelectPolicy::random) {
            // The choice needs no scores.
        } else if (options_.policy == SelectPolicy::model) {
            scores = model_.policy().logits(chunk_emb, Tensor{}, arena_);
        } else {
            std::vector<std::vector<int32_t>> ids;
            ids.reserve(chunks.size());
            for (const Chunk& chunk : chunks) ids.push_back(chunk.ids);
            scores = mean_nll_alone(model_, ids, arena_);
        }
        return select_chunks(options_.policy, scores, n_chunks, wanted,
                             options_.seed + static_cast<uint64_t>(window));
    }

    // Appends the context as slots and expanded chunks; returns the projected slots.
    Tensor add_mixed(const PerplexityRow& row, int64_t window, std::span<const Token> context,
                     DecoderInput& input) {
        const std::vector<Chunk> chunks = chunks_of(context, *row.chunk_len);
        std::vector<std::vector<int32_t>> sequences;
        sequences.reserve(chunks.size());
        for (const Chunk& chunk : chunks) sequences.push_back(chunk.encoder_ids);
        const Tensor chunk_emb = encode(sequences);
        const std::vector<bool> expanded = choose(row, window, chunks, chunk_emb);
        for (size_t i = 0; i < chunks.size(); ++i) input.add_chunk(chunks[i], expanded[i]);
        const Tensor slots = arena_.tensor(std::ssize(input.slot_chunk), model_.decoder().config().dim);
        const Tensor compressed = arena_.tensor(slots.rows, model_.d_enc());
        model_.backend().gather_rows(compressed, chunk_emb,
                                     upload_vector(model_.backend(), arena_, input.slot_chunk));
        model_.projector().forward(slots, compressed, arena_);
        return slots;
    }

    // How many context positions `refrag` takes in this row and window.
    int64_t refrag_positions(const PerplexityRow& row, int64_t window, std::span<const Token> context) {
        if (options_.context % *row.chunk_len == 0) return context_positions(row);
        DecoderInput input;
        add_mixed(row, window, context, input);
        return std::ssize(input.source);
    }

    const Model& model_;
    std::string_view text_;
    std::span<const Token> tokens_;
    const PerplexityOptions& options_;
    KvCache kv_;
    Arena arena_;
};

std::vector<PerplexityRow> plan_rows(const Model& model, const PerplexityOptions& options) {
    std::vector<int32_t> chunk_lens = options.chunk_lens;
    if (chunk_lens.empty()) chunk_lens.push_back(model.config().chunk_len);
    std::vector<double> fractions = options.expand_fractions;
    if (options.policy == SelectPolicy::none) fractions = {0.0};
    if (options.policy == SelectPolicy::all) fractions = {1.0};
    std::vector<PerplexityRow> rows;
    for (const EvalMode mode : options.modes) {
        PerplexityRow row;
        row.mode = mode;
        if (mode == EvalMode::none || mode == EvalMode::full) {
            rows.push_back(row);
            continue;
        }
        for (const int32_t k : chunk_lens) {
            for (const double p : fractions) {
                REFRAG_CHECK(k >= 1, Status::usage, "chunk length: expected at least 1, found ", k);
                n_expand(p, 1);  // refuses a p outside 0..1
                row.chunk_len = k;
                row.expand_fraction = p;
                if (mode == EvalMode::refrag) row.policy = options.policy;
                rows.push_back(row);
            }
        }
    }
    return rows;
}

// Mean over windows, which all have the same number of targets, and the standard error of that mean.
void summarize(const std::vector<double>& scores, PerplexityRow& row) {
    const auto n = static_cast<double>(scores.size());
    double mean = 0.0;
    for (const double s : scores) mean += s / n;
    double squares = 0.0;
    for (const double s : scores) squares += (s - mean) * (s - mean);
    row.log_perplexity = mean;
    if (scores.size() > 1) row.standard_error = std::sqrt(squares / (n - 1.0) / n);
}

std::optional<double> value_of(const std::vector<PerplexityRow>& rows, EvalMode mode) {
    for (const PerplexityRow& row : rows) {
        if (row.mode == mode) return row.log_perplexity;
    }
    return std::nullopt;
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

std::vector<PerplexityRow> evaluate_perplexity(const Model& model, std::string_view text,
                                               const PerplexityOptions& options,
                                               const EvalProgress& progress) {
    REFRAG_CHECK(options.context >= 1 && options.output >= 1, Status::usage,
                 "context and output: expected at least 1 id each, found ", options.context, " and ",
                 options.output);
    REFRAG_CHECK(!options.modes.empty(), Status::usage, "modes: expected at least one");
    std::vector<PerplexityRow> rows = plan_rows(model, options);
    const std::vector<Token> tokens = model.tokenizer().encode(text);
    const int64_t window_ids = options.context + options.output;
    int64_t n_windows = std::ssize(tokens) / window_ids;
    REFRAG_CHECK(n_windows >= 1, Status::usage, "the text has ", tokens.size(), " ids, expected at least ",
                 window_ids, " (context + output)");
    if (options.limit > 0) n_windows = std::min(n_windows, options.limit);

    WindowScorer scorer(model, text, tokens, options);
    const int64_t total = std::ssize(rows) * n_windows;
    int64_t done = 0;
    for (PerplexityRow& row : rows) {
        row.n = n_windows;
        // The first token, the context and all targets but the last.
        const bool fits =
            1 + scorer.context_positions(row) + options.output - 1 <= model.decoder().config().max_seq_len;
        std::vector<double> scores;
        for (int64_t w = 0; fits && w < n_windows; ++w) {
            scores.push_back(scorer.score(row, w));
            if (progress) progress(done + w + 1, total);
        }
        done += n_windows;
        if (fits) summarize(scores, row);
    }
    const std::optional<double> none = value_of(rows, EvalMode::none);
    const std::optional<double> full = value_of(rows, EvalMode::full);
    for (PerplexityRow& row : rows) {
        if (none && full && *none != *full && row.log_perplexity) {
            row.share_recovered = (*none - *row.log_perplexity) / (*none - *full);
        }
    }
    return rows;
}

}  // namespace refrag
