// See qa_rows.h.
#include "eval/qa_rows.h"

#include <optional>

#include "base/check.h"
#include "eval/statistics.h"

namespace refrag {
namespace {

// One row's figures, question by question.
struct Figures {
    std::vector<double> exact_match;
    std::vector<double> f1;
    std::vector<double> rouge_l;
};

// Those of some of a row's turns, one number after another; none where one was not asked.
std::optional<Figures> figures_of(std::span<const QaMeasured> turns) {
    Figures figures;
    for (const QaMeasured& turn : turns) {
        if (!turn.asked) return std::nullopt;
        for (const QaScore& score : turn.scores) {
            figures.exact_match.push_back(score.exact_match);
            figures.f1.push_back(score.f1);
            figures.rouge_l.push_back(score.rouge_l);
        }
    }
    if (figures.f1.empty()) return std::nullopt;
    return figures;
}

// The row that `row` is compared with, an index into `rows`; none where there is none.
std::optional<size_t> base_of(const QaRow& row, std::span<const QaRow> rows, SelectPolicy first_policy) {
    if (!row.policy || row.policy == first_policy) return std::nullopt;
    for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].policy == first_policy && rows[i].distractors == row.distractors &&
            rows[i].chunk_len == row.chunk_len && rows[i].expand_fraction == row.expand_fraction &&
            rows[i].unexpanded == row.unexpanded)
            return i;
    }
    return std::nullopt;
}

void compare(const Figures& figures, const Figures& base, QaRow& row) {
    const PairedDifference exact = paired_difference(figures.exact_match, base.exact_match);
    row.em_difference = exact.mean;
    row.em_ci95 = exact.ci95;
    const PairedDifference f1 = paired_difference(figures.f1, base.f1);
    row.f1_difference = f1.mean;
    row.f1_ci95 = f1.ci95;
}

}  // namespace

std::vector<QaRow> plan_qa_rows(const QaOptions& options, int32_t chunk_len) {
    std::vector<int32_t> chunk_lens = options.chunk_lens;
    if (chunk_lens.empty()) chunk_lens.push_back(chunk_len);
    std::vector<QaRow> rows;
    for (const QaMode mode : options.modes) {
        QaRow row;
        row.mode = mode;
        if (mode == QaMode::none) {
            rows.push_back(row);
            continue;
        }
        for (const int64_t distractors : options.distractors) {
            row.distractors = distractors;
            if (mode == QaMode::full || mode == QaMode::replug) {
                rows.push_back(row);
                continue;
            }
            for (const int32_t k : chunk_lens) {
                for (const Selection& selection :
                     plan_selections(options.expand_fractions, options.policies, options.unexpanded)) {
                    row.chunk_len = k;
                    row.expand_fraction = selection.expand_fraction;
                    row.policy = selection.policy;
                    row.unexpanded = selection.unexpanded;
                    rows.push_back(row);
                }
            }
        }
    }
    return rows;
}

std::vector<QaRow> sum_up(std::span<const QaRow> rows, std::span<const std::vector<QaMeasured>> measured,
                          SelectPolicy first_policy, bool has_turns) {
    REFRAG_DCHECK(rows.size() == measured.size());
    std::vector<QaRow> table;
    const auto add = [&](size_t r, std::optional<int64_t> turn) {
        // The same turns of any row.
        const auto turns = [&](size_t of) {
            const std::span<const QaMeasured> all = measured[of];
            return turn ? all.subspan(static_cast<size_t>(*turn - 1), 1) : all;
        };
        QaRow& row = table.emplace_back(rows[r]);
        row.turn = turn;
        for (const QaMeasured& part : turns(r)) row.n += part.n_fit;
        const std::optional<Figures> figures = figures_of(turns(r));
        if (!figures) return;
        const Mean exact_match = mean_of(figures->exact_match);
        row.exact_match = exact_match.value;
        row.standard_error = exact_match.standard_error;
        row.f1 = mean_of(figures->f1).value;
        row.rouge_l = mean_of(figures->rouge_l).value;
        const std::optional<size_t> base = base_of(row, rows, first_policy);
        if (!base) return;
        if (const auto base_figures = figures_of(turns(*base))) compare(*figures, *base_figures, row);
    };
    for (size_t r = 0; r < rows.size(); ++r) {
        if (has_turns) {
            for (size_t t = 1; t <= measured[r].size(); ++t) add(r, static_cast<int64_t>(t));
        }
        add(r, std::nullopt);
    }
    return table;
}

}  // namespace refrag
