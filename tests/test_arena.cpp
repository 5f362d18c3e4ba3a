// The arena: what it holds after any passes, that memory stays in place within a scope, that a steady state
// takes nothing, and that a failed allocation changes nothing.
#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "base/arena.h"
#include "base/check.h"

using refrag::Arena;
using refrag::ArenaScope;

namespace {

constexpr size_t kMiB = size_t{1} << 20;

// Host memory that is counted; the allocation number `fails` is refused.
class Counting : public refrag::MemorySource {
  public:
    void* allocate(size_t bytes) override {
        REFRAG_CHECK(++asked != fails, refrag::Status::out_of_memory, "no ", bytes, " bytes");
        void* const data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        held.insert(data);
        return data;
    }
    void release(void* data) noexcept override {
        held.erase(data);
        std::free(data);
    }
    std::set<void*> held;
    int64_t asked = 0;
    int64_t fails = 0;
};

// Bytes written over a piece of memory, to be found there again.
struct Piece {
    unsigned char* data;
    size_t bytes;
    unsigned char value;

    Piece(Arena& arena, size_t n, unsigned char v)
        : data(static_cast<unsigned char*>(arena.allocate(n))), bytes(n), value(v) {
        std::memset(data, value, bytes);
    }
    bool whole() const {
        for (size_t i = 0; i < bytes; ++i) {
            if (data[i] != value) return false;
        }
        return true;
    }
};

}  // namespace

TEST_CASE("arena: a conversation that grows by 64 rows a turn holds what its largest pass needs") {
    Counting source;
    Arena arena(source);
    for (int64_t rows = 64; rows <= 64 * 60; rows += 64) {
        {
            // A decoder's pass, dim 256 and hidden_dim 1024: large and small tensors, a scope within.
            const ArenaScope pass(arena);
            arena.tensor(rows, 256);
            {
                const ArenaScope scratch(arena);
                for (const int64_t cols : {256, 256, 64, 64, 256, 256, 1024, 1024, 64})
                    arena.tensor(rows, cols);
            }
            arena.tensor(1, 32000);
        }
        const size_t floats = static_cast<size_t>(rows) * (2 * 256 + 256 + 64 + 64 + 2 * 256 + 2 * 1024);
        CHECK(arena.peak_bytes() >= floats * 4);
        CHECK(arena.held_bytes() * 4 <= std::max(kMiB * 4, arena.peak_bytes() * 5));
    }
    CHECK(source.held.size() <= 1);
}

TEST_CASE(
    "arena: after any passes it holds at most 1.25 times what the largest took; memory stays in place") {
    std::mt19937 random(7);
    const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
    for (int round = 0; round < 20; ++round) {
        Counting source;
        Arena arena(source);
        for (int pass = 0; pass < 40; ++pass) {
            unsigned char value = 0;
            std::vector<Piece> pieces;
            const auto take = [&](const auto& self, int depth) -> void {
                const ArenaScope scope(arena);
                const size_t before = pieces.size();
                for (uint32_t i = below(8); i > 0; --i) {
                    const uint32_t most = below(5) == 0 ? 1u << 20 : 1u << 14;
                    pieces.emplace_back(arena, below(most << (pass % 3)), ++value);
                    if (depth < 3 && below(3) == 0) self(self, depth + 1);
                }
                for (const Piece& piece : pieces) REQUIRE(piece.whole());
                pieces.erase(pieces.begin() + static_cast<std::ptrdiff_t>(before), pieces.end());
            };
            take(take, 0);
            REQUIRE(arena.held_bytes() * 4 <= std::max(kMiB * 4, arena.peak_bytes() * 5));
        }
        CHECK(arena.peak_bytes() > kMiB);
    }
}

TEST_CASE("arena: passes no larger than one before take no memory") {
    Counting source;
    Arena arena(source);
    const auto pass = [&](size_t most) {
        const ArenaScope scope(arena);
        for (size_t bytes = most; bytes > 1000; bytes /= 2) arena.allocate(bytes);
    };
    for (int i = 0; i < 2; ++i) pass(4 * kMiB);
    const int64_t asked = source.asked;
    for (const size_t most : {4 * kMiB, kMiB, 3 * kMiB, 4 * kMiB}) pass(most);
    CHECK(source.asked == asked);
}

TEST_CASE("arena: what is taken outside of scopes stays where it is") {
    Counting source;
    Arena arena(source);
    const Piece first(arena, 100, 1);
    for (size_t bytes = kMiB; bytes <= 8 * kMiB; bytes += kMiB) {
        const ArenaScope scope(arena);
        arena.allocate(bytes / 2);
        arena.allocate(bytes);
        std::memset(arena.allocate(bytes), 9, bytes);
    }
    const Piece second(arena, 2 * kMiB, 2);
    {
        const ArenaScope scope(arena);
        std::memset(arena.allocate(12 * kMiB), 9, 12 * kMiB);
    }
    CHECK(first.whole());
    CHECK(second.whole());
}

TEST_CASE("arena: a failed allocation leaves what was taken, and the next pass is right") {
    for (int64_t fails = 1; fails <= 6; ++fails) {
        Counting source;
        Arena arena(source);
        source.fails = fails;
        for (int pass = 0; pass < 4; ++pass) {
            const ArenaScope scope(arena);
            std::vector<Piece> pieces;
            try {
                for (const size_t bytes : {kMiB / 2, kMiB, 3 * kMiB}) {
                    pieces.emplace_back(arena, bytes << pass, static_cast<unsigned char>(pieces.size() + 1));
                }
            } catch (const refrag::Error& error) {
                CHECK(error.status() == refrag::Status::out_of_memory);
            }
            for (const Piece& piece : pieces) CHECK(piece.whole());
        }
        CHECK(arena.held_bytes() * 4 <= std::max(kMiB * 4, arena.peak_bytes() * 5));
    }
}
