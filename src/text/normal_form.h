// Unicode normalisation of one stretch of text, with the way back to the source. The data is utf8proc's, but
// the Unicode version is that of Hugging Face `tokenizers`, which still is 9.0: a character that came later
// neither decomposes, nor composes, nor changes places.
#pragma once

#include <cstddef>

#include "text/position_map.h"

namespace refrag {

enum class NormalForm { nfc, nfd, nfkc, nfkd };

// Appends the normal form of edit.source()[begin, end), which must be valid UTF-8. Near-linear time.
void append_normal_form(NormalForm form, size_t begin, size_t end, TextEdit& edit);

}  // namespace refrag
