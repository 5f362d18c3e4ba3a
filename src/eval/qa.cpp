// See qa.h.
#include "eval/qa.h"

#include <algorithm>
#include <array>
#include <map>
#include <span>
#include <utility>

#include "base/check.h"
#include "eval/qa_draw.h"
#include "eval/qa_rows.h"
#include "eval/replug.h"
#include "io/file.h"
#include "refrag/prompt_work.h"
#include "refrag/session.h"

namespace refrag {
namespace {

constexpr std::array<std::pair<const char*, QaMode>, 4> kQaModes = {
    {{"none", QaMode::none}, {"full", QaMode::full}, {"refrag", QaMode::refrag}, {"replug", QaMode::replug}}};

// How many decoder positions prompts take, from token counts alone.
class PromptSizes {
  public:
    PromptSizes(const Model& model, const QaData& data)
        : model_(model), data_(data), passage_tokens_(data.passages.size(), -1) {}

    // Positions of all but the passages in a prompt over n_passages of them.
    int64_t around(std::span<const Turn> history, std::string_view question, size_t n_passages) const {
        const std::vector<std::shared_ptr<SharedPassage>> places(n_passages);
        std::vector<Segment> segments = make_segments(model_, history, places, question);
        std::erase_if(segments, [](const Segment& s) { return std::holds_alternative<PassageSegment>(s); });
        return std::ssize(token_ids(model_, segments));
    }

    // The most that the passages can take in a row beside that, whichever chunks are expanded. A row of mode
    // replug reads one of them at a time.
    int64_t positions(const QaRow& row, std::span<const size_t> passages) {
        if (row.mode != QaMode::refrag) {
            int64_t tokens = 0;
            for (const size_t passage : passages)
                tokens = row.mode == QaMode::replug ? std::max(tokens, n_tokens(passage))
                                                    : tokens + n_tokens(passage);
            return tokens;
        }
        const int64_t k = *row.chunk_len;
        int64_t whole = 0;                 // chunks of k tokens
        std::vector<int64_t> last_chunks;  // tokens of the shorter ones
        for (const size_t passage : passages) {
            whole += n_tokens(passage) / k;
            if (n_tokens(passage) % k != 0) last_chunks.push_back(n_tokens(passage) % k);
        }
        const int64_t n_chunks = whole + std::ssize(last_chunks);
        int64_t expanded = n_expand(*row.expand_fraction, n_chunks);
        const int64_t rest = row.unexpanded == Unexpanded::compress ? n_chunks - expanded : 0;
        int64_t most = rest + std::min(expanded, whole) * k;
        std::sort(last_chunks.rbegin(), last_chunks.rend());
        expanded -= std::min(expanded, whole);
        for (size_t i = 0; i < static_cast<size_t>(expanded); ++i) most += last_chunks[i];
        return most;
    }

  private:
    int64_t n_tokens(size_t passage) {
        int64_t& n = passage_tokens_[passage];
        if (n < 0) n = std::ssize(model_.tokenizer().encode_ids(data_.passages[passage].content()));
        return n;
    }

    const Model& model_;
    const QaData& data_;
    std::vector<int64_t> passage_tokens_;  // -1: not counted yet
};

// One question and what is drawn for it.
struct Task {
    size_t question = 0;
    size_t first = 0;  // the first turn of its line, by which passages are drawn for all
    std::vector<size_t> distractors;
};

class QaEvaluation {
  public:
    QaEvaluation(const Model& model, const QaData& data, const QaOptions& options)
        : model_(model),
          data_(data),
          options_(options),
          rows_(plan_qa_rows(options, model.config().chunk_len)) {
        int64_t most = 0;
        for (const QaRow& row : rows_) most = std::max(most, row.distractors.value_or(0));
        for (const size_t first : draw_questions(data, static_cast<size_t>(options.limit), options.seed)) {
            const std::vector<size_t> distractors =
                draw_distractors(data, first, static_cast<size_t>(most), options.seed);
            size_t q = first;
            do {
                tasks_.push_back({q, first, distractors});
                n_turns_ = std::max(n_turns_, data.questions[q].turn);
                ++q;
            } while (q < data.questions.size() && data.questions[q].turn > 1 &&
                     static_cast<int64_t>(data.questions[q].turn) <= options.max_turns);
        }
    }

    std::vector<QaRow> run(const QaProgress& progress, const QaSink& sink) {
        // Room for the longest prompt that is asked, not for the decoder's whole window.
        const int64_t positions = measure();
        if (positions > 0) ask_all(positions, progress, sink);
        return sum_up(rows_, measured_, options_.policies.front(), data_.has_turns);
    }

  private:
    const QaQuestion& question_of(const Task& task) const { return data_.questions[task.question]; }
    QaMeasured& measured(size_t row, const Task& task) { return measured_[row][question_of(task).turn - 1]; }

    std::vector<size_t> passages_of(const QaRow& row, const Task& task) const {
        if (!row.distractors) return {};
        return place_gold(data_, task.first, task.distractors, static_cast<size_t>(*row.distractors),
                          options_.seed);
    }

    // The turns before the task's, as if they had been answered right.
    std::vector<Turn> history_of(const Task& task) const {
        std::vector<Turn> history;
        for (size_t q = task.first; q < task.question; ++q) {
            const QaQuestion& earlier = data_.questions[q];
            const bool answered = !earlier.answers.empty() && !earlier.answers.front().empty();
            history.push_back(
                {earlier.question, answered ? earlier.answers.front() : options_.no_answer.value_or("")});
        }
        return history;
    }

    // Fills in measured_ but for the scores; returns the most positions, answer included, that an asked
    // question takes; 0 when none is asked.
    int64_t measure() {
        measured_.assign(rows_.size(), std::vector<QaMeasured>(n_turns_));
        PromptSizes sizes(model_, data_);
        std::map<std::pair<size_t, size_t>, int64_t> around;  // by task and number of passages
        const int64_t window = model_.decoder().config().max_seq_len;
        int64_t most = 0;
        for (size_t r = 0; r < rows_.size(); ++r) {
            std::vector<int64_t> turn_most(n_turns_, 0);
            for (size_t i = 0; i < tasks_.size(); ++i) {
                const std::vector<size_t> passages = passages_of(rows_[r], tasks_[i]);
                const size_t together = rows_[r].mode == QaMode::replug ? 1 : passages.size();
                const auto [known, is_new] = around.try_emplace({i, together}, 0);
                if (is_new)
                    known->second =
                        sizes.around(history_of(tasks_[i]), question_of(tasks_[i]).question, together);
                const int64_t positions =
                    options_.max_new_tokens + known->second + sizes.positions(rows_[r], passages);
                int64_t& longest = turn_most[question_of(tasks_[i]).turn - 1];
                longest = std::max(longest, positions);
                measured(r, tasks_[i]).n_fit += positions <= window ? 1 : 0;
            }
            for (size_t t = 0; t < n_turns_; ++t) {
                measured_[r][t].asked = turn_most[t] <= window;
                if (measured_[r][t].asked) most = std::max(most, turn_most[t]);
            }
        }
        return most;
    }

    void ask_all(int64_t positions, const QaProgress& progress, const QaSink& sink) {
        Session session(model_, positions);
        int64_t total = 0;
        for (const auto& turns : measured_) {
            for (const QaMeasured& turn : turns) total += turn.asked ? turn.n_fit : 0;
        }
        int64_t done = 0;
        // Rows inside questions: a passage is encoded once for all rows, however many questions there are.
        for (const Task& task : tasks_) {
            const QaQuestion& question = question_of(task);
            const std::vector<Turn> history = history_of(task);
            for (size_t r = 0; r < rows_.size(); ++r) {
                QaMeasured& asked = measured(r, task);
                if (!asked.asked) continue;
                const std::string prediction = ask(session, rows_[r], task, history);
                asked.scores.push_back(
                    score_answer(prediction, question.answers, options_.no_answer.value_or("")));
                if (sink) sink(rows_[r], question, prediction, asked.scores.back());
                if (progress) progress(++done, total);
            }
        }
    }

    std::string ask(Session& session, const QaRow& row, const Task& task, std::span<const Turn> history) {
        AnswerOptions options;
        options.max_new_tokens = static_cast<int32_t>(options_.max_new_tokens);
        options.sampler.seed = options_.seed + task.question;
        // A row without a k of its own cuts as the refrag rows do, so that they find the passages cut.
        options.chunk_len = row.chunk_len.value_or(options_.chunk_lens.empty() ? model_.config().chunk_len
                                                                               : options_.chunk_lens.front());
        options.policy = row.policy.value_or(SelectPolicy::all);
        options.expand_fraction = row.expand_fraction.value_or(1.0);
        options.unexpanded = row.unexpanded.value_or(Unexpanded::compress);
        std::vector<Passage> passages;
        for (const size_t passage : passages_of(row, task)) passages.push_back(data_.passages[passage]);
        if (row.mode == QaMode::replug) return ask_replug(session, passages, task, history);
        return session.answer(passages, question_of(task).question, options, {}, history).text;
    }

    std::string ask_replug(Session& session, std::span<const Passage> passages, const Task& task,
                           std::span<const Turn> history) {
        std::vector<std::vector<int32_t>> prompts;
        for (const auto& passage : share_passages(model_, passages, session.cache())) {
            const std::vector<std::shared_ptr<SharedPassage>> alone{passage};
            prompts.push_back(
                token_ids(model_, make_segments(model_, history, alone, question_of(task).question)));
        }
        if (!backend_) backend_ = model_.device().make_backend();
        Arena arena(*backend_);
        const std::vector<int32_t> ids = replug(*backend_, model_, prompts, options_.max_new_tokens, arena);
        // As an engine turns ids into an answer.
        std::string text = model_.tokenizer().decode(ids, /*skip_special_tokens=*/true);
        if (text.starts_with(' ')) text.erase(0, 1);
        return text;
    }

    const Model& model_;
    const QaData& data_;
    const QaOptions& options_;
    std::unique_ptr<Backend> backend_;  // of replug; none before it is needed
    std::vector<QaRow> rows_;           // of all turns
    std::vector<Task> tasks_;
    size_t n_turns_ = 0;                             // of the line with the most
    std::vector<std::vector<QaMeasured>> measured_;  // [n_rows][n_turns]
};

}  // namespace

QaMode parse_qa_mode(const std::string& name) {
    for (const auto& [word, mode] : kQaModes) {
        if (name == word) return mode;
    }
    fail(Status::usage, "mode: expected none, full, refrag or replug; found \"", name, "\"");
}

const char* qa_mode_name(QaMode mode) {
    for (const auto& [word, value] : kQaModes) {
        if (value == mode) return word;
    }
    return "?";
}

void check_qa_options(const QaOptions& options) {
    REFRAG_CHECK(!options.modes.empty(), Status::usage, "modes: expected at least one");
    REFRAG_CHECK(!options.distractors.empty(), Status::usage, "distractors: expected at least one number");
    for (const int64_t distractors : options.distractors)
        REFRAG_CHECK(distractors >= 0, Status::usage, "distractors: expected at least 0, found ",
                     distractors);
    for (const int32_t k : options.chunk_lens)
        REFRAG_CHECK(k >= 1, Status::usage, "chunk length: expected at least 1, found ", k);
    // Refuses what makes no sense in them.
    plan_selections(options.expand_fractions, options.policies, options.unexpanded);
    REFRAG_CHECK(options.limit >= 0, Status::usage, "limit: expected at least 0, found ", options.limit);
    REFRAG_CHECK(options.max_turns >= 1, Status::usage, "turns: expected at least 1, found ",
                 options.max_turns);
    REFRAG_CHECK(options.max_new_tokens >= 1 && options.max_new_tokens <= INT32_MAX, Status::usage,
                 "tokens to generate: expected at least 1, found ", options.max_new_tokens);
    REFRAG_CHECK(!options.no_answer || !answer_tokens(*options.no_answer).empty(), Status::usage,
                 "no answer: expected a text with a word other than an article, found \"",
                 printable(options.no_answer.value_or(""), 60), "\"");
}

std::vector<QaRow> evaluate_qa(const Model& model, const QaData& data, const QaOptions& options,
                               const QaProgress& progress, const QaSink& sink) {
    check_qa_options(options);
    return QaEvaluation(model, data, options).run(progress, sink);
}

}  // namespace refrag
