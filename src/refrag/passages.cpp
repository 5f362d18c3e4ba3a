// The two forms of a passage file, line by line; JSON through io's wrapper, which is what makes hostile lines
// harmless.
#include "refrag/passages.h"

#include <algorithm>
#include <array>

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"

namespace refrag {

namespace {

constexpr std::string_view blanks = " \t\r\n\v\f";

std::vector<Passage> parse_json_lines(std::string_view content, const std::string& name,
                                      const BadLine& on_bad) {
    std::vector<Passage> passages;
    for_each_json_line(
        content, name,
        [&](const Json& line, size_t) { passages.push_back(passage_from_json(line, passages.size() + 1)); },
        on_bad);
    REFRAG_CHECK(!passages.empty(), Status::bad_input, name,
                 ": expected at least one passage, found none but bad lines");
    return passages;
}

std::vector<Passage> parse_plain_text(std::string_view content) {
    std::vector<Passage> passages;
    Lines lines(content);
    std::string_view line;
    bool inside = false;  // the last passage goes on
    while (lines.next(line)) {
        if (is_blank(line)) {
            inside = false;
            continue;
        }
        if (inside) {
            passages.back().text.append("\n").append(line);
        } else {
            passages.push_back({std::to_string(passages.size() + 1), "", std::string(line)});
            inside = true;
        }
    }
    return passages;
}

std::string_view trimmed(std::string_view text) {
    const size_t first = text.find_first_not_of(blanks);
    if (first == std::string_view::npos) return {};
    return text.substr(first, text.find_last_not_of(blanks) + 1 - first);
}

std::string ascii_lower(std::string_view text) {
    std::string lower(text);
    for (char& c : lower)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return lower;
}

// Do all words of a line between separators name columns of a collection of passages, "text" or the like
// among them?
bool is_header(std::string_view line, char separator) {
    static constexpr std::array<std::string_view, 6> texts = {"text",     "passage", "content",
                                                              "contents", "context", "body"};
    static constexpr std::array<std::string_view, 10> others = {
        "id", "_id", "pid", "docid", "doc_id", "passage_id", "title", "url", "source", "question"};
    bool has_text = false;
    size_t n = 0;
    for (size_t at = 0; at <= line.size(); ++n) {
        const size_t end = std::min(line.find(separator, at), line.size());
        std::string word = ascii_lower(trimmed(line.substr(at, end - at)));
        if (word.size() > 1 && word.front() == '"' && word.back() == '"')
            word = word.substr(1, word.size() - 2);
        const bool is_text = std::find(texts.begin(), texts.end(), word) != texts.end();
        if (!is_text && std::find(others.begin(), others.end(), word) == others.end()) return false;
        has_text = has_text || is_text;
        at = end + 1;
    }
    return has_text && n > 1;
}

// "17<tab>...", as collections of numbered passages are published.
bool is_numbered(std::string_view line) {
    const size_t digits = line.find_first_not_of("0123456789");
    return digits != std::string_view::npos && digits > 0 && line[digits] == '\t';
}

bool is_json_array(std::string_view text) {
    if (!text.starts_with('[') || !text.ends_with(']')) return false;
    if (trimmed(text.substr(1)).starts_with('{')) return true;
    try {
        Json::parse(text, "passages");
        return true;
    } catch (const Error&) {
        return false;  // "[1] A footnote [2]"
    }
}

// What a content that is no JSON Lines looks like where it is no plain text either; "" where it may be.
std::string_view foreign_passages(std::string_view content) {
    const std::string_view text = trimmed(content);
    for (const std::string_view bytes : {content, text})
        if (const std::string_view form = foreign_form(bytes); !form.empty()) return form;
    if (is_json_array(text)) return "a JSON array";
    const std::string begin = ascii_lower(text.substr(0, 14));
    if (begin.starts_with("<!doctype html") || begin.starts_with("<html")) return "an HTML page";
    if (begin.starts_with("<?xml")) return "an XML document";
    Lines lines(text);
    std::string_view first, second;
    lines.next(first);
    for (const auto& [separator, form] : {std::pair<char, std::string_view>{',', "a CSV table"},
                                          {';', "a CSV table"},
                                          {'\t', "a table with tabs between its columns (TSV)"}})
        if (is_header(first, separator)) return form;
    while (lines.next(second) && is_blank(second)) continue;
    if (is_numbered(first) && is_numbered(second)) return "numbered lines with tabs between columns (TSV)";
    return "";
}

}  // namespace

Passage passage_from_json(const Json& json, size_t number) {
    if (!json.is_object()) json.refuse("an object with \"text\"");
    Passage passage;
    passage.text = json.get_string("text");
    passage.title = json.get_string_or("title", "");
    const auto id = json.find_id();
    passage.id = id ? id_text(*id) : std::to_string(number);
    return passage;
}

std::vector<Passage> parse_passages(std::string_view content, const std::string& name,
                                    const BadLine& on_bad) {
    const std::string shown = printable(name);
    content = without_byte_order_mark(content);
    const size_t first = content.find_first_not_of(blanks);
    REFRAG_CHECK(first != std::string_view::npos, Status::bad_input, shown,
                 ": expected at least one passage, found none");
    if (content[first] == '{' && foreign_form(content.substr(first)).empty())
        return parse_json_lines(content, shown, on_bad);
    const std::string_view form = foreign_passages(content);
    REFRAG_CHECK(form.empty(), Status::bad_input, shown,
                 ": expected JSON Lines of {\"id\", \"title\", \"text\"} or plain text with blank lines "
                 "between passages, found what looks like ",
                 form);
    return parse_plain_text(content);
}

std::vector<Passage> read_passages(const std::string& path, const BadLine& on_bad) {
    return parse_passages(read_text(path), input_name(path), on_bad);
}

}  // namespace refrag
