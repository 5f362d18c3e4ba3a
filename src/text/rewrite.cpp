// See rewrite.h.
#include "text/rewrite.h"

#include <algorithm>

#include "text/unicode.h"

namespace refrag {

namespace {

void replace_all(std::string_view pattern, std::string_view content, size_t begin, size_t end,
                 TextEdit& edit) {
    const std::string_view text = edit.source().substr(0, end);
    // As Hugging Face aligns it: what is written belongs to the last character that it stands for.
    size_t last = pattern.size() - 1;
    while (last > 0 && (static_cast<unsigned char>(pattern[last]) & 0xC0) == 0x80) --last;
    size_t at = begin;
    while (at < end) {
        const size_t found = std::min(text.find(pattern, at), end);
        edit.keep(at, found);
        if (found == end) break;
        at = found + pattern.size();
        edit.replace(found, at, content, last);
    }
}

}  // namespace

void Rewrite::apply(size_t begin, size_t end, bool is_first, TextEdit& edit) const {
    const std::string_view stretch = edit.source().substr(begin, end - begin);
    switch (kind) {
        case Kind::normal_form:
            append_normal_form(form, begin, end, edit);
            break;
        case Kind::prepend:
            edit.replace(begin, begin, content);
            edit.keep(begin, end);
            break;
        case Kind::replace:
            replace_all(pattern, content, begin, end, edit);
            break;
        case Kind::strip: {
            const size_t left = strip_left ? white_space_after(stretch, 0) : 0;
            const size_t right =
                strip_right ? white_space_before(stretch, left, stretch.size()) : stretch.size();
            edit.keep(begin + left, begin + right);
            break;
        }
        case Kind::metaspace: {
            const bool has_one = stretch.starts_with(' ') || stretch.starts_with(content);
            const bool wants = scheme == Scheme::always || (scheme == Scheme::first && is_first);
            if (wants && !has_one) edit.replace(begin, begin, content);
            replace_all(" ", content, begin, end, edit);
            break;
        }
        case Kind::prefix_space:
            if (!stretch.starts_with(' ')) edit.replace(begin, begin, " ");
            edit.keep(begin, end);
            break;
    }
}

bool Rewrite::may_change(std::string_view text) const {
    switch (kind) {
        case Kind::normal_form: {
            // Characters below U+00A0 are their own normal form, in NFC those below U+0300.
            const unsigned lead = form == NormalForm::nfc ? 0xCC : 0xC2;
            const auto changes = [&](char c) { return static_cast<unsigned char>(c) >= lead; };
            return std::any_of(text.begin(), text.end(), changes);
        }
        case Kind::replace:
            return text.find(pattern) != std::string_view::npos;
        case Kind::metaspace:
            return scheme != Scheme::never || text.find(' ') != std::string_view::npos;
        case Kind::prepend:
        case Kind::strip:
        case Kind::prefix_space:
            break;
    }
    return true;
}

}  // namespace refrag
