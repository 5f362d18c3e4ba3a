// See documents.h.
#include "store/documents.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>

#include "base/check.h"
#include "base/utf8.h"
#include "io/file.h"
#include "io/json.h"
#include "text/unicode.h"

namespace refrag {
namespace {

enum class Form { json_lines, markdown, text };

std::string ending_of(const std::string& path) {
    std::string ending = std::filesystem::path(path).extension().string();
    for (char& c : ending)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return ending;
}

std::optional<Form> form_by_name(const std::string& path) {
    const std::string ending = ending_of(path);
    if (ending == ".jsonl" || ending == ".ndjson") return Form::json_lines;
    if (ending == ".md" || ending == ".markdown") return Form::markdown;
    if (ending == ".txt" || ending == ".text") return Form::text;
    return std::nullopt;
}

void write_value(JsonWriter& writer, const Json& value) {
    switch (value.kind()) {
        case Json::Kind::null:
            writer.null();
            break;
        case Json::Kind::boolean:
            writer.boolean(value.as_bool());
            break;
        case Json::Kind::integer:
            writer.integer(value.as_int());
            break;
        case Json::Kind::number:
            writer.number(value.as_number());
            break;
        case Json::Kind::string:
            writer.string(value.as_string());
            break;
        case Json::Kind::array:
            writer.begin_array();
            for (size_t i = 0; i < value.size(); ++i) write_value(writer, value.at(i));
            writer.end_array();
            break;
        case Json::Kind::object:
            writer.begin_object();
            for (size_t i = 0; i < value.size(); ++i) {
                writer.key(value.key_at(i));
                write_value(writer, value.at(i));
            }
            writer.end_object();
            break;
    }
}

// Malformed bytes become U+FFFD: a store holds UTF-8.
std::string as_utf8(std::string text) {
    if (is_valid_utf8(text)) return text;
    std::string out;
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = decode_utf8(text, at);
        append_utf8(out, step.code);
        at += step.bytes;
    }
    return out;
}

// "metadata", and what stands beside the keys that are known.
std::string metadata_of(const Json& line) {
    constexpr std::array<std::string_view, 5> known = {"id", "title", "text", "metadata", "embedding"};
    JsonWriter writer;
    writer.begin_object();
    const std::optional<Json> own = line.find("metadata");
    if (own) {
        own->as_object();
        for (size_t i = 0; i < own->size(); ++i) {
            writer.key(own->key_at(i));
            write_value(writer, own->at(i));
        }
    }
    for (size_t i = 0; i < line.size(); ++i) {
        const std::string_view key = line.key_at(i);
        const Json value = line.at(i);
        const bool plain = value.is_string() || value.is_number() || value.is_bool();
        if (!plain || std::find(known.begin(), known.end(), key) != known.end()) continue;
        if (own && own->has(key)) continue;
        writer.key(key);
        write_value(writer, value);
    }
    writer.end_object();
    return writer.text();
}

std::vector<float> embedding_of(const Json& line) {
    std::vector<float> values;
    const std::optional<Json> array = line.find("embedding");
    if (!array) return values;
    double squares = 0.0;
    for (size_t i = 0; i < array->as_array().size(); ++i) {
        values.push_back(static_cast<float>(array->at(i).as_number(-1e18, 1e18)));
        squares += static_cast<double>(values.back()) * static_cast<double>(values.back());
    }
    if (values.empty() || squares == 0.0) array->refuse("numbers, not all of them 0");
    return values;
}

// number: of the line, for documents without an id.
SourceDocument from_json(const Json& line, const std::string& source, size_t number) {
    if (!line.is_object()) line.refuse("an object with \"text\"");
    SourceDocument document;
    document.text = line.get_string("text");
    document.title = line.get_string_or("title", "");
    const auto id = line.find_id();
    document.id = id ? id_text(*id) : str(source.empty() ? "stdin" : source, ":", number);
    if (document.id.empty()) line.get("id").refuse("an id that is not empty");
    document.source = source;
    document.metadata = metadata_of(line);
    document.embedding = embedding_of(line);
    return document;
}

void read_json_lines(LineStream& lines, const std::string& source, const UseDocument& use,
                     const BadLine& on_bad, const std::function<void(uint64_t)>& progress) {
    std::string_view line;
    while (lines.next(line)) {
        if (is_blank(line)) continue;
        SourceDocument document;
        try {
            const Json json = Json::parse(line, str(lines.name(), ": line ", lines.number()));
            document = from_json(json, source, lines.number());
        } catch (const Error& error) {
            if (!on_bad || error.status() != Status::bad_input) throw;
            on_bad(error);
            continue;
        }
        if (!use(std::move(document))) return;
        if (progress) progress(lines.bytes_read());
    }
}

}  // namespace

void read_documents(const std::string& path, const UseDocument& use, const BadLine& on_bad,
                    const std::function<void(uint64_t bytes)>& progress) {
    LineStream lines(path);
    const std::string source = path == "-" ? "" : path;
    std::optional<Form> form = form_by_name(path);
    const std::string_view head = lines.peek();
    const size_t first = head.find_first_not_of(" \t\r\n");
    if (!form || path == "-")
        form = first != std::string_view::npos && head[first] == '{' ? Form::json_lines : Form::text;
    REFRAG_CHECK(path != "-" || form == Form::json_lines || first == std::string_view::npos,
                 Status::bad_input,
                 "standard input: expected JSON Lines of {\"id\", \"title\", \"text\"}, found another text");
    if (form == Form::json_lines) {
        read_json_lines(lines, source, use, on_bad, progress);
        return;
    }
    if (path == "-") return;
    SourceDocument document;
    document.text = as_utf8(read_text(path));
    document.id = path;
    document.source = path;
    document.title = std::filesystem::path(path).stem().string();
    document.markdown = form == Form::markdown;
    const uint64_t bytes = document.text.size();
    use(std::move(document));
    if (progress) progress(bytes);
}

std::vector<std::string> document_files(const std::vector<std::string>& paths) {
    namespace fs = std::filesystem;
    std::vector<std::string> files;
    for (const std::string& path : paths) {
        if (path == "-" || !is_directory(path)) {
            std::error_code error;
            REFRAG_CHECK(path == "-" || fs::exists(path, error), Status::bad_input, printable(path),
                         ": expected a file or a directory, found no such path");
            files.push_back(path);
            continue;
        }
        std::vector<std::string> found;
        std::error_code error;
        auto at =
            fs::recursive_directory_iterator(path, fs::directory_options::skip_permission_denied, error);
        REFRAG_CHECK(!error, Status::bad_input, printable(path), ": cannot be read (", error.message(), ")");
        for (; at != fs::recursive_directory_iterator(); at.increment(error)) {
            REFRAG_CHECK(!error, Status::runtime, printable(path), ": cannot be read (", error.message(),
                         ")");
            const bool hidden = at->path().filename().string().starts_with('.');
            if (hidden && at->is_directory(error)) at.disable_recursion_pending();
            if (!hidden && at->is_regular_file(error) && form_by_name(at->path().string()))
                found.push_back(at->path().string());
        }
        std::sort(found.begin(), found.end());
        files.insert(files.end(), found.begin(), found.end());
    }
    return files;
}

}  // namespace refrag
