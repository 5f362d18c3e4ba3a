// The general category of a code point, as utf8proc has it. Not for headers: utf8proc stays inside src/text.
#pragma once

#include <utf8proc.h>

namespace refrag {

inline utf8proc_category_t category(char32_t code) {
    return utf8proc_category(static_cast<utf8proc_int32_t>(code));
}

}  // namespace refrag
