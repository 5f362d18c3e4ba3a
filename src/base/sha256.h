// SHA-256 (FIPS 180-4), incremental. What is kept is named by it: weights, passages, chunks, so that equal
// names mean equal bytes. The CPU's own instructions are used where it has them, else plain code; both give
// the same digest.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace refrag {

struct Sha256Digest {
    std::array<uint8_t, 32> bytes{};
    auto operator<=>(const Sha256Digest&) const = default;
    std::string hex() const;  // 64 digits, small letters
    std::string_view view() const { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }
};

// For hash tables: the digest is its own hash.
struct Sha256DigestHash {
    size_t operator()(const Sha256Digest& digest) const noexcept;
};

// How blocks are worked on. `automatic`: the CPU's instructions where it has them.
enum class Sha256Path { automatic, plain, cpu_instructions };

class Sha256 {
  public:
    // cpu_instructions: only where cpu_has_sha256().
    explicit Sha256(Sha256Path path = Sha256Path::automatic);

    Sha256& add(const void* data, size_t bytes);
    Sha256& add(std::string_view text) { return add(text.data(), text.size()); }
    // Its length as 8 bytes, little end first, then its bytes: what follows a field cannot be taken for a
    // part of it.
    Sha256& add_field(std::string_view field);

    // Of all that was added so far; more may be added afterwards.
    Sha256Digest digest() const;

  private:
    using Blocks = void (*)(std::array<uint32_t, 8>& state, const uint8_t* blocks, size_t n_blocks);
    Blocks blocks_;
    std::array<uint32_t, 8> state_;
    std::array<uint8_t, 64> pending_{};  // bytes of a block that is not whole yet
    uint64_t n_bytes_ = 0;
};

Sha256Digest sha256(std::string_view text);

// Whether this CPU has the SHA extensions of x86-64.
bool cpu_has_sha256() noexcept;

}  // namespace refrag
