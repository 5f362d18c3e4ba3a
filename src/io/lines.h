// Text that a user gives in a file: one reader for all of it. A byte order mark at the start is no part of
// the text; a line ends with LF or CR LF; a blank line in a file of lines says nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "base/check.h"
#include "io/json.h"

namespace refrag {

constexpr uint64_t max_text_bytes = 1ull << 30;      // a whole file
constexpr size_t max_json_line_bytes = 64ull << 20;  // one line of JSON Lines

// The text without the byte order marks at its start: one, or several where marked files were joined.
std::string_view without_byte_order_mark(std::string_view text);

// What the bytes look like where they are no text in ASCII or UTF-8 ("gzip-compressed data", "UTF-16"); ""
// where nothing speaks against it.
std::string_view foreign_form(std::string_view bytes);

// The text of a file, a pipe or ("-") standard input, without its byte order mark. Refuses what foreign_form
// knows, naming it. Any other bytes are let be.
std::string read_text(const std::string& path, uint64_t max_bytes = max_text_bytes);

// Hands out a text's lines without their line ends, counting from 1.
class Lines {
  public:
    explicit Lines(std::string_view text) : rest_(without_byte_order_mark(text)) {}
    bool next(std::string_view& line);
    size_t number() const { return number_; }

  private:
    std::string_view rest_;
    size_t number_ = 0;
};

// White space alone.
bool is_blank(std::string_view line);

// Takes the refusal of one line, which is then left out.
using BadLine = std::function<void(const Error&)>;

// JSON Lines: `use` takes the value of every line that is not blank, and the line's number. `name` begins the
// messages, followed by ": line N". Where `on_bad` is given, what is refused on a line goes to it and reading
// goes on. Throws Error(bad_input).
void for_each_json_line(std::string_view text, const std::string& name,
                        const std::function<void(const Json& value, size_t number)>& use,
                        const BadLine& on_bad = {});

}  // namespace refrag
