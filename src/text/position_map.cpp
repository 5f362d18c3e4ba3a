// See position_map.h.
#include "text/position_map.h"

#include <algorithm>

namespace refrag {

void PositionMap::add(size_t at, size_t source, size_t count, size_t new_bytes, size_t source_bytes,
                      size_t begin) {
    if (!edits_.empty()) {
        Edit& last = edits_.back();
        if (last.new_bytes == new_bytes && last.source_bytes == source_bytes && last.begin == begin &&
            new_bytes > 0 && last.at + last.count * new_bytes == at &&
            last.source + last.count * source_bytes == source) {
            last.count += count;
            return;
        }
    }
    edits_.push_back({at, source, count, static_cast<uint32_t>(new_bytes),
                      static_cast<uint32_t>(source_bytes), static_cast<uint32_t>(begin)});
}

size_t PositionMap::position_in(const Edit& edit, size_t at, bool whole) const {
    const size_t into = at - edit.at;
    const size_t which = edit.new_bytes == 0 ? edit.count : std::min(into / edit.new_bytes, edit.count);
    const size_t unit = edit.source + which * edit.source_bytes;
    const size_t rest = into - which * edit.new_bytes;
    if (which == edit.count) return unit + rest;
    return whole ? unit + edit.begin : unit + std::min<size_t>(rest, edit.source_bytes);
}

size_t PositionMap::source_position(size_t at, size_t& hint) const {
    // hint: the number of edits that begin before the position.
    while (hint < edits_.size() && edits_[hint].at < at) ++hint;
    while (hint > 0 && edits_[hint - 1].at >= at) --hint;
    return hint == 0 ? at : position_in(edits_[hint - 1], at, false);
}

size_t PositionMap::source_begin(size_t at) const {
    const auto after = std::upper_bound(edits_.begin(), edits_.end(), at,
                                        [](size_t position, const Edit& edit) { return position < edit.at; });
    return after == edits_.begin() ? at : position_in(*(after - 1), at, true);
}

void TextEdit::keep(size_t begin, size_t end) {
    if (begin == end) return;
    if (begin != next_) map_.add(text_.size(), next_, begin - next_, 0, 1);
    text_.append(source_.substr(begin, end - begin));
    next_ = end;
}

void TextEdit::replace(size_t begin, size_t end, std::string_view text, size_t into) {
    if (begin != next_) map_.add(text_.size(), next_, begin - next_, 0, 1);
    if (begin != end || !text.empty()) map_.add(text_.size(), begin, 1, text.size(), end - begin, into);
    text_.append(text);
    next_ = end;
}

}  // namespace refrag
