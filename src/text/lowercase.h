// Lower case as Unicode's SpecialCasing defines it without regard to language, which is what Python's
// str.lower() gives: simple mappings, U+0130 in two characters, and the sigma that ends a word. Case folding
// is another matter, and so are the tokenizers' normalisers.
#pragma once

#include <string>
#include <string_view>

namespace refrag {

// Each maximal invalid subpart of the text becomes U+FFFD.
std::string lowercase(std::string_view text);

}  // namespace refrag
