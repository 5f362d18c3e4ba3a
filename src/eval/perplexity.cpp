// See perplexity.h.
#include "eval/perplexity.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "eval/statistics.h"
#include "refrag/engine.h"
#include "refrag/prompt_work.h"

namespace refrag {
namespace {

constexpr std::array<std::pair<const char*, EvalMode>, 4> kModes = {{{"none", EvalMode::none},
                                                                     {"full", EvalMode::full},
                                                                     {"last", EvalMode::last},
                                                                     {"refrag", EvalMode::refrag}}};

struct PlannedRow {
    PerplexityRow row;
    // What selects; where mode `last` depends on a choice, the first policy of the list that has its p.
    SelectPolicy policy = SelectPolicy::all;
    Unexpanded unexpanded = Unexpanded::compress;
};

// The evaluation of one context length's rows: how a window's context becomes decoder rows.
class WindowScorer {
  public:
    WindowScorer(const Model& model, std::string_view text, std::span<const Token> tokens,
                 const PerplexityOptions& options, int64_t context, PassageCache& cache)
        : model_(model),
          text_(text),
          tokens_(tokens),
          options_(options),
          context_(context),
          cache_(cache),
          engine_(model, {.n_slots = 1,
                          .max_context = std::min<int64_t>(model.decoder().config().max_seq_len,
                                                           1 + context + options.output),
                          .prefix_cache = false}) {}

    // Decoder positions of a window's context in a row.
    int64_t context_positions(const PlannedRow& planned) const {
        const PerplexityRow& row = planned.row;
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
        const int64_t rest = planned.unexpanded == Unexpanded::compress ? n_chunks - expanded : 0;
        return std::min(context_, rest + expanded * k);
    }

    // Mean negative log-likelihood of the ids of the span that begins at `begin`.
    double score(const PlannedRow& planned, int64_t window, int64_t begin) {
        const PerplexityRow& row = planned.row;
        std::span<const Token> context =
            tokens_.subspan(static_cast<size_t>(begin - context_), static_cast<size_t>(context_));
        const std::span<const Token> output =
            tokens_.subspan(static_cast<size_t>(begin), static_cast<size_t>(options_.output));
        std::vector<Segment> segments{TokenSegment{{model_.first_id()}}};
        if (row.mode == EvalMode::refrag) {
            segments.emplace_back(compressed(row, context));
        } else if (row.mode != EvalMode::none) {
            if (row.mode == EvalMode::last)
                context = context.last(static_cast<size_t>(refrag_positions(planned, window, context)));
            segments.emplace_back(TokenSegment{ids_of(context)});
        }
        segments.emplace_back(TokenSegment{ids_of(output), /*score=*/true});
        Request request;
        request.segments = std::move(segments);
        request.options = answer_options(planned, window);
        engine_.submit(std::move(request));
        while (!engine_.idle()) engine_.step();
        const Result result = std::move(engine_.take_finished().at(0));
        if (result.error) throw Error(result.error->status(), result.error->message());
        double sum = 0.0;
        for (const PromptScore& score : result.answer.scores) sum -= score.logprobs->chosen.logprob;
        return sum / static_cast<double>(result.answer.scores.size());
    }

  private:
    static std::vector<int32_t> ids_of(std::span<const Token> tokens) {
        std::vector<int32_t> ids;
        ids.reserve(tokens.size());
        for (const Token& token : tokens) ids.push_back(token.id);
        return ids;
    }

    PassageSegment compressed(const PerplexityRow& row, std::span<const Token> context) {
        return {
            cache_.share(model_, std::make_shared<const CutPassage>(model_, text_, context, *row.chunk_len)),
            {}};
    }

    AnswerOptions answer_options(const PlannedRow& planned, int64_t window) const {
        AnswerOptions options;
        options.max_new_tokens = 0;
        options.policy = planned.policy;
        options.unexpanded = planned.unexpanded;
        options.chunk_len = planned.row.chunk_len.value_or(0);
        options.expand_fraction = planned.row.expand_fraction;
        options.sampler.seed = options_.seed + static_cast<uint64_t>(window);
        return options;
    }

    // How many context positions `refrag` takes in this row and window.
    int64_t refrag_positions(const PlannedRow& planned, int64_t window, std::span<const Token> context) {
        if (context_ % *planned.row.chunk_len == 0) return context_positions(planned);
        if (!backend_) backend_ = model_.device().make_backend();
        Arena arena(*backend_);
        Answer report;
        make_prompt(*backend_, model_, {compressed(planned.row, context)}, answer_options(planned, window),
                    model_.decoder().config().max_seq_len, arena, report);
        return static_cast<int64_t>(report.positions);
    }

    const Model& model_;
    std::string_view text_;
    std::span<const Token> tokens_;
    const PerplexityOptions& options_;
    int64_t context_;
    PassageCache& cache_;
    Engine engine_;
    std::unique_ptr<Backend> backend_;  // for prompts that are only measured
};

// Where the target spans begin: as many as there are or as are asked for, spread evenly over what has the
// longest context before it. The same spans for every context length.
std::vector<int64_t> target_spans(int64_t n_tokens, const PerplexityOptions& options) {
    const int64_t longest = *std::max_element(options.contexts.begin(), options.contexts.end());
    REFRAG_CHECK(n_tokens >= longest + options.output, Status::usage, "the text has ", n_tokens,
                 " ids, expected at least ", longest + options.output, " (context + output)");
    const int64_t room = n_tokens - longest;
    int64_t n = room / options.output;
    if (options.limit > 0) n = std::min(n, options.limit);
    std::vector<int64_t> begins;
    for (int64_t i = 0; i < n; ++i) begins.push_back(longest + i * room / n);
    return begins;
}

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
            for (const Selection& selection :
                 plan_selections(options.expand_fractions, options.policies, options.unexpanded)) {
                const bool is_new = std::find(fractions.begin(), fractions.end(),
                                              selection.expand_fraction) == fractions.end();
                fractions.push_back(selection.expand_fraction);
                if (mode == EvalMode::last && !is_new) continue;
                planned.row.chunk_len = k;
                planned.row.expand_fraction = selection.expand_fraction;
                planned.policy = selection.policy;
                planned.unexpanded = selection.unexpanded;
                if (mode == EvalMode::refrag) {
                    planned.row.policy = selection.policy;
                    planned.row.unexpanded = selection.unexpanded;
                }
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
                other.expand_fraction != row.expand_fraction || other.unexpanded != row.unexpanded ||
                scores[base].empty())
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
    // Refuses what makes no sense in them.
    plan_selections(options.expand_fractions, options.policies, options.unexpanded);
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
    const std::vector<int64_t> spans = target_spans(std::ssize(tokens), options);
    int64_t total = 0;
    for (const int64_t context : options.contexts)
        total += std::ssize(plan_rows(model, options, context)) * std::ssize(spans);
    PassageCache cache;

    std::vector<PerplexityRow> result;
    int64_t done = 0;
    for (const int64_t context : options.contexts) {
        std::vector<PlannedRow> rows = plan_rows(model, options, context);
        std::vector<std::vector<double>> scores(rows.size());
        WindowScorer scorer(model, text, tokens, options, context, cache);
        for (size_t r = 0; r < rows.size(); ++r) {
            PerplexityRow& row = rows[r].row;
            row.n = std::ssize(spans);
            // The first token, the context and all targets but the last.
            const bool fits = 1 + scorer.context_positions(rows[r]) + options.output - 1 <=
                              model.decoder().config().max_seq_len;
            for (int64_t w = 0; fits && w < row.n; ++w) {
                scores[r].push_back(scorer.score(rows[r], w, spans[static_cast<size_t>(w)]));
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
