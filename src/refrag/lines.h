// The lines of a text, for the files that come line by line.
#pragma once

#include <cstddef>
#include <string_view>

namespace refrag {

constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";

// Hands out a text's lines without their line ends (LF or CR LF), counting from 1.
class Lines {
  public:
    explicit Lines(std::string_view text) : rest_(text) {}
    bool next(std::string_view& line) {
        if (rest_.empty()) return false;
        const size_t end = rest_.find('\n');
        line = rest_.substr(0, end);
        rest_.remove_prefix(end == std::string_view::npos ? rest_.size() : end + 1);
        if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
        ++number_;
        return true;
    }
    size_t number() const { return number_; }

  private:
    std::string_view rest_;
    size_t number_ = 0;
};

inline bool is_blank(std::string_view line) {
    return line.find_first_not_of(" \t\r\v\f") == std::string_view::npos;
}

}  // namespace refrag
