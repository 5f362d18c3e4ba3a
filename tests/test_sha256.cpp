// SHA-256 against the vectors of FIPS 180-4 and of NIST's validation program, and its two paths against each
// other at every length around a block and every way to divide the input.
#include <string>
#include <vector>

#include "base/sha256.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

std::vector<Sha256Path> paths() {
    std::vector<Sha256Path> list{Sha256Path::automatic, Sha256Path::plain};
    if (cpu_has_sha256()) list.push_back(Sha256Path::cpu_instructions);
    return list;
}

std::string hex_of(Sha256Path path, std::string_view text) {
    return Sha256(path).add(text).digest().hex();
}

}  // namespace

TEST_CASE("sha256: the standard's examples, on every path") {
    if (!cpu_has_sha256()) skip("this CPU has no SHA instructions: the plain path alone");
    for (const Sha256Path path : paths()) {
        CHECK(hex_of(path, "") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        CHECK(hex_of(path, "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        CHECK(hex_of(path, "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
        CHECK(
            hex_of(
                path,
                "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmn"
                "opqrsmnopqrstnopqrstu") ==
            "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
        CHECK(hex_of(path, std::string(1000000, 'a')) ==
              "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    }
}

TEST_CASE("sha256: both paths agree at every length, and however the input is divided") {
    std::string text;
    for (size_t n = 0; n < 400; ++n) {
        const Sha256Digest expected = Sha256(Sha256Path::plain).add(text).digest();
        for (const Sha256Path path : paths()) {
            CHECK(Sha256(path).add(text).digest() == expected);
            // In pieces of 1, 2, 3, ... bytes; a digest asked for in between changes nothing.
            Sha256 pieces(path);
            size_t at = 0;
            for (size_t piece = 1; at < n; at += piece, ++piece) {
                pieces.add(std::string_view(text).substr(at, piece));
                if (piece % 3 == 0) pieces.digest();
            }
            CHECK(pieces.digest() == expected);
        }
        text.push_back(static_cast<char>((n * 73 + 11) % 256));
    }
}

TEST_CASE("sha256: fields cannot run into each other") {
    const auto of = [](std::string_view a, std::string_view b) {
        return Sha256().add_field(a).add_field(b).digest();
    };
    CHECK(of("ab", "c") != of("a", "bc"));
    CHECK(of("", "abc") != of("abc", ""));
    CHECK(of("ab", "c") == sha256(std::string_view("\x02\0\0\0\0\0\0\0ab\x01\0\0\0\0\0\0\0c", 19)));
}
