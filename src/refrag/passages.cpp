// The two forms of a passage file, line by line; JSON through io's wrapper, which is what makes hostile lines
// harmless.
#include "refrag/passages.h"

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"
#include "refrag/lines.h"

namespace refrag {

namespace {

Passage parse_json_line(std::string_view line, const std::string& where, size_t number) {
    REFRAG_CHECK(line.size() <= max_passage_line_bytes, Status::bad_input, where, ": expected at most ",
                 max_passage_line_bytes, " bytes on one line, found ", line.size());
    return passage_from_json(Json::parse(line, where), number);
}

std::vector<Passage> parse_json_lines(std::string_view content, const std::string& name) {
    std::vector<Passage> passages;
    Lines lines(content);
    std::string_view line;
    while (lines.next(line))
        if (!is_blank(line))
            passages.push_back(
                parse_json_line(line, str(name, ": line ", lines.number()), passages.size() + 1));
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

}  // namespace

Passage passage_from_json(const Json& json, size_t number) {
    if (!json.is_object()) json.refuse("an object with \"text\"");
    Passage passage;
    passage.text = json.get_string("text");
    passage.title = json.get_string_or("title", "");
    passage.id = std::to_string(number);
    if (const auto id = json.find("id")) {
        if (id->is_string())
            passage.id = id->as_string();
        else if (id->is_int())
            passage.id = std::to_string(id->as_int());
        else
            id->refuse("a string or an integer");
    }
    return passage;
}

std::vector<Passage> parse_passages(std::string_view content, const std::string& name) {
    const std::string shown = printable(name);
    if (content.starts_with(byte_order_mark)) content.remove_prefix(byte_order_mark.size());
    const size_t first = content.find_first_not_of(" \t\r\n\v\f");
    REFRAG_CHECK(first != std::string_view::npos, Status::bad_input, shown,
                 ": expected at least one passage, found none");
    return content[first] == '{' ? parse_json_lines(content, shown) : parse_plain_text(content);
}

std::vector<Passage> read_passages(const std::string& path) {
    return parse_passages(read_file(path, max_passages_bytes), path);
}

}  // namespace refrag
