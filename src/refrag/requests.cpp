// See requests.h.
#include "refrag/requests.h"

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"
#include "refrag/lines.h"

namespace refrag {
namespace {

std::vector<Passage> parse_passage_list(const Json& list) {
    std::vector<Passage> passages;
    for (size_t i = 0; i < list.size(); ++i) {
        const Json element = list.at(i);
        if (element.is_string()) {
            passages.push_back({std::to_string(i + 1), "", std::string(element.as_string())});
        } else if (element.is_object()) {
            passages.push_back(passage_from_json(element, i + 1));
        } else {
            element.refuse("a string, or an object with \"text\"");
        }
    }
    return passages;
}

BatchRequest parse_request(const Json& json, size_t number) {
    if (!json.is_object()) json.refuse("an object with \"question\"");
    json.check_keys({"id", "question", "passages"});
    BatchRequest request;
    request.question = json.get_string("question");
    request.id = static_cast<int64_t>(number);
    if (const auto id = json.find("id")) {
        if (id->is_string())
            request.id = std::string(id->as_string());
        else if (id->is_int())
            request.id = id->as_int();
        else
            id->refuse("a string or an integer");
    }
    if (json.find("passages")) request.passages = parse_passage_list(json.get_array("passages"));
    return request;
}

}  // namespace

std::vector<BatchRequest> parse_requests(std::string_view content, const std::string& name) {
    const std::string shown = printable(name);
    if (content.starts_with(byte_order_mark)) content.remove_prefix(byte_order_mark.size());
    std::vector<BatchRequest> requests;
    Lines lines(content);
    std::string_view line;
    while (lines.next(line)) {
        if (is_blank(line)) continue;
        const std::string where = str(shown, ": line ", lines.number());
        REFRAG_CHECK(line.size() <= max_request_line_bytes, Status::bad_input, where, ": expected at most ",
                     max_request_line_bytes, " bytes on one line, found ", line.size());
        requests.push_back(parse_request(Json::parse(line, where), requests.size() + 1));
        requests.back().line = lines.number();
    }
    REFRAG_CHECK(!requests.empty(), Status::bad_input, shown, ": expected at least one request, found none");
    return requests;
}

}  // namespace refrag
