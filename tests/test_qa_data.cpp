// refrag/qa_data and qa_draw: both forms of question files, what is refused and how, and what the drawing of
// questions and distractors promises.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>

#include "eval/qa_data.h"
#include "eval/qa_draw.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

QaData parse(std::string_view content) {
    return parse_qa_data(content, "q.json");
}
std::string refusal(std::string_view content) {
    return error_of([&] { parse(content); });
}
// A SQuAD file with one question, `qa` being its object.
std::string squad(const std::string& qa) {
    return R"({"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": []}, {"context": "d", "qas": [)" +
           qa + "]}]}]}";
}
std::string squad_refusal(const std::string& qa) {
    return refusal(squad(qa));
}

// Articles of 1, 2, 3, ... passages, each passage with one question.
QaData articles(size_t n) {
    std::string lines;
    for (size_t a = 0; a < n; ++a) {
        for (size_t p = 0; p <= a; ++p)
            lines += str(R"({"title": "article )", a, R"(", "text": "passage )", p,
                         R"(", "question": "?", "answer": "!"})", "\n");
    }
    return parse(lines);
}

}  // namespace

TEST_CASE("qa data: SQuAD 2.0") {
    const QaData data = read_qa_data(repo_path("tests/golden/qa/squad.json"));
    REQUIRE(data.passages.size() == 5);
    REQUIRE(data.questions.size() == 7);
    CHECK(data.article == std::vector<size_t>{0, 0, 1, 2, 2});
    CHECK(data.by_article == std::vector<size_t>{0, 1, 2, 3, 4});
    CHECK(data.article_first == std::vector<size_t>{0, 2, 3, 5});
    CHECK(data.passages[1].title == "Velmora");
    CHECK(data.passages[1].text.starts_with("The mayor of Velmora"));
    CHECK(data.questions[1].id == "v2");
    CHECK(data.questions[1].answers == std::vector<std::string>{"clocks", "produce clocks"});
    CHECK(data.questions[3].passage == 1);
    CHECK(data.questions[3].answers.empty());
    CHECK(data.questions[6].question == "What was the Tholdon Tower built of?");
}

TEST_CASE("qa data: SQuAD 1.1, articles with one title, a byte order mark, one line or many") {
    const std::string text =
        R"({"version": "1.1", "data": [)"
        R"({"title": "A", "paragraphs": [{"context": "1", "qas": [{"question": "q", "id": 5, "answers": [{"text": "x"}]}]}]},)"
        R"({"title": "B", "paragraphs": [{"context": "2", "qas": []}]},)"
        R"({"title": "A", "paragraphs": [{"context": "3", "qas": [{"question": "r", "answers": [{"text": "y"}]}]}]},)"
        R"({"paragraphs": [{"context": "4", "qas": []}]}, {"title": "", "paragraphs": []}]})";
    std::string many;
    for (const char c : text) many += c == '[' ? "[\n" : std::string(1, c);
    for (const std::string& form : {text, "\xEF\xBB\xBF" + text + "\r\n\n", "\n" + many}) {
        const QaData data = parse(form);
        REQUIRE(data.questions.size() == 2);
        CHECK(data.questions[0].id == "5");
        CHECK(data.questions[1].id == "2");
        CHECK(data.article == std::vector<size_t>{0, 1, 0, 2});
        CHECK(data.by_article == std::vector<size_t>{0, 2, 1, 3});
        CHECK(data.article_size(0) == 2);
    }
}

TEST_CASE("qa data: JSON Lines") {
    const QaData data = read_qa_data(repo_path("tests/golden/qa/facts.jsonl"));
    REQUIRE(data.questions.size() == 4);
    REQUIRE(data.passages.size() == 3);
    CHECK(data.questions[0].id == "1");
    CHECK(data.questions[1].id == "2");
    CHECK(data.questions[1].passage == 0);  // the same passage as the line before
    CHECK(data.questions[1].answers == std::vector<std::string>{"Trask"});
    CHECK(data.questions[2].id == "3");
    CHECK(data.passages[1].text == "Brinlo makes violins. The sign of Brinlo is an owl.");
    CHECK(data.questions[2].answers == std::vector<std::string>{"violins", "a violin"});
    CHECK(data.questions[3].answers.empty());
    CHECK(data.article == std::vector<size_t>{0, 1, 2});
    // One line alone, with and without its end; titles and texts that only look the same when joined.
    CHECK(parse(R"({"text": "t", "question": "data", "answer": ""})").questions.size() == 1);
    CHECK(
        parse("\xEF\xBB\xBF{\"text\": \"t\", \"question\": \"q\", \"answer\": \"\"}\n\n").questions.size() ==
        1);
    CHECK(parse("{\"title\": \"ab\", \"text\": \"c\", \"question\": \"q\", \"answer\": \"\"}\n"
                "{\"title\": \"a\", \"text\": \"bc\", \"question\": \"q\", \"answer\": \"\"}\r\n")
              .passages.size() == 2);
    // Brackets and escaped quotes inside strings end nothing.
    CHECK(parse("{\"text\": \"}\\\"{[\", \"question\": \"q\", \"answer\": \"\"}\n"
                "{\"text\": \"]\", \"question\": \"q\", \"answer\": \"\"}")
              .passages.size() == 2);
}

TEST_CASE("qa data: JSON Lines with turns") {
    const QaData data = read_qa_data(repo_path("tests/golden/qa/turns.jsonl"));
    CHECK(data.has_turns);
    REQUIRE(data.questions.size() == 7);
    REQUIRE(data.passages.size() == 3);
    std::vector<size_t> turns;
    std::vector<std::string> ids;
    std::vector<size_t> passages;
    for (const QaQuestion& question : data.questions) {
        turns.push_back(question.turn);
        ids.push_back(question.id);
        passages.push_back(question.passage);
    }
    CHECK(turns == std::vector<size_t>{1, 2, 3, 4, 1, 2, 1});
    CHECK(ids == std::vector<std::string>{"c1", "c1", "c1", "c1", "2", "2", "7"});
    CHECK(passages == std::vector<size_t>{0, 0, 0, 0, 1, 1, 2});
    CHECK(data.questions[1].question == "And where is it?");
    CHECK(data.questions[1].answers == std::vector<std::string>{"Trask"});
    CHECK(data.questions[2].answers.empty());
    CHECK(data.questions[3].answers == std::vector<std::string>{"yes", "a city"});
    // One line alone is a file too.
    const QaData one = parse(R"({"text": "t", "turns": [{"question": "q", "answer": "a"}]})");
    CHECK(one.has_turns);
    CHECK(one.questions.size() == 1);
    CHECK(!read_qa_data(repo_path("tests/golden/qa/facts.jsonl")).has_turns);
    // Lines are drawn, not turns.
    for (uint64_t seed = 0; seed < 20; ++seed) {
        CHECK(draw_questions(data, 0, seed) == std::vector<size_t>{0, 4, 6});
        CHECK(draw_questions(data, 2, seed).size() == 2);
        for (const size_t q : draw_questions(data, 2, seed)) CHECK(data.questions[q].turn == 1);
    }
}

TEST_CASE("qa data: turns that are malformed are named by line and key") {
    const std::string good = "{\"text\": \"t\", \"question\": \"q\", \"answer\": \"a\"}\n";
    const auto second = [&](const std::string& rest) { return refusal(good + R"({"text": "t", )" + rest); };
    const std::string both =
        "q.json: line 2: expected \"question\" with its answers or \"turns\", found both ";
    CHECK(second(R"("turns": [], "question": "q"})") == both + "\"turns\" and \"question\"");
    CHECK(second(R"("turns": [], "answers": []})") == both + "\"turns\" and \"answers\"");
    CHECK(second(R"("turns": [], "answer": ""})") == both + "\"turns\" and \"answer\"");
    CHECK(second(R"("turns": []})") ==
          "q.json: line 2: key \"turns\": expected at least one turn, found an array of 0");
    CHECK(second(R"("turns": "q"})") == "q.json: line 2: key \"turns\": expected an array, found \"q\"");
    CHECK(second(R"("turns": null})") == "q.json: line 2: key \"turns\": expected an array, found null");
    CHECK(second(R"("turns": [{"question": "q", "answer": "a"}, 5]})") ==
          "q.json: line 2: key \"turns[1]\": expected an object, found 5");
    CHECK(second(R"("turns": [{"question": "q"}]})") ==
          "q.json: line 2: key \"turns[0]\": expected the key \"answers\" or \"answer\", found neither");
    CHECK(second(R"("turns": [{"answers": []}]})") ==
          "q.json: line 2: key \"turns[0]\": expected the key \"question\", found none");
    CHECK(second(R"("turns": [{"question": "q", "answers": [1]}]})") ==
          "q.json: line 2: key \"turns[0].answers[0]\": expected a string, found 1");
    CHECK(contains(refusal(R"({"turns": [{"question": "q", "answers": []}]})"),
                   "line 1: expected the key \"text\" or \"passage\", found neither"));
}

TEST_CASE("qa data: what is wrong in SQuAD is named by file and key") {
    CHECK(refusal("{}") == "q.json: expected the key \"data\", found none");
    CHECK(refusal(R"({"data": 3})") == "q.json: key \"data\": expected an array, found 3");
    CHECK(refusal(R"({"data": []})") == "q.json: expected at least one question, found none");
    CHECK(refusal(R"({"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": []}]}]})") ==
          "q.json: expected at least one question, found none");
    CHECK(refusal(R"({"data": [[]]})") == "q.json: key \"data[0]\": expected an object, found an array of 0");
    CHECK(refusal(R"({"data": [{"title": "T"}]})") ==
          "q.json: key \"data[0]\": expected the key \"paragraphs\", found none");
    CHECK(refusal(R"({"data": [{"title": 1, "paragraphs": []}]})") ==
          "q.json: key \"data[0].title\": expected a string, found 1");
    CHECK(refusal(R"({"data": [{"paragraphs": [{"qas": []}]}]})") ==
          "q.json: key \"data[0].paragraphs[0]\": expected the key \"context\", found none");
    CHECK(refusal(R"({"data": [{"paragraphs": [{"context": "c"}]}]})") ==
          "q.json: key \"data[0].paragraphs[0]\": expected the key \"qas\", found none");
    const std::string qa = "q.json: key \"data[0].paragraphs[1].qas[0]";
    CHECK(squad_refusal("7") == qa + "\": expected an object, found 7");
    CHECK(squad_refusal(R"({"answers": [{"text": "x"}]})") ==
          qa + "\": expected the key \"question\", found none");
    CHECK(squad_refusal(R"({"question": "q"})") == qa + "\": expected the key \"answers\", found none");
    CHECK(squad_refusal(R"({"question": "q", "answers": []})") ==
          qa + ".answers\": expected at least one answer where \"is_impossible\" is not true, found an array "
               "of 0");
    CHECK(squad_refusal(R"({"question": "q", "answers": [{"text": "x"}], "is_impossible": true})") ==
          qa + ".answers\": expected no answers where \"is_impossible\" is true, found an array of 1");
    CHECK(squad_refusal(R"({"question": "q", "answers": [], "is_impossible": 1})") ==
          qa + ".is_impossible\": expected true or false, found 1");
    CHECK(squad_refusal(R"({"question": "q", "answers": ["x"]})") ==
          qa + ".answers[0]\": expected an object, found \"x\"");
    CHECK(squad_refusal(R"({"question": "q", "answers": [{"text": 1842}]})") ==
          qa + ".answers[0].text\": expected a string, found 1842");
    CHECK(squad_refusal(R"({"question": "q", "answers": [{"text": "x", "answer_start": -1}]})") ==
          qa + ".answers[0].answer_start\": expected an integer >= 0, found -1");
    CHECK(squad_refusal(R"({"question": "q", "answers": [{"text": "x"}], "id": {}})") ==
          qa + ".id\": expected a string or an integer, found an object");
    CHECK(contains(refusal(squad("{}").substr(0, 60)), "q.json: not valid JSON at byte 61"));
}

TEST_CASE("qa data: what is wrong in JSON Lines is named by line") {
    const std::string good = "{\"text\": \"t\", \"question\": \"q\", \"answer\": \"a\"}\n\n";
    const auto second = [&](const std::string& line) { return refusal(good + line); };
    CHECK(contains(second("{\"text\": "), "q.json: line 3: not valid JSON"));
    CHECK(second("[1]") == "q.json: line 3: expected an object with \"question\", found an array of 1");
    CHECK(second(R"({"question": "q", "answer": "a"})") ==
          "q.json: line 3: expected the key \"text\" or \"passage\", found neither");
    CHECK(second(R"({"text": "t", "passage": "t", "question": "q", "answer": "a"})") ==
          "q.json: line 3: expected the key \"text\" or \"passage\", found both");
    CHECK(second(R"({"text": "t", "question": "q"})") ==
          "q.json: line 3: expected the key \"answers\" or \"answer\", found neither");
    CHECK(second(R"({"text": "t", "question": "q", "answers": "a"})") ==
          "q.json: line 3: key \"answers\": expected an array, found \"a\"");
    CHECK(second(R"({"text": "t", "question": "q", "answers": ["a", 2]})") ==
          "q.json: line 3: key \"answers[1]\": expected a string, found 2");
    CHECK(second(R"({"text": "t", "question": "q", "answer": null})") ==
          "q.json: line 3: key \"answer\": expected a string, found null");
    CHECK(second(R"({"text": "t", "answer": "a"})") ==
          "q.json: line 3: expected the key \"question\", found none");
    CHECK(second(R"({"text": "t", "title": [], "question": "q", "answer": "a"})") ==
          "q.json: line 3: key \"title\": expected a string, found an array of 0");
    CHECK(contains(second(R"({"text": "t", "text": "u"})"), "line 3: key \"text\" occurs twice"));
    CHECK(contains(second("{\"text\": \"\xFF\"}"), "line 3: not valid JSON"));
    CHECK(contains(second(std::string(100000, '[')), "line 3: expected at most 64 levels"));
}

TEST_CASE("qa data: neither form") {
    for (const char* nothing : {"", "\n \t\r\n", "\xEF\xBB\xBF"})
        CHECK(refusal(nothing) == "q.json: expected at least one question, found none");
    CHECK(refusal("id,question\n1,Why?") ==
          "q.json: expected SQuAD's JSON or JSON Lines of questions, which begin with \"{\"; found "
          "\"id,question\\x0a1,Why?\"");
    CHECK(contains(refusal("[{\"question\": \"q\"}]"), "which begin with \"{\""));
    CHECK(contains(refusal("{\"text\": \"t\n"), "not valid JSON"));
    const TempDir dir;
    CHECK(contains(error_of([&] { read_qa_data(dir.file("none")); }), dir.file("none")));
}

TEST_CASE("qa data: cut off or changed anywhere, a file is read or refused, never worse") {
    const std::string files[] = {read_file(repo_path("tests/golden/qa/squad.json"), 1 << 20),
                                 read_file(repo_path("tests/golden/qa/facts.jsonl"), 1 << 20),
                                 read_file(repo_path("tests/golden/qa/turns.jsonl"), 1 << 20)};
    for (const std::string& file : files) {
        size_t refused = 0;
        for (size_t end = 0; end < file.size(); ++end)
            refused += refusal(file.substr(0, end)) != "(no error)";
        // Only ends of lines, or white space at the end, leave a whole file.
        CHECK(refused + 12 > file.size());
        for (size_t at = 0; at < file.size(); ++at) {
            for (const char c : {'\0', '{', ']', '"', '\\', '\xFF'}) {
                std::string changed = file;
                changed[at] = c;
                const std::string message = refusal(changed);
                CHECK((message == "(no error)" || message.starts_with("q.json: ")));
            }
        }
    }
}

TEST_CASE("qa draw: questions are drawn evenly and in order") {
    const QaData data = articles(12);
    REQUIRE(data.questions.size() == 78);
    const std::vector<size_t> all = draw_questions(data, 0, 3);
    CHECK(all.size() == 78);
    CHECK(draw_questions(data, 1000, 3) == all);
    std::vector<int> times(78, 0);
    for (uint64_t seed = 0; seed < 400; ++seed) {
        const std::vector<size_t> some = draw_questions(data, 10, seed);
        REQUIRE(some.size() == 10);
        CHECK(std::is_sorted(some.begin(), some.end()));
        CHECK(std::adjacent_find(some.begin(), some.end()) == some.end());
        for (const size_t q : some) ++times[q];
    }
    CHECK(draw_questions(data, 10, 5) == draw_questions(data, 10, 5));
    CHECK(draw_questions(data, 10, 5) != draw_questions(data, 10, 6));
    // 400 draws with p = 10/78: mean 51, standard deviation 6.7; six of them on either side.
    CHECK(*std::min_element(times.begin(), times.end()) > 51 - 40);
    CHECK(*std::max_element(times.begin(), times.end()) < 51 + 40);
}

TEST_CASE("qa draw: distractors are of other articles, differ, and are a prefix of a longer draw") {
    const QaData data = articles(8);  // 36 passages
    for (size_t q = 0; q < data.questions.size(); ++q) {
        const size_t own = data.article[data.questions[q].passage];
        const size_t others = data.passages.size() - data.article_size(own);
        const std::vector<size_t> drawn = draw_distractors(data, q, others, 9);
        const std::set<size_t> different(drawn.begin(), drawn.end());
        CHECK(different.size() == others);
        for (const size_t passage : drawn) CHECK(data.article[passage] != own);
        for (const size_t n : {size_t{0}, size_t{1}, others / 2}) {
            const std::vector<size_t> fewer = draw_distractors(data, q, n, 9);
            CHECK(fewer ==
                  std::vector<size_t>(drawn.begin(), drawn.begin() + static_cast<std::ptrdiff_t>(n)));
        }
        CHECK(draw_distractors(data, q, others, 9) == drawn);
        const std::string message = error_of([&] { draw_distractors(data, q, others + 1, 9); });
        CHECK(contains(message, str("expected at most ", others, " ")));
        CHECK(contains(message, str("found ", others + 1)));
    }
    CHECK(draw_distractors(data, 0, 10, 1) != draw_distractors(data, 0, 10, 2));
    CHECK(draw_distractors(data, 0, 10, 1) != draw_distractors(data, 1, 10, 1));
    // Evenly: question 0 has 35 others; in 700 draws of 5 each is met 100 times, standard deviation 9.3.
    std::vector<int> times(data.passages.size(), 0);
    for (uint64_t seed = 0; seed < 700; ++seed) {
        for (const size_t passage : draw_distractors(data, 0, 5, seed)) ++times[passage];
    }
    CHECK(times[0] == 0);
    CHECK(*std::min_element(times.begin() + 1, times.end()) > 100 - 56);
    CHECK(*std::max_element(times.begin() + 1, times.end()) < 100 + 56);
}

TEST_CASE("qa draw: the gold passage is there once, at every place equally often") {
    const QaData data = articles(6);
    const size_t gold = data.questions[2].passage;
    std::vector<int> times(5, 0);
    for (uint64_t seed = 0; seed < 1000; ++seed) {
        const std::vector<size_t> drawn = draw_distractors(data, 2, 7, seed);
        const std::vector<size_t> passages = place_gold(data, 2, drawn, 4, seed);
        REQUIRE(passages.size() == 5);
        CHECK(std::count(passages.begin(), passages.end(), gold) == 1);
        ++times[static_cast<size_t>(std::find(passages.begin(), passages.end(), gold) - passages.begin())];
        std::vector<size_t> rest = passages;
        std::erase(rest, gold);
        CHECK(rest == std::vector<size_t>(drawn.begin(), drawn.begin() + 4));
        CHECK(place_gold(data, 2, drawn, 4, seed) == passages);
    }
    CHECK(place_gold(data, 2, {}, 0, 1) == std::vector<size_t>{gold});
    // Mean 200, standard deviation 12.6; six of them.
    for (const int n : times) CHECK(std::abs(n - 200) < 76);
}
