// The rows of `eval qa`: policies compared question by question, turns of conversations, questions without an
// answer, and summaries of texts that only fit compressed.
#include <doctest/doctest.h>

#include <map>

#include "cli_test.h"
#include "eval/qa.h"
#include "eval/qa_draw.h"
#include "eval/qa_rows.h"
#include "golden.h"
#include "io/json.h"
#include "refrag/session.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const Model& tiny() {
    static const Model model(cpu().device(), tiny_refrag_path());
    return model;
}

QaRow refrag_row(double p, SelectPolicy policy, int64_t distractors = 0) {
    QaRow row;
    row.mode = QaMode::refrag;
    row.distractors = distractors;
    row.chunk_len = 8;
    row.expand_fraction = p;
    row.policy = policy;
    return row;
}

QaMeasured measured(const std::vector<QaScore>& scores) {
    return {std::ssize(scores), true, scores};
}

struct Said {
    QaRow row;
    const QaQuestion* question;
    std::string prediction;
    QaScore score;
};

std::vector<Said> all_said(const QaData& data, const QaOptions& options, std::vector<QaRow>& rows) {
    std::vector<Said> said;
    rows = evaluate_qa(tiny(), data, options, {},
                       [&](const QaRow& row, const QaQuestion& question, const std::string& prediction,
                           const QaScore& score) {
                           said.push_back({row, &question, prediction, score});
                       });
    return said;
}

}  // namespace

TEST_CASE("eval qa: differences to the first policy by hand") {
    QaRow none;
    const std::vector<QaRow> rows = {
        none, refrag_row(0.5, SelectPolicy::model), refrag_row(0.5, SelectPolicy::random),
        refrag_row(1.0, SelectPolicy::all), refrag_row(0.5, SelectPolicy::random, 2)};
    // Exact match 1 0 1 1 and 0 0 1 0; F1 1 .5 1 1 and .5 .5 1 0.
    const std::vector<QaScore> model = {{1, 1, 1}, {0, 0.5, 0}, {1, 1, 1}, {1, 1, 0}};
    const std::vector<QaScore> random = {{0, 0.5, 0}, {0, 0.5, 1}, {1, 1, 0}, {0, 0, 0}};
    const std::vector<std::vector<QaMeasured>> scores = {
        {measured(model)}, {measured(model)}, {measured(random)}, {measured(random)}, {measured(random)}};
    const std::vector<QaRow> table = sum_up(rows, scores, SelectPolicy::model, false);
    REQUIRE(table.size() == 5);
    // Differences -1 0 0 -1: mean -.5, squares 4 / 4, over 3, over 4. Student's t for 3 degrees: 3.18245.
    CHECK(*table[2].em_difference == -0.5);
    CHECK(*table[2].em_ci95 == doctest::Approx(3.182446305284 * std::sqrt(1.0 / 12.0)));
    // -.5 0 0 -1: mean -.375, squares .015625 + .140625 * 2 + .390625 = .6875.
    CHECK(*table[2].f1_difference == -0.375);
    CHECK(*table[2].f1_ci95 == doctest::Approx(3.182446305284 * std::sqrt(0.6875 / 12.0)));
    CHECK(*table[2].rouge_l == 0.25);
    CHECK(*table[1].rouge_l == 0.5);
    // The first policy, other modes, and rows that it has none beside.
    for (const size_t i : {0u, 1u, 3u, 4u}) {
        CHECK(table[i].exact_match);
        CHECK(!table[i].em_difference);
        CHECK(!table[i].f1_ci95);
    }
}

TEST_CASE("eval qa: a row for every number of a turn, and one for all") {
    const std::vector<QaRow> rows = {refrag_row(0.5, SelectPolicy::model),
                                     refrag_row(0.5, SelectPolicy::random)};
    std::vector<std::vector<QaMeasured>> scores = {{measured({{1, 1, 1}, {0, 0, 0}}), measured({{1, 1, 1}})},
                                                   {measured({{0, 0, 0}, {0, 0, 0}}), measured({{1, 1, 1}})}};
    std::vector<QaRow> table = sum_up(rows, scores, SelectPolicy::model, true);
    REQUIRE(table.size() == 6);
    CHECK(table[0].turn == 1);
    CHECK(table[1].turn == 2);
    CHECK(!table[2].turn);
    CHECK(table[0].n == 2);
    CHECK(table[1].n == 1);
    CHECK(table[2].n == 3);
    CHECK(*table[0].exact_match == 0.5);
    CHECK(*table[1].exact_match == 1.0);
    CHECK(*table[2].exact_match == doctest::Approx(2.0 / 3.0));
    CHECK(*table[3].em_difference == -0.5);
    CHECK(*table[4].em_difference == 0.0);
    CHECK(!table[4].em_ci95);
    CHECK(*table[5].em_difference == doctest::Approx(-1.0 / 3.0));
    CHECK(table[5].em_ci95);
    // A turn that was not asked takes the figures of all turns with it, in both rows.
    scores[0][1] = {0, false, {}};
    table = sum_up(rows, scores, SelectPolicy::model, true);
    CHECK(table[0].exact_match);
    CHECK(!table[1].exact_match);
    CHECK(table[1].n == 0);
    CHECK(!table[2].exact_match);
    CHECK(table[2].n == 2);
    CHECK(table[3].em_difference);
    CHECK(table[5].exact_match);
    CHECK(!table[5].em_difference);
}

TEST_CASE("eval qa: every turn is asked after the earlier ones and their first answers") {
    const QaData data = read_qa_data(repo_path("tests/golden/qa/turns.jsonl"));
    QaOptions options;
    options.modes = {QaMode::none, QaMode::full, QaMode::refrag};
    options.distractors = {0, 1};
    options.expand_fractions = {0.0, 0.4};
    options.policies = {SelectPolicy::model, SelectPolicy::random};
    options.max_new_tokens = 6;
    options.no_answer = "not in the passages";
    options.seed = 5;
    options.max_turns = 3;
    std::vector<QaRow> rows;
    const std::vector<Said> said = all_said(data, options, rows);
    // None, full twice, refrag twice at p = 0 and by two policies; turns 1, 2, 3 and all.
    const size_t n_rows = 1 + 2 + 2 * 3;
    REQUIRE(rows.size() == n_rows * 4);
    for (size_t i = 0; i < rows.size(); ++i) {
        CHECK(rows[i].turn.value_or(4) == static_cast<int64_t>(i % 4 + 1));
        CHECK(rows[i].n == std::array{3, 2, 1, 6}[i % 4]);
    }
    REQUIRE(said.size() == n_rows * 6);  // the fourth turn of the first line is left out
    const std::vector<Turn> first_line = {{"When was Velmora founded?", "1482"},
                                          {"And where is it?", "Trask"}};
    for (size_t i = 0; i < said.size(); ++i) {
        CAPTURE(i);
        const QaQuestion& question = *said[i].question;
        const auto q = static_cast<size_t>(&question - data.questions.data());
        const QaRow& row = said[i].row;
        // All turns of a line read the same passages in the same order: those of its first.
        const size_t first = q + 1 - question.turn;
        std::vector<Passage> passages;
        if (row.distractors) {
            const auto n = static_cast<size_t>(*row.distractors);
            for (const size_t p : place_gold(data, first, draw_distractors(data, first, n, 5), n, 5))
                passages.emplace_back(data.passages[p]);
        }
        std::vector<Turn> history;
        if (question.id == "c1") history.assign(first_line.begin(), first_line.begin() + question.turn - 1);
        if (question.id == "2" && question.turn == 2) history = {{"What does Brinlo make?", "violins"}};
        AnswerOptions fresh;
        fresh.max_new_tokens = 6;
        fresh.policy = row.policy.value_or(SelectPolicy::all);
        fresh.expand_fraction = row.expand_fraction.value_or(1.0);
        fresh.sampler.seed = 5 + q;
        Session session(tiny());
        const Answer answer = session.answer(passages, question.question, fresh, {}, history);
        CHECK(answer.text == said[i].prediction);
    }
    // An earlier question without an answer reads as answered by the phrase.
    options.max_turns = 4;
    options.modes = {QaMode::none};
    const std::vector<Said> again = all_said(data, options, rows);
    REQUIRE(again.size() == 7);
    CHECK(again[3].question->question == "Is it a city?");
    std::vector<Turn> history = first_line;
    history.push_back({"Who founded it?", "not in the passages"});
    AnswerOptions fresh;
    fresh.max_new_tokens = 6;
    fresh.policy = SelectPolicy::all;
    Session session(tiny());
    CHECK(session.answer({}, "Is it a city?", fresh, {}, history).text == again[3].prediction);
}

TEST_CASE("eval qa: a turn beyond the window has no figures, the earlier ones have") {
    std::string turns;
    for (int i = 0; i < 6; ++i) {
        std::string answer;
        for (int j = 0; j < 12; ++j) answer += str("barley ", i * j, " ");
        turns += str(i == 0 ? "" : ", ", R"({"question": "And then?", "answers": [")", answer, R"("]})");
    }
    const QaData data = parse_qa_data(
        R"({"text": "A hill.", "turns": [)" + turns + "]}\n" +
            R"({"text": "A mill.", "turns": [{"question": "q", "answers": ["a"]}, {"question": "r", "answers": ["b"]}]})",
        "lines");
    QaOptions options;
    options.modes = {QaMode::full};
    options.max_new_tokens = 8;
    std::vector<QaRow> rows;
    const std::vector<Said> said = all_said(data, options, rows);
    REQUIRE(rows.size() == 7);
    size_t n = 0;
    for (size_t t = 0; t < 6; ++t) {
        if (rows[t].exact_match) n += static_cast<size_t>(rows[t].n);
        if (t > 0 && !rows[t - 1].exact_match) CHECK(!rows[t].exact_match);
    }
    CHECK(rows[1].exact_match);
    CHECK(!rows[5].exact_match);
    CHECK(rows[5].n == 0);
    CHECK(!rows[6].exact_match);
    CHECK(rows[6].n == static_cast<int64_t>(n));
    CHECK(said.size() == n);
}

TEST_CASE("eval qa: turns, policies and unanswerable questions from outside") {
    const TempDir dir;
    const std::string base = "eval qa -m tests/golden/tiny-refrag --data tests/golden/qa/turns.jsonl -n 4 ";
    const std::string lists = base + "--modes none,refrag -p 0,0.5 --policy model,random ";
    const Ran ran = refrag_run(dir, lists + "-o json --predictions '" + dir.file("said.jsonl") + "'");
    REQUIRE(ran.code == 0);
    const Json rows = Json::parse(ran.out, "stdout");
    REQUIRE(rows.as_array().size() == 4 * 5);
    for (size_t i = 0; i < rows.size(); ++i) {
        const Json row = rows.at(i);
        row.check_keys({"mode", "distractors", "k", "p", "policy", "unexpanded", "turn", "exact_match", "f1",
                        "rouge_l", "standard_error", "n", "em_difference", "em_ci95", "f1_difference",
                        "f1_ci95"});
        CHECK(row.get("turn").is_null() == (i % 5 == 4));
        const bool compared = row.get_string_or("policy", "") == "random";
        CHECK(row.get("em_difference").is_null() == !compared);
        CHECK(row.get("f1_difference").is_null() == !compared);
    }
    CHECK(rows.at(4).get_int("n") == 7);
    // The differences again from the predictions.
    std::map<std::string, double> f1;  // by policy, at p = .5, all turns
    size_t n_lines = 0;
    for (const Json& line : json_lines(read_file(dir.file("said.jsonl"), 1 << 20))) {
        line.check_keys({"id", "turn", "mode", "k", "p", "policy", "unexpanded", "distractors", "question",
                         "prediction", "answers", "exact_match", "f1", "rouge_l"});
        ++n_lines;
        if (line.get_number_or("p", 0.0) == 0.5) f1[line.get_string("policy")] += line.get_number("f1") / 7;
    }
    CHECK(n_lines == 4 * 7);
    CHECK(rows.at(19).get_number("f1_difference") == doctest::Approx(f1["random"] - f1["model"]));
    CHECK(refrag_run(dir, lists + "-o csv")
              .out.starts_with("mode,distractors,k,p,policy,turn,exact_match,f1,rouge_l,standard_error,n,"
                               "em_difference,em_ci95,f1_difference,f1_ci95\nnone,,,,,1,"));
    // Lines are counted by --limit, their turns by --max-turns.
    const Ran one = refrag_run(dir, base + "--modes none --limit 3 --max-turns 1 -o csv");
    CHECK(line_count(one.out) == 1 + 2);
    CHECK(one.out.ends_with(",3\n"));

    // What this model says to an unanswerable question, called no answer, is right.
    const std::string question =
        "eval qa -m tests/golden/tiny-refrag --modes none -n 4 -o json --data '" +
        dir.write("none.jsonl", R"({"text": "t", "question": "Why?", "answers": []})") + "' ";
    const Ran plain = refrag_run(dir, question + "--predictions '" + dir.file("why.jsonl") + "'");
    REQUIRE(plain.code == 0);
    const std::string said =
        Json::parse(read_file(dir.file("why.jsonl"), 1 << 20), "why").get_string("prediction");
    REQUIRE(!answer_tokens(said).empty());
    CHECK(Json::parse(plain.out, "stdout").at(0).get_number("exact_match") == 0.0);
    std::string quoted = "'";
    for (const char c : said) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
    const Ran silent = refrag_run(dir, question + "--no-answer " + quoted + "'");
    REQUIRE(silent.code == 0);
    for (const char* measure : {"exact_match", "f1", "rouge_l"})
        CHECK(Json::parse(silent.out, "stdout").at(0).get_number(measure) == 1.0);
}

TEST_CASE("eval qa: summaries of a text that fits the window only where it is compressed") {
    const TempDir dir;
    std::string text;
    for (int i = 0; i < 150; ++i) text += str("On day ", i, " the mill on the hill ground barley.\\n");
    const std::string file =
        dir.write("summary.jsonl",
                  R"({"id": "s", "title": "The mill", "text": ")" + text +
                      R"(", "question": "Summarize the text.", "answers": ["A mill ground barley."]})");
    const Ran ran =
        refrag_run(dir,
                   "eval qa -m tests/golden/tiny-refrag --modes full,refrag -k 24 -p 0,0.02 -n 128 "
                   "-o json --data '" +
                       file + "' --predictions '" + dir.file("said.jsonl") + "'");
    REQUIRE(ran.code == 0);
    CHECK(contains(ran.err, "warning: mode full"));
    const Json rows = Json::parse(ran.out, "stdout");
    REQUIRE(rows.as_array().size() == 3);
    CHECK(rows.at(0).get("rouge_l").is_null());
    const std::vector<Json> said = json_lines(read_file(dir.file("said.jsonl"), 1 << 20));
    REQUIRE(said.size() == 2);
    for (size_t i = 0; i < 2; ++i) {
        const std::vector<std::string> gold = {"A mill ground barley."};
        const double expected = score_answer(said[i].get_string("prediction"), gold).rouge_l;
        CHECK(rows.at(i + 1).get_number("rouge_l") == doctest::Approx(expected));
        CHECK(rows.at(i + 1).get_int("n") == 1);
    }
}
