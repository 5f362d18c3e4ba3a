// Any bytes as a request file (`run --batch`) and as a question file (`eval qa`). What is accepted: at least
// one request or question, valid UTF-8 throughout, and a question file's indices fit together.
#include <variant>

#include "base/check.h"
#include "eval/qa_data.h"
#include "main.h"
#include "refrag/requests.h"
#include "text/unicode.h"

namespace refrag_fuzz {
namespace {

using refrag::is_valid_utf8;

void check_requests(const std::vector<refrag::BatchRequest>& requests) {
    promise(!requests.empty(), "there is a request");
    size_t line = 0;
    for (const refrag::BatchRequest& request : requests) {
        promise(request.line > line, "requests come in the order of their lines");
        line = request.line;
        promise(is_valid_utf8(request.question), "a question is valid UTF-8");
        if (const auto* id = std::get_if<std::string>(&request.id))
            promise(is_valid_utf8(*id), "an id is, too");
        if (!request.passages) continue;
        for (const refrag::Passage& passage : *request.passages)
            promise(is_valid_utf8(passage.id) && is_valid_utf8(passage.content()), "passages are, too");
    }
}

void check_questions(const refrag::QaData& data) {
    promise(!data.questions.empty(), "there is a question");
    const size_t n = data.passages.size();
    promise(data.article.size() == n && data.by_article.size() == n, "every passage has its article");
    promise(!data.article_first.empty() && data.article_first.front() == 0 && data.article_first.back() == n,
            "articles tile the passages");
    for (size_t a = 0; a + 1 < data.article_first.size(); ++a) {
        promise(data.article_first[a] <= data.article_first[a + 1], "articles come in order");
        for (size_t i = data.article_first[a]; i < data.article_first[a + 1]; ++i)
            promise(data.by_article[i] < n && data.article[data.by_article[i]] == a,
                    "both tables say the same article");
    }
    size_t turn = 0;
    for (const refrag::QaQuestion& question : data.questions) {
        promise(question.turn == 1 || (data.has_turns && question.turn == turn + 1),
                "turns follow each other");
        turn = question.turn;
        promise(question.passage < n, "a question has its passage");
        promise(is_valid_utf8(question.id) && is_valid_utf8(question.question), "a question is valid UTF-8");
        for (const std::string& answer : question.answers)
            promise(is_valid_utf8(answer), "an answer is, too");
    }
}

}  // namespace

void fuzz_requests(std::string_view input) {
    refused([&] { check_requests(refrag::parse_requests(input, "requests")); });
    refused([&] { check_questions(refrag::parse_qa_data(input, "questions")); });
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_requests)
