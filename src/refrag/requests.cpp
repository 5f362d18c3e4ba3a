// See requests.h.
#include "refrag/requests.h"

#include <map>

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"

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
    request.id = json.find_id().value_or(static_cast<int64_t>(number));
    if (json.find("passages")) request.passages = parse_passage_list(json.get_array("passages"));
    return request;
}

}  // namespace

std::vector<BatchRequest> parse_requests(std::string_view content, const std::string& name) {
    const std::string shown = printable(name);
    std::vector<BatchRequest> requests;
    std::map<JsonId, size_t> lines;  // where each id stands
    for_each_json_line(content, shown, [&](const Json& line, size_t number) {
        BatchRequest request = parse_request(line, requests.size() + 1);
        request.line = number;
        const auto [first, is_new] = lines.emplace(request.id, number);
        if (!is_new) {
            fail(Status::bad_input, line.where(), ": expected an id of its own, found ",
                 printable(id_text(request.id), 60), line.find_id() ? "" : " (its number, since it has none)",
                 ", which line ", first->second, " has too");
        }
        requests.push_back(std::move(request));
    });
    REFRAG_CHECK(!requests.empty(), Status::bad_input, shown, ": expected at least one request, found none");
    return requests;
}

}  // namespace refrag
