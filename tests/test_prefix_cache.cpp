// Prefixes that are kept: what is found again, what is not, who holds which pages, what is given up first.
#include <algorithm>
#include <map>
#include <random>

#include "failing.h"
#include "golden.h"
#include "refrag/prefix_cache.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr int64_t kBlocks = 8;

KvCache make_cache() {
    return KvCache(cpu(), 4, 1, 2, 2, 256, DType::f32, kBlocks);
}

std::vector<RowName> tokens(int32_t begin, int32_t end) {
    std::vector<RowName> rows;
    for (int32_t id = begin; id < end; ++id) rows.push_back(token_row_name(id));
    return rows;
}

// As if a decoder had read the rows.
void hold(KvCache& kv, int32_t slot, size_t n) {
    const auto more = static_cast<int32_t>(n) - kv.length(slot);
    kv.reserve(slot, more);
    kv.advance(slot, more);
}

// A request's life: its prefix is restored, the rest read, all of it kept, the slot emptied. Returns the rows
// restored.
int32_t serve(KvCache& kv, PrefixCache& kept, const std::vector<RowName>& rows) {
    const int32_t restored = kept.restore(0, rows);
    kept.make_room(KvCache::blocks_for(std::ssize(rows)) - restored / kPageEntries);
    hold(kv, 0, rows.size());
    kept.keep(0, rows);
    kv.truncate(0, 0);
    return restored;
}

}  // namespace

TEST_CASE("prefix cache: whole blocks that are equal row for row are found, the last row never") {
    KvCache kv = make_cache();
    PrefixCache kept(kv);
    CHECK(serve(kv, kept, tokens(0, 70)) == 0);
    CHECK(kept.n_blocks() == 2);  // 64 of 70 rows
    CHECK(kept.n_idle() == 2);
    CHECK(kv.free_blocks() == kBlocks - 2);
    CHECK(serve(kv, kept, tokens(0, 70)) == 64);
    CHECK(serve(kv, kept, tokens(0, 65)) == 64);
    CHECK(serve(kv, kept, tokens(0, 64)) == 32);  // its last row must be read
    CHECK(serve(kv, kept, tokens(0, 33)) == 32);
    CHECK(serve(kv, kept, tokens(0, 32)) == 0);
    CHECK(serve(kv, kept, tokens(1, 71)) == 0);
    std::vector<RowName> other = tokens(0, 70);
    other[40] = token_row_name(7);
    CHECK(serve(kv, kept, other) == 32);
    other[40] = token_row_name(40);
    other[3] = token_row_name(7);
    CHECK(serve(kv, kept, other) == 0);  // equal later rows do not count after another beginning
}

TEST_CASE("prefix cache: a chunk's row is neither a token's nor another chunk's") {
    Sha256Digest a{}, b{};
    a.bytes[0] = 1;
    b.bytes[0] = 3;
    CHECK(chunk_row_name(a, 0) == chunk_row_name(a, 0));
    CHECK_FALSE(chunk_row_name(a, 0) == chunk_row_name(a, 1));
    CHECK_FALSE(chunk_row_name(a, 0) == chunk_row_name(b, 0));
    CHECK_FALSE(chunk_row_name(Sha256Digest{}, 0) == token_row_name(0));

    KvCache kv = make_cache();
    PrefixCache kept(kv);
    std::vector<RowName> rows = tokens(0, 40);
    rows[10] = chunk_row_name(a, 0);
    CHECK(serve(kv, kept, rows) == 0);
    CHECK(serve(kv, kept, rows) == 32);
    rows[10] = chunk_row_name(a, 1);
    CHECK(serve(kv, kept, rows) == 0);
    rows[10] = token_row_name(10);  // the same chunk expanded
    CHECK(serve(kv, kept, rows) == 0);
}

TEST_CASE("prefix cache: slots share pages, and hold them while the cache lets go") {
    KvCache kv = make_cache();
    PrefixCache kept(kv);
    serve(kv, kept, tokens(0, 70));
    CHECK(kept.restore(1, tokens(0, 100)) == 64);
    CHECK(kept.restore(2, tokens(0, 100)) == 64);
    CHECK(kv.free_blocks() == kBlocks - 2);
    CHECK(kept.n_idle() == 0);
    kept.make_room(kBlocks);  // nothing can be given up
    CHECK(kept.n_blocks() == 2);
    kv.truncate(1, 0);
    CHECK(kept.n_idle() == 0);
    kept.clear();
    CHECK(kv.free_blocks() == kBlocks - 2);  // slot 2's
    CHECK(kv.length(2) == 64);
    kv.truncate(2, 0);
    CHECK(kv.free_blocks() == kBlocks);
}

TEST_CASE("prefix cache: the longest unused goes first, ends before beginnings") {
    KvCache kv = make_cache();
    PrefixCache kept(kv);
    serve(kv, kept, tokens(0, 96));       // three blocks
    serve(kv, kept, tokens(1000, 1064));  // two
    CHECK(serve(kv, kept, tokens(0, 96)) == 64);
    CHECK(kv.free_blocks() == 3);
    kept.make_room(4);  // the end of the second prompt
    CHECK(kv.free_blocks() == 4);
    CHECK(kept.restore(1, tokens(1000, 1100)) == 32);
    kv.truncate(1, 0);
    kept.make_room(7);  // all of the first but its beginning: the second was used since
    CHECK(kept.restore(1, tokens(1000, 1100)) == 32);
    kv.truncate(1, 0);
    CHECK(kept.restore(1, tokens(0, 96)) == 0);
    kept.make_room(kBlocks);
    CHECK(kept.n_blocks() == 0);
    CHECK(kv.free_blocks() == kBlocks);
}

TEST_CASE("prefix cache: what lies before a block in use is not idle, whoever wrote it") {
    KvCache kv = make_cache();
    PrefixCache kept(kv);
    // Two prompts that begin alike are read at the same time: each slot has pages of its own. The first one's
    // are kept, and then what the second has beyond them.
    hold(kv, 0, 64);
    hold(kv, 1, 96);
    kept.keep(0, tokens(0, 64));
    kept.keep(1, tokens(0, 96));
    CHECK(kept.n_blocks() == 3);
    kv.truncate(0, 0);
    // Slot 1 uses the third block alone, and the cache can give up none: the first two lead to it.
    CHECK(kept.n_idle() == 0);
    CHECK(kept.n_idle() == 0);
    const int64_t free = kv.free_blocks();
    kept.make_room(kBlocks);
    CHECK(kv.free_blocks() == free);
    kv.truncate(1, 0);
    CHECK(kept.n_idle() == 3);
    kept.make_room(kBlocks);
    CHECK(kv.free_blocks() == kBlocks);
    CHECK(kept.n_blocks() == 0);
}

TEST_CASE("prefix cache: keeping more of a slot takes nothing from what was idle") {
    KvCache kv = make_cache();
    PrefixCache kept(kv);
    hold(kv, 0, 64);
    hold(kv, 1, 96);
    kept.keep(0, tokens(0, 64));
    kv.truncate(0, 0);
    CHECK(kept.n_idle() == 2);
    CHECK(kv.free_blocks() == kBlocks - 2 - 3);
    // Slot 1 has read the same rows into pages of its own. What it keeps behind them must not make the idle
    // ones stay.
    kept.keep(1, tokens(0, 96));
    CHECK(kept.n_blocks() == 3);
    CHECK(kept.n_idle() + kv.free_blocks() == kBlocks - 3);
    kept.make_room(kBlocks - 3);
    CHECK(kv.free_blocks() == kBlocks - 3);
    kv.truncate(1, 0);
    CHECK(kept.n_idle() == 3);
    CHECK(kept.restore(2, tokens(0, 97)) == 96);
}

TEST_CASE("prefix cache: without the host's memory it keeps fewer, and what it keeps is whole") {
    bool done = false;
    int64_t fewest = 4;
    for (int64_t n = 1; !done; ++n) {
        CAPTURE(n);
        KvCache kv = make_cache();
        PrefixCache kept(kv);
        hold(kv, 0, 128);
        const std::vector<RowName> rows = tokens(0, 128);
        FailingMemory memory(n);
        kept.keep(0, rows);
        memory.disarm();
        done = memory.asked() < n;
        if (done) CHECK(kept.n_blocks() == 4);
        fewest = std::min(fewest, kept.n_blocks());
        kv.truncate(0, 0);
        CHECK(kept.n_idle() == kept.n_blocks());
        CHECK(kv.free_blocks() == kBlocks - kept.n_blocks());
        CHECK(kept.restore(1, tokens(0, 200)) == kept.n_blocks() * kPageEntries);
        kv.truncate(1, 0);
        // The rest can be kept later.
        hold(kv, 2, 128);
        kept.keep(2, rows);
        CHECK(kept.n_blocks() == 4);
        kv.truncate(2, 0);
        kept.clear();
        CHECK(kv.free_blocks() == kBlocks);
    }
    CHECK(fewest == 0);
}

TEST_CASE("prefix cache: a random walk keeps and gives up what plain lists do") {
    // Prompts over two symbols, a block each, so that many begin alike. A path is what a node stands for.
    using Path = std::vector<int32_t>;
    constexpr int64_t kPool = 40;
    KvCache kv(cpu(), 2, 1, 2, 2, 8 * kPageEntries, DType::f32, kPool);
    PrefixCache kept(kv);
    std::map<Path, int64_t> used;  // when last
    std::mt19937 random(7);
    const auto rows_of = [](const Path& path) {
        std::vector<RowName> rows;
        for (const int32_t symbol : path) {
            for (int32_t i = 0; i < kPageEntries; ++i) rows.push_back(token_row_name(symbol * 100 + i));
        }
        return rows;
    };
    for (int64_t clock = 1; clock <= 3000; ++clock) {
        Path path;
        const size_t length = 1 + random() % 6;
        for (size_t i = 0; i < length; ++i) path.push_back(static_cast<int32_t>(random() % 3));
        std::vector<RowName> rows = rows_of(path);
        rows.push_back(token_row_name(7));  // the last row is never taken over
        size_t known = 0;
        while (known < path.size() &&
               used.contains(Path(path.begin(), path.begin() + static_cast<std::ptrdiff_t>(known) + 1)))
            ++known;
        REQUIRE(kept.restore(0, rows) == static_cast<int32_t>(known) * kPageEntries);
        const auto mark = [&](size_t n) {
            for (size_t i = 1; i <= n; ++i)
                used[Path(path.begin(), path.begin() + static_cast<std::ptrdiff_t>(i))] = clock;
        };
        mark(known);
        const int64_t need = static_cast<int64_t>(path.size() + 1 - known);
        // Plain lists: the longest unused end of a path that the slot does not use.
        int64_t free = kPool - std::ssize(used);
        while (free < need) {
            auto oldest = used.end();
            for (auto at = used.begin(); at != used.end(); ++at) {
                const Path& p = at->first;
                const bool in_use = p.size() <= known && std::equal(p.begin(), p.end(), path.begin());
                const auto next = std::next(at);
                const bool goes_on = next != used.end() && next->first.size() > p.size() &&
                                     std::equal(p.begin(), p.end(), next->first.begin());
                if (in_use || goes_on) continue;
                const bool older = oldest == used.end() || at->second < oldest->second ||
                                   (at->second == oldest->second && p.size() > oldest->first.size());
                if (older) oldest = at;
            }
            REQUIRE(oldest != used.end());
            used.erase(oldest);
            ++free;
        }
        kept.make_room(need);
        hold(kv, 0, rows.size());
        kept.keep(0, rows);
        mark(path.size());
        kv.truncate(0, 0);
        REQUIRE(kept.n_blocks() == std::ssize(used));
        REQUIRE(kept.n_idle() == std::ssize(used));
        REQUIRE(kv.free_blocks() == kPool - std::ssize(used));
    }
    CHECK(used.size() > 20);
}
