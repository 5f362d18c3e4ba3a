// Request files: what `run --batch FILE` reads, JSON Lines of {"id", "question", "passages"}.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "refrag/passages.h"

namespace refrag {

struct BatchRequest {
    size_t line = 0;  // of the file, counted from 1
    JsonId id;        // as in the file, or the request's number counted from 1
    std::string question;
    std::optional<std::vector<Passage>> passages;  // none: those that all such requests share
};

// Parses a whole file; `name` begins the messages. Throws Error(bad_input) naming file and line; a file
// without a request is an error.
// One object a line, blank lines skipped. "question" is a string and must be there; "id" is a string or a
// whole number, absent or null, and no two requests have the same; "passages" is an array of strings or
// objects as in a passage file (parse_passages), absent or null. Any other key is refused. A byte order mark
// at the start is skipped.
std::vector<BatchRequest> parse_requests(std::string_view content, const std::string& name);

}  // namespace refrag
