// Where documents come from: JSON Lines of {"id", "title", "text", "metadata", "embedding"}, plain text and
// Markdown files, directories of them. One document at a time, so that a collection need not fit into memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "io/line_stream.h"
#include "io/lines.h"

namespace refrag {

struct SourceDocument {
    std::string id;
    std::string source;  // the file as it was named; "" for standard input
    std::string title;
    std::string text;
    std::string metadata = "{}";  // a JSON object
    bool markdown = false;
    std::vector<float> embedding;  // the user's own; empty: none
};

// Takes a document; returns whether to go on.
using UseDocument = std::function<bool(SourceDocument&&)>;

// The documents of a file in their order. By its name's ending, and where that says nothing by its first
// character: JSON Lines (.jsonl, .ndjson, or "{"), Markdown (.md, .markdown), text (a document a file).
// JSON Lines: "text" must be there; "id" defaults to FILE:LINE; keys other than those above that hold
// numbers, texts or truth values are metadata too. "-" is standard input, JSON Lines alone. Where `on_bad`
// is given, a line that is refused goes to it and reading goes on. progress: bytes read so far.
void read_documents(const std::string& path, const UseDocument& use, const BadLine& on_bad = {},
                    const std::function<void(uint64_t bytes)>& progress = {});

// The files that a list of files and directories means, in the order of their names: in directories those
// with the endings above, and .txt; what begins with a dot is left out. Status::bad_input for a path that is
// not there.
std::vector<std::string> document_files(const std::vector<std::string>& paths);

}  // namespace refrag
