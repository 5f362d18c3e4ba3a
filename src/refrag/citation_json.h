// Citations in the form of Cohere's chat API: offsets in characters, sources with their documents.
#pragma once

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "io/json.h"
#include "refrag/citations.h"

namespace refrag {

// A document as it is shown beside a citation.
struct CitedDocument {
    std::string id;
    std::vector<std::pair<std::string, std::string>> fields;  // title, text, ...
};

// {"start", "end", "text", "sources": [{"type": "document", "id", "document": {"id", ...}}]}. The object
// stays open. `documents` are those of the request's passage segments, in order.
void write_citation(JsonWriter& json, const Citation& citation, std::string_view answer,
                    std::span<const CitedDocument> documents);
// A list of them, closed.
void write_citations(JsonWriter& json, std::span<const Citation> citations, std::string_view answer,
                     std::span<const CitedDocument> documents);

}  // namespace refrag
