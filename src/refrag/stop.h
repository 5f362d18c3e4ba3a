// Stop strings: text ends before the first of them. Text comes in pieces with any borders, and the outcome is
// that of reading it byte by byte. The string that is complete first ends the text; where two end at the same
// byte, the longer one does. Knows nothing of tokens.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace refrag {

constexpr size_t max_stop_strings = 64;
constexpr size_t max_stop_bytes = 4096;  // of one

// Status::usage for more than max_stop_strings, or one that is empty, too long or not UTF-8.
void check_stop_strings(const std::vector<std::string>& stops);

class StopFilter {
  public:
    // Throws as check_stop_strings does.
    explicit StopFilter(std::vector<std::string> stops);

    // Takes the next piece (whole characters) and returns what is now known to belong to the text: everything
    // but the longest end that may yet become a stop string. After a stop: "".
    std::string push(std::string_view piece) {
        std::string out;
        push(piece, out);
        return out;
    }
    // The same, appended.
    void push(std::string_view piece, std::string& out);
    // The text ends without a stop: what was held back. Afterwards the filter is at its start.
    std::string flush();

    // Which stop string was found.
    const std::optional<std::string>& found() const { return found_; }

  private:
    // A stop string and how far the text's end agrees with its beginning (Knuth, Morris, Pratt).
    struct Matcher {
        std::string text;
        std::vector<size_t> border;  // [i]: longest proper border of the first i + 1 bytes
        size_t matched = 0;
    };
    std::vector<Matcher> matchers_;
    std::string held_;
    std::optional<std::string> found_;
};

}  // namespace refrag
