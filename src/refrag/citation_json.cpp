// See citation_json.h.
#include "refrag/citation_json.h"

namespace refrag {

void write_citation(JsonWriter& json, const Citation& citation, std::string_view answer,
                    std::span<const CitedDocument> documents) {
    const auto [start, end] = in_characters(answer, citation.begin, citation.end);
    json.begin_object().key("start").integer(static_cast<int64_t>(start));
    json.key("end").integer(static_cast<int64_t>(end));
    json.key("text").string(answer.substr(citation.begin, citation.end - citation.begin));
    json.key("sources").begin_array();
    for (const size_t i : citation.passages) {
        json.begin_object().key("type").string("document").key("id").string(documents[i].id);
        json.key("document").begin_object().key("id").string(documents[i].id);
        for (const auto& [name, value] : documents[i].fields) json.key(name).string(value);
        json.end_object().end_object();
    }
    json.end_array();
}

void write_citations(JsonWriter& json, std::span<const Citation> citations, std::string_view answer,
                     std::span<const CitedDocument> documents) {
    json.begin_array();
    for (const Citation& citation : citations) {
        write_citation(json, citation, answer, documents);
        json.end_object();
    }
    json.end_array();
}

}  // namespace refrag
