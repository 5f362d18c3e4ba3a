// Passage files: what `--passages FILE` reads. Two forms, told apart by the first character that is not white
// space: `{` means JSON Lines of {"id", "title", "text"}, anything else plain text with blank lines between
// passages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "io/lines.h"

namespace refrag {

// One retrieved passage.
struct Passage {
    std::string id;     // as in the file, or the passage's number counted from 1
    std::string title;  // may be empty
    std::string text;

    // What is tokenised: title, newline, text; the text alone where there is no title.
    std::string content() const { return title.empty() ? text : title + "\n" + text; }
};

class Json;

// Reads a passage file, a pipe, or ("-") standard input. Throws Error(bad_input) naming file and line; a file
// without a passage is an error.
std::vector<Passage> read_passages(const std::string& path, const BadLine& on_bad = {});

// The same from memory; `name` begins the messages.
// JSON Lines: one object a line, blank lines skipped; "text" is a string and must be there; "title" is a
// string, absent or null; "id" is a string or a whole number, absent or null. Other keys are let be. Where
// `on_bad` is given, a line that is refused goes to it and the others are read. Plain text:
// passages are runs of lines that are not blank; their bytes are kept as they are (CR LF becomes LF), invalid
// UTF-8 included. A byte order mark at the start is skipped. What looks like another form (a JSON array, CSV,
// HTML, compressed data) is refused by its name.
std::vector<Passage> parse_passages(std::string_view content, const std::string& name,
                                    const BadLine& on_bad = {});

// One passage from {"id", "title", "text"}, as on a line of JSON; `number` is its id where it has none.
Passage passage_from_json(const Json& json, size_t number);

}  // namespace refrag
