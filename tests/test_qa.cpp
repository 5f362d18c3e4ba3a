// `refrag eval qa`: the evaluation loop on the default model, and the command from outside.
#include <doctest/doctest.h>

#include <cmath>

#include "cli_test.h"
#include "eval/qa.h"
#include "eval/qa_draw.h"
#include "golden.h"
#include "io/json.h"
#include "refrag/session.h"

using namespace refrag;
using namespace refrag_test;

namespace {

struct Said {
    QaRow row;
    std::string id;
    std::string prediction;
    QaScore score;
};

struct Evaluated {
    std::vector<QaRow> rows;
    std::vector<Said> said;
};

Evaluated evaluate(const Model& model, const QaData& data, const QaOptions& options) {
    Evaluated result;
    int64_t last_done = 0;
    int64_t last_total = 0;
    result.rows = evaluate_qa(
        model, data, options,
        [&](int64_t done, int64_t total) {
            CHECK(done == last_done + 1);
            last_done = done;
            last_total = total;
        },
        [&](const QaRow& row, const QaQuestion& question, const std::string& prediction,
            const QaScore& score) {
            result.said.push_back({row, question.id, prediction, score});
        });
    CHECK(last_done == last_total);
    CHECK(last_done == std::ssize(result.said));
    return result;
}

const Model& nano() {
    static const Model model(cpu().device(), repo_path("weights_tools/refrag-nano"));
    return model;
}

constexpr const char* kCommand = "eval qa -m weights_tools/refrag-nano --data tests/golden/qa/squad.json ";

}  // namespace

TEST_CASE("eval qa: rows in order, with the fields that apply") {
    const QaData data = read_qa_data(repo_path("tests/golden/qa/squad.json"));
    QaOptions options;
    options.modes = {QaMode::none, QaMode::full, QaMode::refrag};
    options.distractors = {0, 2};
    options.chunk_lens = {8, 16};
    options.expand_fractions = {0.0, 0.5};
    options.limit = 3;
    const Evaluated result = evaluate(nano(), data, options);
    REQUIRE(result.rows.size() == 1 + 2 + 2 * 2 * 2);
    CHECK(!result.rows[0].distractors);
    CHECK(result.rows[2].distractors == 2);
    CHECK(!result.rows[2].chunk_len);
    CHECK(!result.rows[2].policy);
    CHECK(result.rows[4].chunk_len == 8);
    CHECK(result.rows[4].expand_fraction == 0.5);
    CHECK(result.rows[10].distractors == 2);
    CHECK(result.rows[10].policy == SelectPolicy::model);
    // Question by question, the same ones in every row; the figures are the means of what was said.
    const std::vector<size_t> asked = draw_questions(data, 3, 0);
    REQUIRE(result.said.size() == 3 * result.rows.size());
    for (size_t r = 0; r < result.rows.size(); ++r) {
        double exact = 0.0;
        double f1 = 0.0;
        double rouge = 0.0;
        for (size_t q = 0; q < 3; ++q) {
            const Said& said = result.said[q * result.rows.size() + r];
            CHECK(said.id == data.questions[asked[q]].id);
            CHECK(said.row.mode == result.rows[r].mode);
            const QaScore score = score_answer(said.prediction, data.questions[asked[q]].answers);
            CHECK(said.score.f1 == score.f1);
            CHECK(said.score.rouge_l == score.rouge_l);
            exact += score.exact_match;
            f1 += score.f1;
            rouge += score.rouge_l;
        }
        const QaRow& row = result.rows[r];
        REQUIRE(row.exact_match.has_value());
        CHECK(row.n == 3);
        CHECK(*row.exact_match == doctest::Approx(exact / 3));
        CHECK(*row.f1 == doctest::Approx(f1 / 3));
        CHECK(*row.rouge_l == doctest::Approx(rouge / 3));
        CHECK(!row.turn);
        CHECK(!row.em_difference);
        // Of a share m over n questions: sqrt(m (1 - m) / (n - 1)).
        CHECK(*row.standard_error == doctest::Approx(std::sqrt(exact / 3 * (1 - exact / 3) / 2)));
    }
}

TEST_CASE("eval qa: every answer is what a fresh session says over the same passages") {
    const QaData data = read_qa_data(repo_path("tests/golden/qa/squad.json"));
    QaOptions options;
    options.modes = {QaMode::full, QaMode::none, QaMode::refrag};
    options.distractors = {1, 3};
    options.expand_fractions = {0.0, 0.25};
    options.policies = {SelectPolicy::random};
    options.seed = 4;
    options.max_new_tokens = 8;
    const Evaluated result = evaluate(nano(), data, options);
    REQUIRE(result.said.size() == data.questions.size() * result.rows.size());
    size_t right_with_passages = 0;
    for (size_t i = 0; i < result.said.size(); ++i) {
        CAPTURE(i);
        const size_t q = i / result.rows.size();
        const QaRow& row = result.rows[i % result.rows.size()];
        std::vector<Passage> passages;
        if (row.distractors) {
            const auto n = static_cast<size_t>(*row.distractors);
            for (const size_t p : place_gold(data, q, draw_distractors(data, q, n, 4), n, 4))
                passages.emplace_back(data.passages[p]);
        }
        AnswerOptions fresh;
        fresh.max_new_tokens = 8;
        fresh.policy = row.policy.value_or(SelectPolicy::all);
        fresh.expand_fraction = row.expand_fraction.value_or(1.0);
        fresh.sampler.seed = 4 + q;
        Session session(nano());
        CHECK(session.answer(passages, data.questions[q].question, fresh).text == result.said[i].prediction);
        if (row.mode == QaMode::full) right_with_passages += result.said[i].score.exact_match == 1.0;
        if (row.mode == QaMode::none) CHECK(result.said[i].score.exact_match == 0.0);
    }
    // The passages reach the decoder: nobody guesses "1482".
    CHECK(right_with_passages > 0);
}

TEST_CASE("eval qa: a row with a prompt beyond the window has no figures, the others have") {
    const Model model(cpu().device(), tiny_refrag_path());  // 512 positions
    std::string lines;
    for (int i = 0; i < 6; ++i) {
        // Two short passages and four of more than a hundred tokens.
        std::string text;
        for (int j = 0; j < (i < 2 ? 1 : 20); ++j) text += str("row ", i, " ", j, " ");
        lines += str(R"({"text": ")", text, R"(", "question": "q", "answer": "x"})", "\n");
    }
    const QaData data = parse_qa_data(lines, "lines");
    QaOptions options;
    options.modes = {QaMode::none, QaMode::full, QaMode::refrag};
    options.distractors = {0, 3};
    options.expand_fractions = {0.0, 1.0};
    options.max_new_tokens = 4;
    const std::vector<QaRow> rows = evaluate(model, data, options).rows;
    REQUIRE(rows.size() == 7);
    for (const QaRow& row : rows) {
        const bool everything = row.mode == QaMode::full || row.expand_fraction == 1.0;
        const bool fits = !(everything && row.distractors == 3);
        CAPTURE(std::string(qa_mode_name(row.mode)));
        CHECK(row.exact_match.has_value() == fits);
        CHECK(row.f1.has_value() == fits);
        CHECK(row.standard_error.has_value() == fits);
        // Expanding everything and the full context take the same positions.
        CHECK(row.n == (fits ? 6 : rows[2].n));
    }
    CHECK(rows[2].n < 6);
    CHECK(rows[2].n > 0);
    // An answer too long for the window: nothing is asked, nothing fails.
    options.max_new_tokens = 512;
    for (const QaRow& row : evaluate(model, data, options).rows) {
        CHECK(row.n == 0);
        CHECK(!row.exact_match);
    }
}

TEST_CASE("eval qa: what is counted before is what a session then takes") {
    // A row is asked exactly where its prompt and answer fit; one token more and it is not. The prompt of the
    // only question takes `positions`, so 512 - positions new tokens fit.
    const Model model(cpu().device(), tiny_refrag_path());
    const std::string question = "Why is it so?";
    std::string text;
    for (int i = 0; i < 9; ++i) text += str("barley ", i * 7, " ");
    const QaData data = parse_qa_data(
        str(R"({"title": "T", "text": ")", text, R"(", "question": ")", question, R"(", "answer": ""})"),
        "line");
    for (const double p : {0.0, 0.3, 1.0}) {
        QaOptions options;
        options.modes = {QaMode::refrag};
        options.expand_fractions = {p};
        std::vector<Passage> passages;
        passages.emplace_back(data.passages[0]);
        AnswerOptions one;
        one.max_new_tokens = 1;
        one.expand_fraction = p;
        Session session(model);
        const Answer answer = session.answer(passages, question, one);
        const size_t k = answer.chunks[0].n_tokens;
        const auto& last = answer.chunks.back();
        // What the choice of a shorter last chunk saves.
        const int64_t saved = last.expanded && answer.n_expanded < answer.chunks.size()
                                  ? static_cast<int64_t>(k - last.n_tokens)
                                  : 0;
        options.max_new_tokens = 512 - static_cast<int64_t>(answer.positions) - saved;
        CHECK(evaluate(model, data, options).rows[0].exact_match.has_value());
        ++options.max_new_tokens;
        CHECK(!evaluate(model, data, options).rows[0].exact_match.has_value());
    }
}

TEST_CASE("eval qa: from outside, the three forms and the predictions") {
    const TempDir dir;
    const std::string base =
        std::string(kCommand) + "--distractors 0,2 -k 16 -p 0,0.25 --policy model --limit 4 -s 3 -n 8 ";
    const Ran json = refrag_run(dir, base + "-o json --predictions '" + dir.file("said.jsonl") + "'");
    REQUIRE(json.code == 0);
    CHECK(contains(json.err, "answers 28 |"));
    const Json rows = Json::parse(json.out, "stdout");
    REQUIRE(rows.as_array().size() == 7);
    for (size_t i = 0; i < rows.size(); ++i) {
        const Json row = rows.at(i);
        row.check_keys({"mode", "distractors", "k", "p", "policy", "unexpanded", "exact_match", "f1",
                        "rouge_l", "standard_error", "n"});
        const std::string mode = row.get_string("mode");
        CHECK(row.get("distractors").is_null() == (mode == "none"));
        for (const char* key : {"k", "p", "policy"}) CHECK(row.get(key).is_null() == (mode != "refrag"));
        CHECK(row.get_number("f1", 0.0, 1.0) >= row.get_number("exact_match", 0.0, 1.0));
        CHECK(row.get_int("n") == 4);
    }
    const std::string said = read_file(dir.file("said.jsonl"), 1 << 20);
    REQUIRE(line_count(said) == 28);
    double sum = 0.0;
    for (size_t begin = 0; begin < said.size();) {
        const size_t end = said.find('\n', begin);
        const Json line = Json::parse(said.substr(begin, end - begin), "said");
        line.check_keys({"id", "mode", "k", "p", "policy", "unexpanded", "distractors", "question",
                         "prediction", "answers", "exact_match", "f1", "rouge_l"});
        line.get_string("prediction");
        if (line.get_string("mode") == "full" && line.get_int("distractors") == 2)
            sum += line.get_number("f1");
        begin = end + 1;
    }
    CHECK(sum / 4 == doctest::Approx(rows.at(2).get_number("f1")));

    CHECK(refrag_run(dir, base + "-o json").out == json.out);
    CHECK(line_count(refrag_run(dir, base).out) == 2 + 7);
    const Ran csv = refrag_run(dir, base + "-o csv");
    CHECK(line_count(csv.out) == 1 + 7);
    CHECK(csv.out.starts_with(
        "mode,distractors,k,p,policy,exact_match,f1,rouge_l,standard_error,n\nnone,,,,,"));
    const Ran facts = refrag_run(
        dir,
        "eval qa -m weights_tools/refrag-nano --data tests/golden/qa/facts.jsonl --modes none -n 2 -o csv");
    CHECK(facts.code == 0);
    CHECK(facts.out.ends_with(",4\n"));
}

TEST_CASE("eval qa: wrong usage, bad files, and prompts beyond the window, from outside") {
    const TempDir dir;
    CHECK(refrag_run(dir, "eval qa --help").code == 0);
    const auto refused = [&](const std::string& arguments, int code, const char* part) {
        CAPTURE(arguments);
        const Ran ran = refrag_run(dir, arguments);
        CHECK(ran.code == code);
        CHECK(ran.out.empty());
        CHECK(line_count(ran.err) == 1);
        CHECK(contains(ran.err, part));
    };
    const std::string base = kCommand;
    refused("eval qa -m weights_tools/refrag-nano", 2, "--data");
    refused(base + "-o xml", 2, "md, json or csv");
    refused(base + "--modes none,last", 2, "expected none, full, refrag or replug; found \"last\"");
    refused(base + "--policy best", 2, "policy");
    refused(base + "--policy model,best", 2, "found \"best\"");
    refused(base + "--policy random,model,random", 2, "found \"random\" twice");
    refused(base + "--max-turns 0", 2, "--max-turns");
    refused(base + "--no-answer ''", 2, "no answer: expected a text with a word");
    refused(base + "--no-answer 'The ?'", 2, "found \"The ?\"");
    refused(base + "-p 0,2", 2, "--expand-fraction");
    refused(base + "-k 0", 2, "--chunk-len");
    refused(base + "-n 0", 2, "--n-predict");
    refused(base + "--distractors -1", 2, "--distractors");
    refused(base + "--distractors 4", 2,
            "expected at most 3 (the passages of other articles than question v1's)");
    const std::string model = "eval qa -m weights_tools/refrag-nano --data ";
    refused(model + "'" + dir.file("none.json") + "'", 3, "none.json");
    refused(model + "'" + dir.write("bad.json", "{\"data\": [{}]}") + "'", 3, "key \"data[0]\"");
    refused(model + "'" + dir.write("both.jsonl", "{\"text\": \"t\", \"question\": \"q\", \"turns\": []}\n") +
                "'",
            3, "both.jsonl: line 1: expected \"question\" with its answers or \"turns\", found both");
    refused(model + "'" + dir.write("turn.jsonl", "{\"text\": \"t\", \"turns\": [{}]}\n") + "'", 3,
            "key \"turns[0]\"");
    refused(base + "--limit 1 -n 1 --modes none --predictions '" + dir.file("no/such/file") + "'", 1,
            "no/such");
    const Ran beyond =
        refrag_run(dir, base + "--modes full,refrag -n 2000 --limit 2 --distractors 0,3 -o json");
    CHECK(beyond.code == 0);
    CHECK(contains(beyond.err, "refrag: warning: mode full, distractors 3: only"));
    const Json rows = Json::parse(beyond.out, "stdout");
    CHECK(rows.at(1).get("exact_match").is_null());
    CHECK(rows.at(1).get("f1").is_null());
    CHECK(rows.at(1).get("standard_error").is_null());
    CHECK(rows.at(1).get_int("n") < 2);
}
