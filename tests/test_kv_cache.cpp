// The paged KV cache: which pages are taken and given back, lengths on both sides, copy on write proved by
// writing through the real op, refusals that change nothing, and a random walk against a plain model.
#include <algorithm>
#include <array>
#include <random>

#include "failing.h"
#include "golden.h"
#include "models/kv_cache.h"
#include "tap_backend.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr int32_t kLayers = 2;
constexpr int32_t kKvHeads = 2;
constexpr int32_t kHeads = kLayers * kKvHeads;  // pages per 32 entries of a slot
constexpr int32_t kHeadDim = 4;
constexpr int64_t kMaxEntries = 70;  // 3 pages a head

KvCache make_cache(int32_t n_slots) {
    return KvCache(cpu(), n_slots, kLayers, kKvHeads, kHeadDim, kMaxEntries);
}

// What an entry holds: a value told apart by stamp, layer, head, entry, K or V, and dimension. Small enough
// that every sum below is exact in fp32.
float entry_value(int32_t stamp, int32_t layer, int32_t head, bool is_v, int32_t d) {
    return static_cast<float>(stamp * 64 + layer * 32 + head * 16 + (is_v ? 8 : 0) + d);
}

// Appends one entry for each stamp through the op, as a forward does.
void append(KvCache& kv, int32_t slot, const std::vector<int32_t>& stamps) {
    const auto n = static_cast<int32_t>(stamps.size());
    kv.reserve(slot, n);
    Arena arena(cpu());
    BatchPlan plan;
    plan.add_cached(slot, kv.length(slot), n);
    const Batch batch = plan.upload(cpu(), arena);
    for (int32_t layer = 0; layer < kLayers; ++layer) {
        std::array<std::vector<float>, 2> values;  // K, V [n, kKvHeads * kHeadDim]
        for (const bool is_v : {false, true}) {
            for (const int32_t stamp : stamps) {
                for (int32_t head = 0; head < kKvHeads; ++head) {
                    for (int32_t d = 0; d < kHeadDim; ++d) {
                        values[is_v].push_back(entry_value(stamp, layer, head, is_v, d));
                    }
                }
            }
        }
        cpu().kv_append(kv.view(), layer, upload(cpu(), arena, values[0], kKvHeads * kHeadDim),
                        upload(cpu(), arena, values[1], kKvHeads * kHeadDim), batch);
    }
    kv.advance(slot, n);
}

// The stamps of a slot's entries as the ops would find them: by length and page table in device memory. -1
// where the heads, or K and V, do not agree on an entry; an empty list where they do not agree on the length.
std::vector<int32_t> stamps_of(KvCache& kv, int32_t slot) {
    kv.reserve(slot, 0);  // what changed is uploaded
    const KvView& view = kv.view();
    std::vector<int32_t> result;
    for (int32_t layer = 0; layer < kLayers; ++layer) {
        for (int32_t head = 0; head < kKvHeads; ++head) {
            const int64_t index = view.head_index(slot, layer, head);
            int32_t length = 0;
            cpu().download(&length, view.length + index, sizeof length);
            std::vector<int32_t> table(static_cast<size_t>(view.max_pages));
            cpu().download(table.data(), view.page_table + index * view.max_pages, table.size() * 4);
            if (layer + head == 0) result.assign(static_cast<size_t>(length), -2);
            if (result.size() != static_cast<size_t>(length)) return {};
            for (int32_t e = 0; e < length; ++e) {
                const int64_t page = table[static_cast<size_t>(e / kPageEntries)];
                for (const bool is_v : {false, true}) {
                    std::array<float, kHeadDim> values{};
                    const int64_t row = (page * 2 + (is_v ? 1 : 0)) * kPageEntries + e % kPageEntries;
                    cpu().download(values.data(), static_cast<const float*>(view.pages) + row * kHeadDim,
                                   sizeof values);
                    const auto stamp = static_cast<int32_t>(values[0]) / 64;
                    int32_t& known = result[static_cast<size_t>(e)];
                    if (known == -2) known = stamp;
                    for (int32_t d = 0; d < kHeadDim; ++d) {
                        const float expected = entry_value(stamp, layer, head, is_v, d);
                        if (known != stamp || values[static_cast<size_t>(d)] != expected) known = -1;
                    }
                }
            }
        }
    }
    return result;
}

std::vector<int32_t> range(int32_t begin, int32_t end) {
    std::vector<int32_t> stamps;
    for (int32_t i = begin; i < end; ++i) stamps.push_back(i);
    return stamps;
}
std::vector<int32_t> joined(std::vector<int32_t> a, const std::vector<int32_t>& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

}  // namespace

TEST_CASE("kv cache: pages are taken as a sequence grows and given back") {
    KvCache kv = make_cache(2);
    CHECK(kv.n_slots() == 2);
    CHECK(kv.max_entries() == kMaxEntries);
    CHECK(kv.free_pages() == 2 * kHeads * 3);
    CHECK(kv.device_bytes() == size_t{2 * kHeads * 3} * 2 * kPageEntries * kHeadDim * sizeof(float));
    const auto used = [&] { return 2 * kHeads * 3 - kv.free_pages(); };

    kv.reserve(0, 0);
    CHECK(used() == 0);
    kv.reserve(0, 1);
    CHECK(used() == kHeads);
    kv.reserve(0, 32);  // the same page
    CHECK(used() == kHeads);
    kv.reserve(0, 33);
    CHECK(used() == 2 * kHeads);
    append(kv, 0, range(0, 33));
    CHECK(used() == 2 * kHeads);
    CHECK(kv.length(0) == 33);
    kv.reserve(0, 31);  // up to 64
    CHECK(used() == 2 * kHeads);
    kv.reserve(0, 32);
    CHECK(used() == 3 * kHeads);
    append(kv, 1, range(100, 170));
    CHECK(used() == 6 * kHeads);
    CHECK(kv.free_pages() == 0);

    kv.truncate(0, 33);  // also gives back the page reserved and not written
    CHECK(used() == 5 * kHeads);
    kv.truncate(0, 32);
    CHECK(used() == 4 * kHeads);
    CHECK(stamps_of(kv, 0) == range(0, 32));
    kv.truncate(0, 31);
    CHECK(used() == 4 * kHeads);
    kv.truncate(0, 0);
    CHECK(used() == 3 * kHeads);
    CHECK(stamps_of(kv, 0).empty());
    CHECK(stamps_of(kv, 1) == range(100, 170));
    kv.truncate(1, 0);
    CHECK(used() == 0);
}

TEST_CASE("kv cache: a sequence beyond the limit is refused with the numbers, and nothing changes") {
    KvCache kv = make_cache(2);
    append(kv, 0, range(0, 40));
    const int64_t free = kv.free_pages();
    CHECK(error_of([&] { kv.reserve(0, 31); }) ==
          "KV cache: slot 0 holds 40 entries and cannot take 31 more: its limit is 70");
    CHECK(contains(error_of([&] { kv.reserve(1, 71); }), "holds 0 entries and cannot take 71 more"));
    CHECK(contains(error_of([&] { kv.reserve(0, INT32_MAX); }), "cannot take 2147483647 more"));
    CHECK(kv.free_pages() == free);
    CHECK(kv.length(0) == 40);
    CHECK(stamps_of(kv, 0) == range(0, 40));
    append(kv, 0, range(40, 70));  // exactly full
    CHECK(stamps_of(kv, 0) == range(0, 70));
    CHECK(contains(error_of([&] { kv.reserve(0, 1); }), "holds 70 entries and cannot take 1 more"));
}

TEST_CASE("kv cache: impossible sizes are refused") {
    const auto make = [](int32_t n_slots, int32_t n_layers, int64_t max_entries) {
        return error_of([&] { KvCache(cpu(), n_slots, n_layers, 4096, 2, max_entries); });
    };
    CHECK(contains(make(0, 1, 64), "found 0 slots of 64"));
    CHECK(contains(make(1, 1, 0), "found 1 slots of 0"));
    CHECK(contains(make(1, 1, int64_t{INT32_MAX}), "found 1 slots of 2147483647"));
    const std::string pages = make(1024, 4096, 64);
    CHECK(contains(pages, "2048 blocks of 16777216 pages"));
    CHECK(contains(pages, "2147483647"));
}

TEST_CASE("kv cache: a shared prefix takes no pages until one side writes, and then they are apart") {
    KvCache kv = make_cache(3);
    append(kv, 0, range(0, 50));
    const int64_t free = kv.free_pages();

    kv.share_prefix(0, 1, 40);
    CHECK(kv.free_pages() == free);
    CHECK(kv.length(1) == 40);
    CHECK(stamps_of(kv, 1) == range(0, 40));

    // The reader writes: only the page in which it ends is copied.
    append(kv, 1, range(500, 510));
    CHECK(kv.free_pages() == free - kHeads);
    CHECK(stamps_of(kv, 1) == joined(range(0, 40), range(500, 510)));
    CHECK(stamps_of(kv, 0) == range(0, 50));

    // The owner goes back and writes: the reader of the first page keeps what it has.
    kv.share_prefix(0, 2, 20);
    CHECK(kv.free_pages() == free - kHeads);
    kv.truncate(0, 10);
    append(kv, 0, range(700, 715));
    CHECK(stamps_of(kv, 0) == joined(range(0, 10), range(700, 715)));
    CHECK(stamps_of(kv, 1) == joined(range(0, 40), range(500, 510)));
    CHECK(stamps_of(kv, 2) == range(0, 20));

    for (const int32_t slot : {1, 0, 2}) kv.truncate(slot, 0);
    CHECK(kv.free_pages() == 3 * kHeads * 3);
}

TEST_CASE("kv cache: a prefix that ends on a page border is never copied") {
    KvCache kv = make_cache(2);
    append(kv, 0, range(0, 64));
    kv.reserve(1, 5);  // reserved and never written: given back by sharing
    const int64_t free = kv.free_pages();
    kv.share_prefix(0, 1, 32);
    CHECK(kv.free_pages() == free + kHeads);
    append(kv, 1, range(900, 901));
    CHECK(kv.free_pages() == free);
    CHECK(stamps_of(kv, 1) == joined(range(0, 32), {900}));
    CHECK(stamps_of(kv, 0) == range(0, 64));
    kv.truncate(1, 0);
    kv.share_prefix(0, 1, 0);
    CHECK(kv.length(1) == 0);
}

TEST_CASE("kv cache: a random walk agrees with plain lists") {
    std::mt19937 random(7);
    const auto below = [&](size_t n) { return static_cast<int32_t>(random() % n); };
    constexpr int32_t kSlots = 3;
    KvCache kv = make_cache(kSlots);
    std::vector<std::vector<int32_t>> model(kSlots);
    int32_t stamp = 0;
    for (int step = 0; step < 300; ++step) {
        const int32_t slot = below(kSlots);
        std::vector<int32_t>& list = model[static_cast<size_t>(slot)];
        const int32_t room = static_cast<int32_t>(kMaxEntries) - static_cast<int32_t>(list.size());
        switch (below(4)) {
            case 0:
            case 1: {
                const int32_t n = std::min(room, below(40));
                append(kv, slot, range(stamp, stamp + n));
                list = joined(list, range(stamp, stamp + n));
                stamp = (stamp + n) % 100000;  // entry_value stays exact
                break;
            }
            case 2: {
                const int32_t n = below(list.size() + 1);
                kv.truncate(slot, n);
                list.resize(static_cast<size_t>(n));
                break;
            }
            default: {
                const int32_t to = (slot + 1 + below(kSlots - 1)) % kSlots;
                const int32_t n = below(list.size() + 1);
                kv.truncate(to, 0);
                kv.share_prefix(slot, to, n);
                model[static_cast<size_t>(to)].assign(list.begin(), list.begin() + n);
            }
        }
        bool equal = true;
        for (int32_t s = 0; s < kSlots; ++s)
            equal = equal && stamps_of(kv, s) == model[static_cast<size_t>(s)];
        REQUIRE_MESSAGE(equal, "after step " << step);
    }
    for (int32_t s = 0; s < kSlots; ++s) kv.truncate(s, 0);
    CHECK(kv.free_pages() == kSlots * kHeads * 3);
}

TEST_CASE("kv cache: a pool is as large as it was asked to be, whatever a slot may hold") {
    constexpr int64_t kWindow = 131072;
    KvCache kv(cpu(), 4, kLayers, kKvHeads, kHeadDim, kWindow, DType::f32, 8);
    CHECK(kv.n_pages() == 8 * kHeads);
    CHECK(kv.device_bytes() == size_t{8 * kHeads} * 2 * kPageEntries * kHeadDim * sizeof(float));
    append(kv, 0, range(0, 200));  // 7 blocks
    CHECK(kv.free_blocks() == 1);
    CHECK(KvCache::blocks_for(200) == 7);
    append(kv, 1, range(300, 332));
    CHECK(kv.free_blocks() == 0);
    const std::string message = error_of([&] { kv.reserve(2, 33); });
    CHECK(message == "KV cache: 8 pages needed, 0 free of 32");
    CHECK(kv.length(2) == 0);
    CHECK(stamps_of(kv, 0) == range(0, 200));
    CHECK(stamps_of(kv, 1) == range(300, 332));
    CHECK(kv.length(0, kLayers - 1, kKvHeads - 1) == 200);
    kv.truncate(0, 0);  // at once
    CHECK(kv.free_blocks() == 7);
    append(kv, 2, range(400, 600));
    CHECK(stamps_of(kv, 2) == range(400, 600));
}

TEST_CASE("kv cache: blocks that are held outlive their slot and begin another") {
    KvCache kv(cpu(), 3, kLayers, kKvHeads, kHeadDim, 128, DType::f32, 6);
    append(kv, 0, range(0, 70));
    const KvBlock first = kv.hold_block(0, 0);
    const KvBlock second = kv.hold_block(0, 1);
    CHECK(kv.is_shared(first));
    kv.truncate(0, 0);
    CHECK_FALSE(kv.is_shared(first));
    CHECK(kv.free_blocks() == 4);

    kv.reserve(1, 40);  // reserved and never written: given back
    kv.append_block(1, first);
    kv.append_block(1, second);
    CHECK(kv.length(1) == 64);
    CHECK(kv.free_blocks() == 4);
    append(kv, 1, range(900, 910));
    CHECK(stamps_of(kv, 1) == joined(range(0, 64), range(900, 910)));
    kv.append_block(2, first);
    append(kv, 2, range(950, 960));
    CHECK(stamps_of(kv, 2) == joined(range(0, 32), range(950, 960)));
    // Going back into a held block and writing copies it.
    kv.truncate(2, 20);
    append(kv, 2, range(980, 981));
    CHECK(stamps_of(kv, 2) == joined(range(0, 20), {980}));
    CHECK(stamps_of(kv, 1) == joined(range(0, 64), range(900, 910)));

    kv.truncate(1, 0);
    kv.truncate(2, 0);
    kv.drop_block(first);
    kv.drop_block(second);
    CHECK(kv.free_blocks() == 6);
}

TEST_CASE("kv cache: the page table is as wide as the longest sequence needed, not as the window") {
    constexpr int64_t kWindow = 131072;  // 4096 pages
    KvCache kv(cpu(), 4, kLayers, kKvHeads, kHeadDim, kWindow, DType::f32, 40);
    append(kv, 0, range(0, 200));
    append(kv, 1, range(300, 340));
    const void* const table = kv.view().page_table;
    const int32_t width = kv.view().max_pages;
    CHECK(width <= 16);
    append(kv, 0, range(200, width * kPageEntries));  // the last that fits
    CHECK(kv.view().max_pages == width);
    CHECK(kv.view().page_table == table);
    kv.reserve(0, 1);
    CHECK(kv.view().max_pages == 2 * width);
    // Every slot is found in the new table, also those that nothing has changed in.
    CHECK(stamps_of(kv, 1) == range(300, 340));
    CHECK(stamps_of(kv, 0) == range(0, width * kPageEntries));
    CHECK(stamps_of(kv, 2).empty());
    kv.truncate(1, 0);
    const auto long_one = static_cast<int32_t>(kv.n_pages() / kHeads) * kPageEntries;
    append(kv, 0, range(width * kPageEntries, long_one));
    CHECK(kv.view().max_pages == 40);  // no wider than the pool
    CHECK(stamps_of(kv, 0) == range(0, long_one));
    CHECK(kv.free_pages() == 0);
    kv.truncate(0, 0);
    append(kv, 3, range(0, 70));
    CHECK(kv.view().max_pages == 40);  // stays
    CHECK(stamps_of(kv, 3) == range(0, 70));
}

TEST_CASE("kv cache: a reserve that finds no memory for a wider table changes nothing") {
    bool failed_once = false;
    bool done = false;
    for (int64_t n = 1; !done; ++n) {
        KvCache kv(cpu(), 2, kLayers, kKvHeads, kHeadDim, 4096, DType::f32, 64);
        append(kv, 0, range(0, 40));
        append(kv, 1, range(300, 310));
        const int32_t width = kv.view().max_pages;
        const int64_t free = kv.free_pages();
        bool out_of_memory = false;
        FailingMemory memory(n);
        try {
            kv.reserve(0, (width + 4) * kPageEntries);
        } catch (const Error& error) {
            out_of_memory = error.status() == Status::out_of_memory;
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
        memory.disarm();
        done = memory.asked() < n;
        CAPTURE(n);
        REQUIRE(out_of_memory == memory.failed());
        if (out_of_memory) {
            failed_once = true;
            REQUIRE(kv.free_pages() == free);
            REQUIRE(kv.length(0) == 40);
        }
        REQUIRE(stamps_of(kv, 0) == range(0, 40));
        REQUIRE(stamps_of(kv, 1) == range(300, 310));
        append(kv, 0, range(40, 1200));
        REQUIRE(stamps_of(kv, 0) == range(0, 1200));
    }
    CHECK(failed_once);
}

namespace {

// Counts memory, and can fail to copy a page.
class CountingBackend : public TapBackend {
  public:
    CountingBackend() : TapBackend(cpu()) {}
    void* allocate(size_t bytes) override {
        void* const data = inner_.allocate(bytes);
        held += bytes;
        most = std::max(most, held);
        sizes.emplace_back(data, bytes);
        return data;
    }
    void release(void* data) noexcept override {
        const auto at =
            std::find_if(sizes.begin(), sizes.end(), [&](const auto& s) { return s.first == data; });
        held -= at->second;
        sizes.erase(at);
        inner_.release(data);
    }
    void copy(Tensor out, Tensor x) override {
        if (copies_left-- == 0) fail(Status::runtime, "no copy");
        inner_.copy(out, x);
    }
    uint64_t held = 0, most = 0;
    std::vector<std::pair<void*, size_t>> sizes;
    int copies_left = -1;
};

}  // namespace

TEST_CASE("kv cache: page tables take no more than was said, while they grow too") {
    for (const int64_t most_entries :
         {int64_t{64}, int64_t{512}, int64_t{545}, int64_t{1025}, int64_t{5000}}) {
        for (const int64_t n_blocks : {int64_t{1}, int64_t{17}, int64_t{200}}) {
            CAPTURE(most_entries);
            CAPTURE(n_blocks);
            CountingBackend backend;
            constexpr int32_t kSlots = 3;
            KvCache kv(backend, kSlots, kLayers, kKvHeads, kHeadDim, most_entries, DType::f32, n_blocks);
            const uint64_t lengths = kSlots * kHeads * sizeof(int32_t);
            const int64_t longest = std::min(KvCache::blocks_for(most_entries), n_blocks);
            const int64_t entries = std::min(most_entries, longest * kPageEntries);
            for (int64_t n = 0; n < entries; n += 7) {
                const auto more = static_cast<int32_t>(std::min<int64_t>(7, entries - n));
                kv.reserve(1, more);
                kv.advance(1, more);
            }
            const uint64_t most = KvCache::most_table_bytes(kSlots, kHeads, longest);
            const uint64_t tables = backend.held - kv.device_bytes() - lengths;
            CHECK(tables == static_cast<uint64_t>(kSlots * kHeads * longest) * sizeof(int32_t));
            CHECK(backend.most - kv.device_bytes() - lengths <= most);
            CHECK(most <= 2 * tables);
        }
    }
}

TEST_CASE("kv cache: a page that cannot be copied leaves both sides as they were") {
    for (int n_copied = 0; n_copied < kHeads; ++n_copied) {
        CAPTURE(n_copied);
        CountingBackend backend;
        KvCache kv(backend, 2, kLayers, kKvHeads, kHeadDim, kMaxEntries);
        append(kv, 0, range(0, 40));
        kv.share_prefix(0, 1, 40);
        const int64_t free = kv.free_pages();
        backend.copies_left = n_copied;
        CHECK(contains(error_of([&] { kv.reserve(1, 1); }), "no copy"));
        CHECK(kv.free_pages() == free - n_copied);
        CHECK(stamps_of(kv, 1) == range(0, 40));
        CHECK(stamps_of(kv, 0) == range(0, 40));
        append(kv, 1, {70});
        append(kv, 0, {60});
        CHECK(stamps_of(kv, 1) == joined(range(0, 40), {70}));
        CHECK(stamps_of(kv, 0) == joined(range(0, 40), {60}));
        kv.truncate(0, 0);
        kv.truncate(1, 0);
        CHECK(kv.free_pages() == kv.n_pages());
    }
}
