// Where the bytes of a rewritten text came from. A rewriting is a list of edits with unchanged text between
// them. An edit is a run of equal units: n bytes of the new text that stand for m bytes of the source. So
// text that is changed in few places, or in many places alike, costs little. Positions count bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace refrag {

// Filled from the front to the back, then immutable.
class PositionMap {
  public:
    // From position `at` of the new text on, `count` units follow, each of new_bytes standing for
    // source_bytes; after them both texts run side by side again. new_bytes may be 0 (something was left
    // out), source_bytes too (something was put in).
    // `begin`: the byte of each unit where what was written counts as beginning (source_begin).
    void add(size_t at, size_t source, size_t count, size_t new_bytes, size_t source_bytes, size_t begin = 0);
    bool identity() const { return edits_.empty(); }

    // The source position of a boundary in the new text. Positions inside a unit of m source bytes fall on
    // its first m bytes, then on its end; at a place where text was left out, before it. `hint` (start with
    // 0) makes a walk linear.
    size_t source_position(size_t at, size_t& hint) const;
    // Where the source of the character at `at` counts as beginning: its unit's first byte, or `begin`.
    size_t source_begin(size_t at) const;

  private:
    struct Edit {
        size_t at;
        size_t source;
        size_t count;
        uint32_t new_bytes;
        uint32_t source_bytes;
        uint32_t begin;
    };
    size_t position_in(const Edit& edit, size_t at, bool whole) const;
    std::vector<Edit> edits_;
};

// Builds a new text from pieces of a source, and the map back.
class TextEdit {
  public:
    explicit TextEdit(std::string_view source) : source_(source) {}

    // Appends source[begin, end) as it is.
    void keep(size_t begin, size_t end);
    // Appends `text` in place of source[begin, end), as one unit that counts as beginning `into` bytes later.
    void replace(size_t begin, size_t end, std::string_view text, size_t into = 0);

    std::string_view source() const { return source_; }
    std::string& text() { return text_; }
    const PositionMap& map() const { return map_; }

  private:
    std::string_view source_;
    std::string text_;
    PositionMap map_;
    size_t next_ = 0;  // where the source goes on if nothing else is said
};

}  // namespace refrag
