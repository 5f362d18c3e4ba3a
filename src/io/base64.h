// Base64 (RFC 4648, with padding): bytes within JSON.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace refrag {

std::string base64_encode(std::string_view bytes);
// None where the text is not what base64_encode gives for some bytes.
std::optional<std::string> base64_decode(std::string_view text);

}  // namespace refrag
