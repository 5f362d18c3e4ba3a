// See base64.h.
#include "io/base64.h"

#include <array>
#include <cstdint>

namespace refrag {
namespace {

constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

constexpr std::array<int8_t, 256> kValues = [] {
    std::array<int8_t, 256> values{};
    values.fill(-1);
    for (size_t i = 0; i < kDigits.size(); ++i)
        values[static_cast<unsigned char>(kDigits[i])] = static_cast<int8_t>(i);
    return values;
}();

}  // namespace

std::string base64_encode(std::string_view bytes) {
    std::string out;
    out.reserve((bytes.size() + 2) / 3 * 4);
    for (size_t i = 0; i < bytes.size(); i += 3) {
        const size_t n = bytes.size() - i < 3 ? bytes.size() - i : 3;
        uint32_t word = 0;
        for (size_t b = 0; b < 3; ++b)
            word = word << 8 | (b < n ? static_cast<unsigned char>(bytes[i + b]) : 0u);
        for (size_t d = 0; d < 4; ++d) out += d <= n ? kDigits[word >> (18 - 6 * d) & 63] : '=';
    }
    return out;
}

std::optional<std::string> base64_decode(std::string_view text) {
    if (text.size() % 4 != 0) return std::nullopt;
    std::string out;
    out.reserve(text.size() / 4 * 3);
    for (size_t i = 0; i < text.size(); i += 4) {
        const bool last = i + 4 == text.size();
        size_t n = 3;
        if (last && text[i + 3] == '=') n = text[i + 2] == '=' ? 1 : 2;
        uint32_t word = 0;
        for (size_t d = 0; d < 4; ++d) {
            const int8_t value = d <= n ? kValues[static_cast<unsigned char>(text[i + d])] : int8_t{0};
            if (value < 0) return std::nullopt;
            word = word << 6 | static_cast<uint32_t>(value);
        }
        if (n < 3 && (word & ((1u << (8 * (3 - n))) - 1)) != 0) return std::nullopt;
        for (size_t b = 0; b < n; ++b) out += static_cast<char>(word >> (16 - 8 * b) & 255);
    }
    return out;
}

}  // namespace refrag
