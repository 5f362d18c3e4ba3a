// See qa_data.h.
#include "eval/qa_data.h"

#include <functional>
#include <unordered_map>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"
#include "io/lines.h"

namespace refrag {
namespace {

constexpr std::string_view kBlanks = " \t\r\n\v\f";

// Gathers passages and questions and gives articles their numbers.
class Builder {
  public:
    size_t article_of(const std::string& title) {
        if (title.empty()) return n_articles_++;
        const auto [at, is_new] = articles_.emplace(title, n_articles_);
        if (is_new) ++n_articles_;
        return at->second;
    }

    size_t add_passage(std::string title, std::string text, size_t article) {
        data_.passages.push_back({str(data_.passages.size() + 1), std::move(title), std::move(text)});
        data_.article.push_back(article);
        return data_.passages.size() - 1;
    }

    // The passage with this title and text, made when it is new.
    size_t passage_of(std::string title, std::string text) {
        const std::hash<std::string_view> hash;
        const size_t key = hash(title) * 31 + hash(text);
        const auto [first, end] = passages_.equal_range(key);
        for (auto at = first; at != end; ++at) {
            const Passage& passage = data_.passages[at->second];
            if (passage.title == title && passage.text == text) return at->second;
        }
        const size_t article = article_of(title);
        const size_t passage = add_passage(std::move(title), std::move(text), article);
        passages_.emplace(key, passage);
        return passage;
    }

    // A line, or a question of SQuAD: its id and the passage of the questions that follow.
    void begin_item(const Json& json, size_t passage) {
        ++n_items_;
        const auto id = json.find_id();
        item_.id = id ? id_text(*id) : str(n_items_);
        item_.passage = passage;
        item_.turn = 0;
    }

    void add_question(const Json& json, std::vector<std::string> answers) {
        ++item_.turn;
        QaQuestion question = item_;
        question.question = json.get_string("question");
        question.answers = std::move(answers);
        data_.questions.push_back(std::move(question));
    }

    void has_turns() { data_.has_turns = true; }

    QaData finish(const std::string& name) {
        REFRAG_CHECK(!data_.questions.empty(), Status::bad_input, name,
                     ": expected at least one question, found none");
        // A counting sort of the passages by article.
        data_.article_first.assign(n_articles_ + 1, 0);
        for (const size_t article : data_.article) ++data_.article_first[article + 1];
        for (size_t i = 0; i < n_articles_; ++i) data_.article_first[i + 1] += data_.article_first[i];
        data_.by_article.resize(data_.passages.size());
        std::vector<size_t> next(data_.article_first.begin(), data_.article_first.end() - 1);
        for (size_t i = 0; i < data_.passages.size(); ++i) data_.by_article[next[data_.article[i]]++] = i;
        return std::move(data_);
    }

  private:
    QaData data_;
    QaQuestion item_;  // what its questions share, and the last one's turn
    size_t n_items_ = 0;
    size_t n_articles_ = 0;
    std::unordered_map<std::string, size_t> articles_;
    std::unordered_multimap<size_t, size_t> passages_;  // by a hash of title and text
};

std::vector<std::string> squad_answers(const Json& qa) {
    const Json list = qa.get_array("answers");
    const bool impossible = qa.get_bool_or("is_impossible", false);
    if (impossible && list.size() != 0) list.refuse("no answers where \"is_impossible\" is true");
    if (!impossible && list.size() == 0)
        list.refuse("at least one answer where \"is_impossible\" is not true");
    std::vector<std::string> answers;
    for (size_t i = 0; i < list.size(); ++i) {
        const Json answer = list.at(i);
        answers.push_back(answer.get_string("text"));
        answer.get_int_or("answer_start", 0, 0);
    }
    return answers;
}

QaData parse_squad(const Json& root) {
    Builder builder;
    const Json articles = root.get_array("data");
    for (size_t a = 0; a < articles.size(); ++a) {
        const Json article = articles.at(a);
        const std::string title = article.get_string_or("title", "");
        const size_t number = builder.article_of(title);
        const Json paragraphs = article.get_array("paragraphs");
        for (size_t p = 0; p < paragraphs.size(); ++p) {
            const Json paragraph = paragraphs.at(p);
            const size_t passage = builder.add_passage(title, paragraph.get_string("context"), number);
            const Json qas = paragraph.get_array("qas");
            for (size_t q = 0; q < qas.size(); ++q) {
                const Json qa = qas.at(q);
                builder.begin_item(qa, passage);
                builder.add_question(qa, squad_answers(qa));
            }
        }
    }
    return builder.finish(root.name());
}

// The one of two keys that is there.
Json one_of(const Json& line, std::string_view first, std::string_view second) {
    const bool both = line.has(first) && line.has(second);
    if (both || !(line.has(first) || line.has(second))) {
        fail(Status::bad_input, line.where(), ": expected the key \"", first, "\" or \"", second,
             "\", found ", both ? "both" : "neither");
    }
    return line.get(line.has(first) ? first : second);
}

std::vector<std::string> line_answers(const Json& line) {
    const Json value = one_of(line, "answers", "answer");
    std::vector<std::string> answers;
    if (line.has("answer")) {
        answers.emplace_back(value.as_string());
    } else {
        for (size_t i = 0; i < value.as_array().size(); ++i) answers.emplace_back(value.at(i).as_string());
    }
    return answers;
}

void parse_line(const Json& line, Builder& builder) {
    if (!line.is_object()) line.refuse("an object with \"question\"");
    std::string text(one_of(line, "text", "passage").as_string());
    const size_t passage = builder.passage_of(line.get_string_or("title", ""), std::move(text));
    builder.begin_item(line, passage);
    if (!line.has("turns")) {
        builder.add_question(line, line_answers(line));
        return;
    }
    for (const char* key : {"question", "answers", "answer"}) {
        REFRAG_CHECK(!line.has(key), Status::bad_input, line.where(),
                     ": expected \"question\" with its answers or \"turns\", found both \"turns\" and \"",
                     key, "\"");
    }
    const Json turns = line.get_array("turns");
    if (turns.size() == 0) turns.refuse("at least one turn");
    for (size_t i = 0; i < turns.size(); ++i) {
        const Json turn = turns.at(i);
        builder.add_question(turn, line_answers(turn.as_object()));
    }
    builder.has_turns();
}

// Does the text, which is not blank, hold one bracketed value that ends with it? Strings are stepped over;
// what kind of value it is, and whether it is well formed, is the parser's business.
bool closes(std::string_view text) {
    int64_t depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (in_string) {
            if (c == '\\') ++i;
            if (c == '"') in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            ++depth;
        } else if (c == '}' || c == ']') {
            --depth;
        }
    }
    return depth == 0 && !in_string;
}

QaData parse_lines(std::string_view content, const std::string& name) {
    Builder builder;
    for_each_json_line(content, name, [&](const Json& line, size_t) { parse_line(line, builder); });
    return builder.finish(name);
}

}  // namespace

QaData parse_qa_data(std::string_view content, const std::string& name) {
    const std::string shown = printable(name);
    content = without_byte_order_mark(content);
    const size_t first = content.find_first_not_of(kBlanks);
    REFRAG_CHECK(first != std::string_view::npos, Status::bad_input, shown,
                 ": expected at least one question, found none");
    REFRAG_CHECK(content[first] == '{', Status::bad_input, shown,
                 ": expected SQuAD's JSON or JSON Lines of questions, which begin with \"{\"; found \"",
                 printable(content.substr(first, 20)), "\"");
    // A first line that is a whole value, with others after it, is JSON Lines. All else is one document, and
    // its keys tell which.
    const size_t line_end = content.find('\n', first);
    const bool more = line_end != std::string_view::npos &&
                      content.find_first_not_of(kBlanks, line_end) != std::string_view::npos;
    if (more && closes(content.substr(first, line_end - first))) return parse_lines(content, shown);
    const Json root = Json::parse(content, shown);
    const bool is_line = root.has("question") || root.has("turns");
    return is_line && !root.has("data") ? parse_lines(content, shown) : parse_squad(root);
}

QaData read_qa_data(const std::string& path) {
    return parse_qa_data(read_text(path, max_qa_bytes), input_name(path));
}

}  // namespace refrag
