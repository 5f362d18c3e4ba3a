// See stop.h. Text and stop strings are UTF-8, so agreement always begins and ends between characters and
// nothing of a character is ever held back alone.
#include "refrag/stop.h"

#include <algorithm>

#include "base/check.h"
#include "io/file.h"
#include "text/unicode.h"

namespace refrag {

void check_stop_strings(const std::vector<std::string>& stops) {
    REFRAG_CHECK(stops.size() <= max_stop_strings, Status::usage, "stop strings: expected at most ",
                 max_stop_strings, ", found ", stops.size());
    for (const std::string& stop : stops) {
        REFRAG_CHECK(!stop.empty() && stop.size() <= max_stop_bytes, Status::usage,
                     "stop string: expected 1 to ", max_stop_bytes, " bytes, found ", stop.size());
        REFRAG_CHECK(is_valid_utf8(stop), Status::usage, "stop string: expected UTF-8, found \"",
                     printable(stop), "\"");
    }
}

StopFilter::StopFilter(std::vector<std::string> stops) {
    check_stop_strings(stops);
    for (std::string& stop : stops) {
        Matcher matcher{std::move(stop), {}, 0};
        const std::string& text = matcher.text;
        matcher.border.assign(text.size(), 0);
        size_t border = 0;
        for (size_t i = 1; i < text.size(); ++i) {
            while (border > 0 && text[i] != text[border]) border = matcher.border[border - 1];
            if (text[i] == text[border]) ++border;
            matcher.border[i] = border;
        }
        matchers_.push_back(std::move(matcher));
    }
}

void StopFilter::push(std::string_view piece, std::string& out) {
    if (found_) return;
    for (const char byte : piece) {
        held_.push_back(byte);
        const Matcher* complete = nullptr;
        for (Matcher& m : matchers_) {
            while (m.matched > 0 && m.text[m.matched] != byte) m.matched = m.border[m.matched - 1];
            if (m.text[m.matched] == byte) ++m.matched;
            if (m.matched < m.text.size()) continue;
            if (complete == nullptr || m.text.size() > complete->text.size()) complete = &m;
        }
        if (complete != nullptr) {
            found_ = complete->text;
            out.append(held_, 0, held_.size() - complete->text.size());
            held_.clear();
            return;
        }
    }
    size_t open = 0;
    for (const Matcher& m : matchers_) open = std::max(open, m.matched);
    const size_t decided = held_.size() - open;
    out.append(held_, 0, decided);
    held_.erase(0, decided);
}

std::string StopFilter::flush() {
    for (Matcher& m : matchers_) m.matched = 0;
    return std::exchange(held_, {});
}

}  // namespace refrag
