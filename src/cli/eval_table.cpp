// See eval_table.h.
#include "cli/eval_table.h"

#include <cstdio>

#include "base/check.h"
#include "io/json.h"

namespace refrag {

void check_table_format(const std::string& format) {
    REFRAG_CHECK(format == "md" || format == "json" || format == "csv", Status::usage,
                 "-o: expected md, json or csv; found \"", format, "\"");
}

ResultTable& ResultTable::begin_row() {
    REFRAG_DCHECK(rows_.empty() || rows_.back().size() == columns_.size());
    rows_.emplace_back();
    return *this;
}

ResultTable& ResultTable::text(const std::optional<std::string>& value) {
    Cell& cell = rows_.back().emplace_back();
    if (value) cell.value = *value;
    return *this;
}

ResultTable& ResultTable::integer(std::optional<int64_t> value) {
    Cell& cell = rows_.back().emplace_back();
    if (value) cell.value = *value;
    return *this;
}

ResultTable& ResultTable::boolean(bool value) {
    rows_.back().emplace_back().value = value;
    return *this;
}

ResultTable& ResultTable::number(std::optional<double> value, std::optional<int> digits) {
    Cell& cell = rows_.back().emplace_back();
    if (value) cell.value = *value;
    cell.digits = digits;
    return *this;
}

std::string ResultTable::shown(const Cell& cell, const char* absent, bool rounded) {
    if (const auto* text = std::get_if<std::string>(&cell.value)) return *text;
    if (const auto* integer = std::get_if<int64_t>(&cell.value)) return str(*integer);
    if (const auto* boolean = std::get_if<bool>(&cell.value)) return *boolean ? "true" : "false";
    const auto* number = std::get_if<double>(&cell.value);
    if (number == nullptr) return absent;
    if (!rounded || !cell.digits) return JsonWriter().number(*number).text();
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", *cell.digits, *number);
    return text;
}

std::string ResultTable::write(const std::string& format) const {
    check_table_format(format);
    if (format != "json") return write_lines(format == "md");
    JsonWriter json(1);
    write_json(json);
    return json.text() + "\n";
}

void ResultTable::write_json(JsonWriter& json) const {
    json.begin_array();
    for (const auto& row : rows_) {
        json.begin_object();
        for (size_t i = 0; i < row.size(); ++i) {
            json.key(columns_[i]);
            if (const auto* text = std::get_if<std::string>(&row[i].value)) {
                json.string(*text);
            } else if (const auto* integer = std::get_if<int64_t>(&row[i].value)) {
                json.integer(*integer);
            } else if (const auto* number = std::get_if<double>(&row[i].value)) {
                json.number(*number);
            } else if (const auto* boolean = std::get_if<bool>(&row[i].value)) {
                json.boolean(*boolean);
            } else {
                json.null();
            }
        }
        json.end_object();
    }
    json.end_array();
}

// No cell holds a comma, a quote or a bar: they are numbers and words of ours.
std::string ResultTable::write_lines(bool markdown) const {
    std::string out;
    const auto line = [&](const std::vector<std::string>& values) {
        for (size_t i = 0; i < values.size(); ++i)
            out += str(i == 0 ? (markdown ? "| " : "") : (markdown ? " | " : ","), values[i]);
        out += markdown ? " |\n" : "\n";
    };
    line(columns_);
    if (markdown) {
        for (size_t i = 0; i < columns_.size(); ++i) out += "|---";
        out += "|\n";
    }
    for (const auto& row : rows_) {
        std::vector<std::string> values;
        values.reserve(row.size());
        for (const Cell& cell : row) values.push_back(shown(cell, markdown ? "-" : "", markdown));
        line(values);
    }
    return out;
}

}  // namespace refrag
