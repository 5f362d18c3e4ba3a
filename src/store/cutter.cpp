// See cutter.h.
#include "store/cutter.h"

#include <algorithm>
#include <array>

#include "io/lines.h"

namespace refrag {
namespace {

constexpr std::string_view kBlanks = " \t\r\n\v\f";

struct Paragraph {
    size_t begin = 0;
    size_t end = 0;
    int level = 0;  // of a heading, 1 to 6; 0: none
    std::string_view title;
};

// "## The Urvik ##" -> 2, "The Urvik"
int heading_level(std::string_view line, std::string_view& title) {
    size_t level = 0;
    while (level < line.size() && line[level] == '#') ++level;
    if (level == 0 || level > 6 || (level < line.size() && line[level] != ' ')) return 0;
    title = line.substr(level);
    const size_t first = title.find_first_not_of(" #");
    title = first == std::string_view::npos ? std::string_view() : title.substr(first);
    title = title.substr(0, title.find_last_not_of(" #\r") + 1);
    return static_cast<int>(level);
}

std::vector<Paragraph> paragraphs_of(std::string_view text, bool markdown) {
    std::vector<Paragraph> out;
    bool inside = false;
    bool fenced = false;  // within ``` or ~~~, where a # is no heading
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find('\n', at), text.size());
        const std::string_view line = text.substr(at, end - at);
        if (markdown && (line.starts_with("```") || line.starts_with("~~~"))) fenced = !fenced;
        std::string_view title;
        const int level = markdown && !fenced ? heading_level(line, title) : 0;
        if (is_blank(line)) {
            inside = inside && fenced;
        } else if (level > 0) {
            out.push_back({at, end, level, title});
            inside = false;
        } else if (inside) {
            out.back().end = end;
        } else {
            out.push_back({at, end, 0, {}});
            inside = true;
        }
        at = end + 1;
    }
    return out;
}

class Cutter {
  public:
    Cutter(std::string_view text, std::span<const Token> tokens, int64_t max_tokens)
        : text_(text), tokens_(tokens), max_tokens_(max_tokens) {}

    // Tokens that begin in the span.
    int64_t count(size_t begin, size_t end) const {
        return std::ssize(tokens_.subspan(token_at(begin))) - std::ssize(tokens_.subspan(token_at(end)));
    }
    bool fits(size_t begin, size_t end) const { return count(begin, end) <= max_tokens_; }

    // Where a piece that begins here ends: at most max_tokens further, at most at `end`, and after `begin`.
    size_t piece_end(size_t begin, size_t end) const {
        const size_t first = token_at(begin);
        const size_t last = first + static_cast<size_t>(max_tokens_);
        if (last >= tokens_.size() || tokens_[last].begin >= end) return end;
        const size_t most = tokens_[last].begin;
        // No piece is shorter than half of what it may be, or sentences of two words would be pieces.
        const size_t least = tokens_[first + static_cast<size_t>(max_tokens_) / 2].begin;
        if (const size_t at = sentence_end(least, most); at > begin) return at;
        const size_t blank = text_.substr(0, most).find_last_of(kBlanks);
        if (blank != std::string_view::npos && blank + 1 > least && blank + 1 > begin) return blank + 1;
        return character_start(most, begin);
    }

  private:
    size_t token_at(size_t byte) const {
        const auto at = std::lower_bound(tokens_.begin(), tokens_.end(), byte,
                                         [](const Token& token, size_t b) { return token.begin < b; });
        return static_cast<size_t>(at - tokens_.begin());
    }
    // After the last sentence that ends within (least, most]; 0 where none does.
    size_t sentence_end(size_t least, size_t most) const {
        for (size_t at = most; at > least; --at) {
            const std::string_view before = text_.substr(0, at);
            for (const std::string_view stop : {"\xe3\x80\x82", "\xef\xbc\x81", "\xef\xbc\x9f"})  // 。！？
                if (before.ends_with(stop)) return at;
            if (at < 2 || kBlanks.find(text_[at - 1]) == std::string_view::npos) continue;
            const std::string_view said = before.substr(0, before.find_last_not_of(kBlanks) + 1);
            if (!said.empty() && std::string_view(".!?:;").find(said.back()) != std::string_view::npos)
                return at;
        }
        return 0;
    }
    // No character is cut: back to where one begins.
    size_t character_start(size_t at, size_t begin) const {
        size_t start = at;
        while (start > begin && start < text_.size() &&
               (static_cast<unsigned char>(text_[start]) & 0xC0) == 0x80)
            --start;
        return start > begin ? start : at;
    }

    std::string_view text_;
    std::span<const Token> tokens_;
    int64_t max_tokens_;
};

std::string joined(const std::array<std::string, 7>& headings) {
    std::string out;
    for (const std::string& heading : headings) {
        if (heading.empty()) continue;
        if (!out.empty()) out += " - ";
        out += heading;
    }
    return out;
}

}  // namespace

std::vector<CutSpan> cut_document(std::string_view text, std::span<const Token> tokens, int64_t max_tokens,
                                  bool markdown) {
    std::vector<CutSpan> out;
    const Cutter cutter(text, tokens, max_tokens);
    if (!markdown && cutter.fits(0, text.size())) {
        if (!is_blank(text)) out.push_back({0, text.size(), ""});
        return out;
    }
    std::array<std::string, 7> headings;
    bool open = false;  // the last passage takes further paragraphs
    for (const Paragraph& paragraph : paragraphs_of(text, markdown)) {
        if (paragraph.level > 0) {
            headings[static_cast<size_t>(paragraph.level)] = std::string(paragraph.title);
            for (size_t i = static_cast<size_t>(paragraph.level) + 1; i < headings.size(); ++i)
                headings[i].clear();
            open = false;
            continue;
        }
        if (open && cutter.fits(out.back().begin, paragraph.end)) {
            out.back().end = paragraph.end;
            continue;
        }
        open = true;
        for (size_t begin = paragraph.begin; begin < paragraph.end;) {
            const size_t end = cutter.piece_end(begin, paragraph.end);
            size_t last = text.substr(0, end).find_last_not_of(kBlanks) + 1;
            if (last > begin) out.push_back({begin, last, joined(headings)});
            begin = end;
            while (begin < paragraph.end && kBlanks.find(text[begin]) != std::string_view::npos) ++begin;
        }
    }
    return out;
}

}  // namespace refrag
