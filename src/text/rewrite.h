// The steps of normalizers and pre-tokenizers that change text, one stretch of plain text at a time.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "text/normal_form.h"
#include "text/position_map.h"

namespace refrag {

struct Rewrite {
    enum class Kind {
        normal_form,   // `form`
        prepend,       // `content` before every stretch
        replace,       // every `pattern` becomes `content`
        strip,         // white space off the ends
        metaspace,     // ' ' becomes `content`; one more before the stretch, by `scheme`
        prefix_space,  // ' ' before a stretch that does not begin with one
    };
    enum class Scheme { always, first, never };

    Kind kind = Kind::normal_form;
    NormalForm form = NormalForm::nfc;
    std::string pattern = "";  // not empty
    std::string content = "";
    Scheme scheme = Scheme::always;  // first: only where the stretch begins where the original text does
    bool strip_left = false;
    bool strip_right = false;

    // Appends the new form of edit.source()[begin, end), which is not empty. `is_first`: the stretch begins
    // with the original text.
    void apply(size_t begin, size_t end, bool is_first, TextEdit& edit) const;
    // False where apply would keep every stretch of this text as it is; may be true without need.
    bool may_change(std::string_view text) const;
};

}  // namespace refrag
