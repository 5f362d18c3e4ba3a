// `eval perplexity`: log-perplexity of unseen text given none, all, the last, or the compressed context
// before it (the paper's Table 1), and what ways to select make of it (Figure 3). A text is tokenised whole.
// Spans of target ids are spread evenly over it, the same for every context length; a window is a span and
// the ids before it. A first token (Model::first_id) precedes every window in every mode.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "refrag/model.h"
#include "refrag/select.h"

namespace refrag {

enum class EvalMode {
    none,    // no context: the lower bound
    full,    // the context as tokens: the upper bound
    last,    // as many of the last context tokens as `refrag` has context positions in the same row
    refrag,  // the context as chunks of k, n_expand(p) of them expanded
};

// "none", "full", "last", "refrag"; Status::usage otherwise.
EvalMode parse_eval_mode(const std::string& name);
const char* eval_mode_name(EvalMode mode);

struct PerplexityOptions {
    std::vector<int64_t> contexts{512};  // S, ids
    int64_t output = 128;                // O, ids
    std::vector<EvalMode> modes;
    std::vector<int32_t> chunk_lens;                          // k; empty: the model's
    std::vector<double> expand_fractions{0.0};                // p; policies none and all overrule it
    std::vector<SelectPolicy> policies{SelectPolicy::model};  // rows by plan_selections; see no question here
    std::vector<Unexpanded> unexpanded{Unexpanded::compress};  // mode `last` counts positions by the first
    uint64_t seed = 0;  // of SelectPolicy::random: it, the window and the row's k and p make the choice
    int64_t limit = 0;  // spans at most; 0: all that fit one after another
};

// Status::usage naming the first option that makes no sense.
void check_perplexity_options(const PerplexityOptions& options);

struct PerplexityRow {
    EvalMode mode = EvalMode::none;
    int64_t context = 0;
    std::optional<int32_t> chunk_len;       // last and refrag
    std::optional<double> expand_fraction;  // last and refrag
    std::optional<SelectPolicy> policy;     // refrag
    std::optional<Unexpanded> unexpanded;   // refrag
    std::optional<double>
        log_perplexity;  // mean over all target ids, nats; none: beyond the decoder's window
    std::optional<double> standard_error;   // of that mean, over windows; none with fewer than two
    std::optional<double> share_recovered;  // (none - this) / (none - full) where both were measured
    int64_t n = 0;                          // windows
    // Of this row's log-perplexity to that of the first policy of the list at the same context, k, p and
    // unexpanded, window by window (the paper's Figure 3); none for that policy, and where either has no
    // figure.
    std::optional<double> difference;  // below 0: this row is the better one
    std::optional<double> ci95;        // half width of its 95% interval; none with fewer than two windows
};

// done, total: called after every window of every row.
using EvalProgress = std::function<void(int64_t done, int64_t total)>;
// Called for every window that is measured, counted from 0, row by row; what the row says of all windows is
// not known yet.
using WindowSink = std::function<void(const PerplexityRow& row, int64_t window, double log_perplexity)>;

// Rows come context by context. Of the windows, the figures of one context's rows are held at a time (8 bytes
// each). Status::usage for impossible options or a text shorter than one window (with both lengths).
std::vector<PerplexityRow> evaluate_perplexity(const Model& model, std::string_view text,
                                               const PerplexityOptions& options,
                                               const EvalProgress& progress = {},
                                               const WindowSink& sink = {});

}  // namespace refrag
