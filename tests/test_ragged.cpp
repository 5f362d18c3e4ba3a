// The networks against themselves on the CPU, bit for bit: a ragged batch equals its sequences one at a time,
// a prefill in parts equals one prefill, and decoding row by row equals both, at every instruction set.
// Equality is exact because a row's result depends on neither the rest of the batch nor the split
// (ops/backend.h).
#include <algorithm>
#include <random>

#include "every_backend.h"
#include "golden.h"
#include "models/device_batch.h"
#include "models/roberta.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr const char* kModel = "llama3";  // grouped queries, so a page belongs to two query heads

// n source rows: mostly ids, every fifth or so one of 7 chunk rows.
std::vector<int32_t> random_source(std::mt19937& random, size_t n, int32_t vocab) {
    std::vector<int32_t> source(n);
    for (int32_t& s : source) {
        const auto draw = static_cast<int32_t>(random() % 1000);
        s = draw % 5 == 0 ? -1 - draw % 7 : draw % vocab;
    }
    return source;
}

Decoder make_decoder(Backend& backend, int32_t n_slots) {
    return Decoder(backend, network_path(kModel), n_slots);
}

std::vector<float> chunk_row_values() {
    return Golden(kModel).values("chunk_rows");
}

std::vector<float> concat(const std::vector<std::vector<float>>& parts) {
    std::vector<float> all;
    for (const std::vector<float>& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
}

void check_ragged(Backend& backend) {
    std::mt19937 random(1);
    Decoder together = make_decoder(backend, 6);
    Decoder alone = make_decoder(backend, 6);
    together.set_chunk_rows(chunk_row_values());
    alone.set_chunk_rows(chunk_row_values());
    const auto vocab = static_cast<int32_t>(together.vocab());
    // First a prefill of five lengths around the page size into slots out of order; then calls that mix
    // decode rows, longer parts, a sequence without rows and a new one.
    const std::vector<std::vector<std::pair<int32_t, size_t>>> calls = {
        {{4, 1}, {0, 31}, {2, 32}, {1, 33}, {5, 7}},
        {{0, 1}, {1, 1}, {2, 1}, {4, 1}, {5, 1}},
        {{5, 25}, {0, 1}, {3, 40}, {1, 0}, {2, 31}},
        {{3, 1}, {5, 2}, {2, 1}}};
    for (size_t c = 0; c < calls.size(); ++c) {
        CAPTURE(c);
        std::vector<Decoder::Part> parts;
        for (const auto& [slot, n] : calls[c]) parts.push_back({slot, random_source(random, n, vocab)});
        const std::vector<float> batch = together.feed(parts);
        std::vector<std::vector<float>> singles;
        for (const Decoder::Part& part : parts) singles.push_back(alone.feed(part.slot, part.source));
        CHECK(batch == concat(singles));
    }
}

void check_split(Backend& backend) {
    std::mt19937 random(2);
    Decoder decoder = make_decoder(backend, 1);
    decoder.set_chunk_rows(chunk_row_values());
    const std::vector<int32_t> source = random_source(random, 70, static_cast<int32_t>(decoder.vocab()));
    const std::vector<float> whole = decoder.feed(0, source);
    for (const std::ptrdiff_t cut : {1, 30, 31, 32, 33, 34, 63, 64, 65, 69}) {
        CAPTURE(cut);
        decoder.kv.truncate(0, 0);
        const std::vector<float> first = decoder.feed(0, {source.begin(), source.begin() + cut});
        const std::vector<float> second = decoder.feed(0, {source.begin() + cut, source.end()});
        CHECK(concat({first, second}) == whole);
    }
    decoder.kv.truncate(0, 0);
    std::vector<std::vector<float>> steps;
    for (const int32_t s : source) steps.push_back(decoder.feed(0, std::vector<int32_t>{s}));
    CHECK(concat(steps) == whole);
    CHECK(decoder.kv.length(0) == 70);
}

void check_chunks(Backend& backend) {
    std::mt19937 random(4);
    for (const ChunkPooling pooling : {ChunkPooling::mean, ChunkPooling::pooler}) {
        const std::string name = pooling == ChunkPooling::mean ? "roberta-mlm" : "roberta-pooler";
        CAPTURE(name);
        const Roberta encoder(backend.device(), network_path(name), pooling, true);
        Arena arena(backend);
        // 90 chunks of up to 38 tokens: more rows than one group of a call takes. The kernels on the host are
        // slow.
        const bool few = refrag_test::contains(backend.device().description(), "kernels on the host");
        std::vector<std::vector<int32_t>> chunks(few ? 6 : 90);
        size_t rows = 0;
        for (size_t i = 0; i < chunks.size(); ++i) {
            chunks[i].resize(i < 3 ? i + 1 : 20 + random() % 19);
            for (int32_t& id : chunks[i]) id = static_cast<int32_t>(random() % 100);
            rows += chunks[i].size();
        }
        REQUIRE((few || rows > 2048));
        const Tensor all = arena.tensor(std::ssize(chunks), encoder.config().dim);
        encoder.encode(backend, chunks, all, arena);
        const std::vector<float> together = download(backend, all);
        std::vector<std::vector<float>> singles;
        for (const std::vector<int32_t>& chunk : chunks) {
            const Tensor one = arena.tensor(1, encoder.config().dim);
            encoder.encode(backend, std::span(&chunk, 1), one, arena);
            singles.push_back(download(backend, one));
        }
        CHECK(together == concat(singles));
        encoder.encode(backend, {}, Tensor{nullptr, DType::f32, 0, encoder.config().dim},
                       arena);  // nothing to do
    }
}

}  // namespace

TEST_CASE("llama: a ragged batch equals its sequences one at a time") {
    for (const auto& backend : every_backend(true)) {
        CAPTURE(backend->device().description());
        check_ragged(*backend);
    }
}

TEST_CASE("llama: a prefill in two parts, and row by row, equals one prefill") {
    for (const auto& backend : cpu_levels()) {
        CAPTURE(backend->device().description());
        check_split(*backend);
    }
}

TEST_CASE("roberta: chunks in one call equal chunks one at a time") {
    for (const auto& backend : every_backend(true)) {
        CAPTURE(backend->device().description());
        check_chunks(*backend);
    }
}

TEST_CASE("llama: going back in the cache and on again equals never having gone wrong") {
    std::mt19937 random(3);
    Decoder decoder = make_decoder(cpu(), 2);
    decoder.set_chunk_rows(chunk_row_values());
    const auto vocab = static_cast<int32_t>(decoder.vocab());
    const std::vector<int32_t> source = random_source(random, 50, vocab);
    const std::vector<float> whole = decoder.feed(0, source);
    const size_t row = decoder.vocab();
    for (const int32_t keep : {31, 32, 33, 49}) {
        CAPTURE(keep);
        decoder.kv.truncate(0, keep);
        decoder.feed(0, random_source(random, 9, vocab));
        decoder.kv.truncate(0, keep);
        const std::vector<float> again = decoder.feed(0, {source.begin() + keep, source.end()});
        CHECK(max_difference(again, std::span(whole).subspan(static_cast<size_t>(keep) * row)) == 0);

        // The same in another slot that shares the prefix, while the first goes on elsewhere.
        decoder.kv.truncate(1, 0);
        decoder.kv.share_prefix(0, 1, keep);
        decoder.kv.truncate(0, keep);
        decoder.feed(0, random_source(random, 5, vocab));
        const std::vector<float> shared = decoder.feed(1, {source.begin() + keep, source.end()});
        CHECK(max_difference(shared, std::span(whole).subspan(static_cast<size_t>(keep) * row)) == 0);
        decoder.kv.truncate(0, 0);
        decoder.feed(0, source);
    }
}

TEST_CASE("llama: order matters, so rows do have positions") {
    Decoder decoder = make_decoder(cpu(), 1);
    std::vector<float> forward = decoder.feed(0, {5, 6, 7, 8, 9});
    decoder.kv.truncate(0, 0);
    std::vector<float> swapped = decoder.feed(0, {6, 5, 7, 8, 9});
    const auto last = [&](const std::vector<float>& logits) {
        return std::span(logits).last(decoder.vocab());
    };
    CHECK(max_difference(last(forward), last(swapped)) > 0.01);
}

TEST_CASE("batch plan: layout, positions and bounds") {
    BatchPlan plan;
    plan.add_cached(3, 5, 2);
    plan.add_encoder(4);
    plan.add_cached(0, 0, 0);
    plan.add_cached(1, 31, 1);
    Arena arena(cpu());
    const Batch batch = plan.upload(cpu(), arena);
    CHECK(batch.n_seq == 4);
    CHECK(batch.n_rows == 7);
    CHECK(batch.max_rows == 4);
    CHECK(batch.max_entries == 32);
    const auto read = [&](const auto* data, size_t n) {
        std::vector<std::remove_cvref_t<decltype(*data)>> values(n);
        cpu().download(values.data(), data, n * sizeof(*data));
        return values;
    };
    CHECK(read(batch.row_begin, 5) == std::vector<int32_t>{0, 2, 6, 6, 7});
    CHECK(read(batch.start, 4) == std::vector<int32_t>{5, 0, 0, 31});
    CHECK(read(batch.slot, 4) == std::vector<int32_t>{3, -1, 0, 1});
    CHECK(read(batch.position, 7) == std::vector<float>{5, 6, 0, 1, 2, 3, 31});
}
