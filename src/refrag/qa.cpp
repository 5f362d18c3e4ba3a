// See qa.h.
#include "refrag/qa.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <list>
#include <map>
#include <span>
#include <utility>

#include "base/check.h"
#include "refrag/qa_draw.h"
#include "refrag/session.h"

namespace refrag {
namespace {

constexpr std::array<std::pair<const char*, QaMode>, 3> kModes = {
    {{"none", QaMode::none}, {"full", QaMode::full}, {"refrag", QaMode::refrag}}};

// Chunks that stay encoded between questions: 64 MB of embeddings for an encoder of dim 256.
constexpr size_t kMaxCachedChunks = size_t{1} << 16;

// Passages that were cut and perhaps encoded before, the longest unused dropped first.
class PassageCache {
  public:
    explicit PassageCache(const QaData& data) : data_(data) {}

    // Takes passages out, as they are needed side by side.
    std::vector<ContextPassage> take(std::span<const size_t> passages, int32_t chunk_len) {
        std::vector<ContextPassage> taken;
        for (const size_t passage : passages) {
            const auto found = places_.find({passage, chunk_len});
            if (found == places_.end()) {
                taken.emplace_back(data_.passages[passage]);
            } else {
                n_chunks_ -= found->second->second.chunks().size();
                taken.push_back(std::move(found->second->second));
                held_.erase(found->second);
                places_.erase(found);
            }
        }
        return taken;
    }

    void give_back(std::span<const size_t> passages, int32_t chunk_len, std::vector<ContextPassage> taken) {
        for (size_t i = 0; i < passages.size(); ++i) {
            n_chunks_ += taken[i].chunks().size();
            const Key key{passages[i], chunk_len};
            held_.emplace_front(key, std::move(taken[i]));
            places_.emplace(key, held_.begin());
        }
        while (n_chunks_ > kMaxCachedChunks) {
            n_chunks_ -= held_.back().second.chunks().size();
            places_.erase(held_.back().first);
            held_.pop_back();
        }
    }

  private:
    using Key = std::pair<size_t, int32_t>;  // passage, chunk length
    using Held = std::list<std::pair<Key, ContextPassage>>;

    const QaData& data_;
    Held held_;  // last used first
    std::map<Key, Held::iterator> places_;
    size_t n_chunks_ = 0;
};

// How many decoder positions prompts take, from token counts alone.
class PromptSizes {
  public:
    PromptSizes(const Model& model, const QaData& data)
        : model_(model), data_(data), passage_tokens_(data.passages.size(), -1) {
        const PromptTemplate& pieces = model.config().prompt;
        fixed_ = (model.bos_id() ? 1 : 0) + n_template(pieces.before) + n_template(pieces.question_prefix) +
                 n_template(pieces.question_suffix);
        around_passage_ = n_template(pieces.passage_prefix) + n_template(pieces.passage_suffix);
    }

    // The most that the question over these passages can take in a row, whichever chunks are expanded.
    int64_t positions(const QaRow& row, std::string_view question, std::span<const size_t> passages) {
        const int64_t around = fixed_ + std::ssize(model_.tokenizer().encode_ids(question)) +
                               around_passage_ * std::ssize(passages);
        if (row.mode != QaMode::refrag) {
            int64_t tokens = 0;
            for (const size_t passage : passages) tokens += n_tokens(passage);
            return around + tokens;
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
        int64_t most = around + n_chunks - expanded + std::min(expanded, whole) * k;
        std::sort(last_chunks.rbegin(), last_chunks.rend());
        expanded -= std::min(expanded, whole);
        for (size_t i = 0; i < static_cast<size_t>(expanded); ++i) most += last_chunks[i];
        return most;
    }

  private:
    int64_t n_template(const std::string& piece) const {
        return piece.empty() ? 0 : std::ssize(model_.tokenizer().encode_ids(piece, /*parse_special=*/true));
    }
    int64_t n_tokens(size_t passage) {
        int64_t& n = passage_tokens_[passage];
        if (n < 0) n = std::ssize(model_.tokenizer().encode_ids(data_.passages[passage].content()));
        return n;
    }

    const Model& model_;
    const QaData& data_;
    std::vector<int64_t> passage_tokens_;  // -1: not counted yet
    int64_t fixed_ = 0;
    int64_t around_passage_ = 0;
};

std::vector<QaRow> plan_rows(const Model& model, const QaOptions& options) {
    std::vector<int32_t> chunk_lens = options.chunk_lens;
    if (chunk_lens.empty()) chunk_lens.push_back(model.config().chunk_len);
    std::vector<double> fractions = options.expand_fractions;
    if (options.policy == SelectPolicy::none) fractions = {0.0};
    if (options.policy == SelectPolicy::all) fractions = {1.0};
    std::vector<QaRow> rows;
    for (const QaMode mode : options.modes) {
        QaRow row;
        row.mode = mode;
        if (mode == QaMode::none) {
            rows.push_back(row);
            continue;
        }
        for (const int64_t distractors : options.distractors) {
            REFRAG_CHECK(distractors >= 0, Status::usage, "distractors: expected at least 0, found ",
                         distractors);
            row.distractors = distractors;
            if (mode == QaMode::full) {
                rows.push_back(row);
                continue;
            }
            for (const int32_t k : chunk_lens) {
                for (const double p : fractions) {
                    REFRAG_CHECK(k >= 1, Status::usage, "chunk length: expected at least 1, found ", k);
                    n_expand(p, 1);  // refuses a p outside 0..1
                    row.chunk_len = k;
                    row.expand_fraction = p;
                    row.policy = options.policy;
                    rows.push_back(row);
                }
            }
        }
    }
    return rows;
}

// One question and what is drawn for it.
struct Task {
    size_t question = 0;
    std::vector<size_t> distractors;
};

class QaEvaluation {
  public:
    QaEvaluation(const Model& model, const QaData& data, const QaOptions& options)
        : model_(model), data_(data), options_(options), rows_(plan_rows(model, options)), cache_(data) {
        int64_t most = 0;
        for (const QaRow& row : rows_) most = std::max(most, row.distractors.value_or(0));
        for (const size_t question : draw_questions(data, static_cast<size_t>(options.limit), options.seed)) {
            tasks_.push_back(
                {question, draw_distractors(data, question, static_cast<size_t>(most), options.seed)});
        }
    }

    std::vector<QaRow> run(const QaProgress& progress, const QaSink& sink) {
        // Room for the longest prompt that is asked, not for the decoder's whole window.
        const int64_t positions = measure();
        if (positions == 0) return rows_;
        Session session(model_, positions);
        std::vector<std::vector<QaScore>> scores(rows_.size());
        const int64_t total = std::count(asked_.begin(), asked_.end(), true) * std::ssize(tasks_);
        int64_t done = 0;
        // Rows inside questions: a passage is encoded once for all rows, however many questions there are.
        for (const Task& task : tasks_) {
            for (size_t r = 0; r < rows_.size(); ++r) {
                if (!asked_[r]) continue;
                const QaQuestion& question = data_.questions[task.question];
                const std::string prediction = ask(session, rows_[r], task);
                scores[r].push_back(score_answer(prediction, question.answers));
                if (sink) sink(rows_[r], question, prediction, scores[r].back());
                if (progress) progress(++done, total);
            }
        }
        for (size_t r = 0; r < rows_.size(); ++r) {
            if (asked_[r]) summarize(scores[r], rows_[r]);
        }
        return rows_;
    }

  private:
    std::vector<size_t> passages_of(const QaRow& row, const Task& task) const {
        if (!row.distractors) return {};
        return place_gold(data_, task.question, task.distractors, static_cast<size_t>(*row.distractors),
                          options_.seed);
    }

    // Fills asked_ and every row's n; returns the most positions, answer included, that an asked row takes; 0
    // when none is asked.
    int64_t measure() {
        PromptSizes sizes(model_, data_);
        const int64_t window = model_.decoder().config().max_seq_len;
        int64_t most = 0;
        for (QaRow& row : rows_) {
            int64_t row_most = 0;
            for (const Task& task : tasks_) {
                const int64_t positions =
                    options_.max_new_tokens +
                    sizes.positions(row, data_.questions[task.question].question, passages_of(row, task));
                row_most = std::max(row_most, positions);
                row.n += positions <= window ? 1 : 0;
            }
            asked_.push_back(row_most <= window);
            if (asked_.back()) most = std::max(most, row_most);
        }
        return most;
    }

    std::string ask(Session& session, const QaRow& row, const Task& task) {
        AnswerOptions options;
        options.max_new_tokens = static_cast<int32_t>(options_.max_new_tokens);
        options.sampler.seed = options_.seed + task.question;
        // A row without a k of its own cuts as the refrag rows do, so that they find the passages cut.
        options.chunk_len = row.chunk_len.value_or(options_.chunk_lens.empty() ? model_.config().chunk_len
                                                                               : options_.chunk_lens.front());
        options.policy = row.policy.value_or(SelectPolicy::all);
        options.expand_fraction = row.expand_fraction.value_or(1.0);
        const std::vector<size_t> ids = passages_of(row, task);
        std::vector<ContextPassage> passages = cache_.take(ids, options.chunk_len);
        const Answer answer = session.answer(passages, data_.questions[task.question].question, options);
        cache_.give_back(ids, options.chunk_len, std::move(passages));
        return answer.text;
    }

    static void summarize(const std::vector<QaScore>& scores, QaRow& row) {
        const auto n = static_cast<double>(scores.size());
        double exact = 0.0;
        double f1 = 0.0;
        for (const QaScore& score : scores) {
            exact += score.exact_match;
            f1 += score.f1;
        }
        row.exact_match = exact / n;
        row.f1 = f1 / n;
        double squares = 0.0;
        for (const QaScore& score : scores)
            squares += (score.exact_match - *row.exact_match) * (score.exact_match - *row.exact_match);
        if (scores.size() > 1) row.standard_error = std::sqrt(squares / (n - 1.0) / n);
    }

    const Model& model_;
    const QaData& data_;
    const QaOptions& options_;
    std::vector<QaRow> rows_;
    std::vector<bool> asked_;  // [n_rows] every question fits
    std::vector<Task> tasks_;
    PassageCache cache_;
};

}  // namespace

QaMode parse_qa_mode(const std::string& name) {
    for (const auto& [word, mode] : kModes) {
        if (name == word) return mode;
    }
    fail(Status::usage, "mode: expected none, full or refrag; found \"", name, "\"");
}

const char* qa_mode_name(QaMode mode) {
    for (const auto& [word, value] : kModes) {
        if (value == mode) return word;
    }
    return "?";
}

std::vector<QaRow> evaluate_qa(const Model& model, const QaData& data, const QaOptions& options,
                               const QaProgress& progress, const QaSink& sink) {
    REFRAG_CHECK(!options.modes.empty(), Status::usage, "modes: expected at least one");
    REFRAG_CHECK(!options.distractors.empty(), Status::usage, "distractors: expected at least one number");
    REFRAG_CHECK(options.limit >= 0, Status::usage, "limit: expected at least 0, found ", options.limit);
    REFRAG_CHECK(options.max_new_tokens >= 1 && options.max_new_tokens <= INT32_MAX, Status::usage,
                 "tokens to generate: expected at least 1, found ", options.max_new_tokens);
    return QaEvaluation(model, data, options).run(progress, sink);
}

}  // namespace refrag
