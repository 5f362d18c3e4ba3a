// Prefixes that are kept: what is found again, what is not, who holds which pages, what is given up first.
#include <algorithm>

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
