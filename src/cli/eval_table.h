// The rows of a measurement as a Markdown table, JSON or CSV: every `refrag eval` command
// prints one, and so does `refrag bench`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace refrag {

class JsonWriter;

// Status::usage unless the word is md, json or csv.
void check_table_format(const std::string& format);

class ResultTable {
  public:
    // Columns are the keys of the JSON objects.
    explicit ResultTable(std::vector<std::string> columns) : columns_(std::move(columns)) {}

    // A row's cells, one for each column from the left; an absent value is null in JSON, "-" in Markdown and
    // nothing in CSV.
    ResultTable& begin_row();
    ResultTable& text(const std::optional<std::string>& value);
    ResultTable& integer(std::optional<int64_t> value);
    ResultTable& boolean(bool value);
    // digits: after the point in Markdown; the fewest that read back as the same value where it is not given,
    // and in JSON and CSV always.
    ResultTable& number(std::optional<double> value, std::optional<int> digits = {});

    // The whole table, ending in a line feed.
    std::string write(const std::string& format) const;
    // The array of rows, for a document that holds more than it.
    void write_json(JsonWriter& json) const;

  private:
    struct Cell {
        std::variant<std::monostate, std::string, int64_t, double, bool> value;  // monostate: absent
        std::optional<int> digits;
    };
    // As in JSON, or with `rounded` as in Markdown; `absent` stands for null.
    static std::string shown(const Cell& cell, const char* absent, bool rounded);
    std::string write_lines(bool markdown) const;

    std::vector<std::string> columns_;
    std::vector<std::vector<Cell>> rows_;
};

}  // namespace refrag
