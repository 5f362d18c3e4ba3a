// See lines.h.
#include "io/lines.h"

#include <algorithm>
#include <utility>

#include "io/file.h"

namespace refrag {
namespace {

constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";

// How files that are no text begin.
constexpr std::pair<std::string_view, std::string_view> signatures[] = {
    {"\x1F\x8B", "gzip-compressed data"},
    {"\x28\xB5\x2F\xFD", "zstd-compressed data"},
    {std::string_view("\xFD\x37zXZ\0", 6), "xz-compressed data"},
    {"BZh9", "bzip2-compressed data"},
    {"PK\x03\x04", "a zip archive (as .docx and .xlsx are)"},
    {"%PDF-", "a PDF document"},
    {"{\\rtf", "an RTF document"},
    {"PAR1", "a Parquet file"},
    {"ARROW1", "an Arrow file"},
    {"\x89HDF", "an HDF5 file"},
    {std::string_view("SQLite format 3\0", 16), "an SQLite database"},
    {"GGUF", "a GGUF file"},
    {std::string_view("\xFF\xFE\0\0", 4), "UTF-32"},
    {std::string_view("\0\0\xFE\xFF", 4), "UTF-32"},
    {"\xFF\xFE", "UTF-16"},
    {"\xFE\xFF", "UTF-16"},
};

// Is all of it, over several lines, one JSON value?
bool is_one_document(std::string_view text, const std::string& name) {
    try {
        Json::parse(text, name);
        return true;
    } catch (const Error&) {
        return false;
    }
}

}  // namespace

std::string_view without_byte_order_mark(std::string_view text) {
    while (text.starts_with(byte_order_mark)) text.remove_prefix(byte_order_mark.size());
    return text;
}

std::string_view foreign_form(std::string_view bytes) {
    for (const auto& [begin, form] : signatures)
        if (bytes.starts_with(begin)) return form;
    // ASCII in two bytes a character, as its first two characters show.
    const auto zero = [&](size_t i) { return bytes[i] == '\0'; };
    const bool sixteen = bytes.size() >= 4 && zero(0) != zero(1) && zero(0) == zero(2) && zero(1) == zero(3);
    return sixteen ? "UTF-16 without a byte order mark" : "";
}

std::string read_text(const std::string& path, uint64_t max_bytes) {
    std::string text = read_input(path, max_bytes);
    const std::string_view form = foreign_form(text);
    REFRAG_CHECK(form.empty(), Status::bad_input, printable(input_name(path)),
                 ": expected text in UTF-8, found what looks like ", form);
    const size_t mark = text.size() - without_byte_order_mark(text).size();
    text.erase(0, mark);
    return text;
}

bool Lines::next(std::string_view& line) {
    if (rest_.empty()) return false;
    const size_t end = rest_.find('\n');
    line = rest_.substr(0, end);
    rest_.remove_prefix(end == std::string_view::npos ? rest_.size() : end + 1);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    ++number_;
    return true;
}

bool is_blank(std::string_view line) {
    return line.find_first_not_of(" \t\r\n\v\f") == std::string_view::npos;
}

void for_each_json_line(std::string_view text, const std::string& name,
                        const std::function<void(const Json& value, size_t number)>& use,
                        const BadLine& on_bad) {
    const std::string shown = printable(name);
    Lines lines(text);
    std::string_view line;
    bool is_first = true;
    while (lines.next(line)) {
        if (is_blank(line)) continue;
        const std::string where = str(shown, ": line ", lines.number());
        try {
            REFRAG_CHECK(line.size() <= max_json_line_bytes, Status::bad_input, where, ": expected at most ",
                         max_json_line_bytes, " bytes on one line, found ", line.size());
            use(Json::parse(line, where), lines.number());
        } catch (const Error& error) {
            if (error.status() != Status::bad_input) throw;
            const char last = line[line.find_last_not_of(" \t\r\v\f")];
            const bool goes_on = is_first && (last == '{' || last == '[' || last == ',');
            REFRAG_CHECK(!goes_on || !is_one_document(text, shown), Status::bad_input, shown,
                         ": expected JSON Lines, one value on each line, found one JSON document over "
                         "several lines");
            if (!on_bad) throw;
            on_bad(error);
        }
        is_first = false;
    }
}

}  // namespace refrag
