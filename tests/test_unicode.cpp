// text/unicode: decoding of malformed UTF-8, positions in the original bytes, and the classes of all code
// points.
#include <doctest/doctest.h>

#include <fstream>
#include <sstream>

#include "support.h"
#include "text/byte_level.h"
#include "text/unicode.h"

using namespace refrag;
using namespace refrag_test;

TEST_CASE("unicode: one U+FFFD for each maximal invalid subpart") {
    const std::string r = "\xEF\xBF\xBD";
    const std::pair<std::string, std::string> cases[] = {
        {"", ""},
        {"abc", "abc"},
        {"\xC3\xA9", "\xC3\xA9"},
        {"\x80", r},
        {"\x80\xBF", r + r},
        {"\xC0\xAF", r + r},
        {"\xC3", r},
        {"\xC3(", r + "("},
        {"\xE2\x82", r},
        {"\xE2\x82(", r + "("},
        {"\xE2\x28\xA1", r + "(" + r},
        {"\xE0\x80\xAF", r + r + r},
        {"\xED\xA0\x80", r + r + r},  // a surrogate
        {"\xED\x9F\xBF", "\xED\x9F\xBF"},
        {"\xF0\x9F\x98", r},
        {"\xF0\x9F\x98\x82", "\xF0\x9F\x98\x82"},
        {"\xF0\x8F\xBF\xBF", r + r + r + r},
        {"\xF4\x8F\xBF\xBF", "\xF4\x8F\xBF\xBF"},
        {"\xF4\x90\x80\x80", r + r + r + r},  // above U+10FFFF
        {"\xF8\x88\x80\x80\x80", r + r + r + r + r},
        {"\xFF\xFE", r + r},
        {"\xF0\x9F\xE2\x82\xC3\xA9", r + r + "\xC3\xA9"},
        {"a\xF1\x80\x80\xE1\x80\xC2"
         "b\x80"
         "c\x80\xBF"
         "d",
         "a" + r + r + r + "b" + r + "c" + r + r + "d"},  // the standard's own example
    };
    for (const auto& one : cases) {
        const std::string& bytes = one.first;
        const std::string& expected = one.second;
        CAPTURE(printable(bytes));
        CHECK(replace_invalid_utf8(bytes) == expected);
        CHECK(is_valid_utf8(bytes) == (bytes == expected));
        CHECK(is_valid_utf8(expected));
    }
}

TEST_CASE("unicode: every code point survives encoding and decoding; nothing else is valid") {
    size_t wrong = 0;
    for (char32_t code = 0; code < 0x110000; ++code) {
        std::string bytes;
        append_utf8(bytes, code);
        const Utf8Step step = decode_utf8(bytes, 0);
        const bool surrogate = code >= 0xD800 && code < 0xE000;
        const bool right =
            surrogate ? !step.valid : step.valid && step.code == code && step.bytes == bytes.size();
        wrong += right ? 0 : 1;
    }
    CHECK(wrong == 0);
}

TEST_CASE("unicode: positions in the cleaned text lead back to the original bytes") {
    // ab, two runs of bad bytes (1 + 1, then 3 bytes as one), c, a bad byte, d
    const std::string original =
        "ab\x80\xFF\xF0\x9F\x98"
        "c\xC3"
        "d";
    const CleanText clean(original);
    REQUIRE(clean.text().size() == 2 + 6 + 3 + 1 + 3 + 1);
    const size_t expected[] = {0, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 7, 8, 9, 9, 9, 10};
    size_t rising = 0;
    for (size_t at = 0; at <= clean.text().size(); ++at) {
        CAPTURE(at);
        size_t fresh = 0;
        CHECK(clean.original_position(at, fresh) == expected[at]);
        CHECK(clean.original_position(at, rising) == expected[at]);
    }
    for (size_t at = clean.text().size() + 1; at-- > 0;)
        CHECK(clean.original_position(at, rising) == expected[at]);
}

TEST_CASE("unicode: classes of all code points are those of Hugging Face's regular expressions") {
    // Ranges made by weights_tools/make_golden_tokenizers.py. utf8proc's tables may differ from theirs where
    // a later Unicode version assigned code points; the difference would be listed here. It is empty.
    std::string classes(0x110000, '.');
    std::string words(0x110000, '.');
    std::ifstream file(repo_path("tests/golden/tokenizers/char_classes.txt"));
    REQUIRE(file.good());
    std::string line;
    while (std::getline(file, line)) {
        if (line.empty() || line[0] == '#') continue;
        std::istringstream fields(line);
        size_t first = 0;
        size_t last = 0;
        char cls = 0;
        fields >> std::hex >> first >> last >> cls;
        REQUIRE(fields);
        for (size_t code = first; code <= last; ++code) (cls == 'W' ? words : classes)[code] = cls;
    }
    std::string differing;
    for (char32_t code = 0; code < 0x110000; ++code) {
        if (code >= 0xD800 && code < 0xE000) continue;
        const char found = "LNS."[static_cast<size_t>(char_class(code))];
        if (found != classes[code] || is_word_char(code) != (words[code] == 'W'))
            differing += str(" U+", std::hex, static_cast<uint32_t>(code));
    }
    CHECK(differing == "");
}

TEST_CASE("unicode: the byte-level alphabet is one to one") {
    std::string all;
    for (int byte = 0; byte < 256; ++byte) {
        const char32_t code = byte_to_char(static_cast<uint8_t>(byte));
        CHECK(char_to_byte(code) == static_cast<uint8_t>(byte));
        append_utf8(all, code);
    }
    const std::string bytes = piece_to_bytes(all);
    REQUIRE(bytes.size() == 256);
    for (size_t i = 0; i < 256; ++i) CHECK(static_cast<unsigned char>(bytes[i]) == i);
    CHECK(byte_to_char(' ') == 0x120);
    CHECK(byte_to_char('\n') == 0x10A);
    CHECK_FALSE(char_to_byte(' ').has_value());
    CHECK_FALSE(char_to_byte(0x144).has_value());
    CHECK(piece_to_bytes("\xC4\xA0the") == " the");
    CHECK(piece_to_bytes("a b") == "a b");  // a space is outside the alphabet: its own bytes
}
