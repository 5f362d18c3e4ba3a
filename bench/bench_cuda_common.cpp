// See bench_cuda.h.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/dtype.h"
#include "base/int8.h"
#include "base/threads.h"
#include "bench_cuda.h"
#include "cpu/cpu_backend.h"
#include "models/device_batch.h"

namespace refrag_bench {

using namespace refrag;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Numbers in [-1, 1), drawn once; tensors and matrices take them from different places on.
const std::vector<float>& pool() {
    static const std::vector<float> numbers = [] {
        std::vector<float> made(size_t{1} << 22);
        for (size_t i = 0; i < made.size(); ++i) {
            made[i] = static_cast<float>(static_cast<int32_t>(drawn(i))) * 0x1p-31f;
        }
        return made;
    }();
    return numbers;
}

}  // namespace

uint32_t drawn(uint64_t z) {
    z = (z + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(z >> 32);
}

std::string shown(const Heads& h) {
    return str(h.heads, " heads, ", h.kv_heads, " KV heads, dim ", h.dim);
}

AttentionShape shape_of(const Heads& h) {
    return {h.heads, h.kv_heads, h.dim, 1.0f / std::sqrt(static_cast<float>(h.dim)), DType::bf16};
}

Sizes small_sizes() {
    Sizes s;
    s.repeats = 1;
    s.batch_seconds = 0.0;
    s.apart_bytes = 0;
    s.heads = {{4, 2, 64}};
    s.part = 40;
    s.parts = 3;
    s.contexts = {100, 300};
    s.batches = {1, 2};
    s.encoder = {2, 2, 32};
    s.chunks = 4;
    s.products = {{96, 128}};
    s.few_rows = {1, 8};
    s.many_rows = {9, 70};
    s.crossing_rows = {1, 9};
    s.deterministic_rows = {1, 70};
    s.encoder_products = {{64, 32}};
    s.encoder_rows = 20;
    s.dim = 128;
    s.hidden = 160;
    s.vocab = 300;
    s.draw_rows = {1};
    return s;
}

Bench::Bench(const Open& open, Peaks measured, Sizes wanted, std::FILE* file)
    : backend(open({})), b(*backend), peaks(measured), sizes(std::move(wanted)), tables(file), open_(open) {}

Backend& Bench::opened(std::unique_ptr<Backend>& held, const Way& way) {
    if (held == nullptr) held = open_(way);
    return *held;
}
Backend& Bench::plain() {
    return opened(plain_, {.plain_attention = true});
}
Backend& Bench::own_products() {
    return opened(own_products_, {.own_product_rows = 1 << 30});
}
Backend& Bench::cublas() {
    return opened(cublas_, {.own_product_rows = 0});
}
Backend& Bench::deterministic() {
    return opened(deterministic_, {.deterministic = true});
}
Backend& Bench::cpu() {
    if (cpu_ == nullptr) cpu_ = make_cpu_backend(default_threads(), CpuIsa::scalar);
    return *cpu_;
}

Tensor Bench::tensor(Arena& arena, int64_t rows, int64_t cols) {
    const Tensor t = arena.tensor(rows, cols);
    const std::vector<float>& from = pool();
    for (int64_t at = 0; at < t.size();) {
        const auto begin = static_cast<size_t>(drawn(draws_++) % 4096);
        const int64_t n = std::min<int64_t>(t.size() - at, std::ssize(from) - static_cast<int64_t>(begin));
        b.upload(t.f32() + at, from.data() + begin, static_cast<size_t>(n) * sizeof(float));
        at += n;
    }
    return t;
}

std::unique_ptr<Matrix> Bench::matrix(DType dtype, int64_t out_dim, int64_t in_dim) {
    const bool int8 = dtype == DType::i8;
    const float scale = std::sqrt(3.0f / static_cast<float>(in_dim));
    const size_t row_bytes = int8 ? int8_row_bytes(in_dim) : static_cast<size_t>(in_dim) * 2;
    // A few rows, drawn; the matrix takes them in turn, and each begins elsewhere in them.
    constexpr int64_t kRows = 61;
    std::vector<std::byte> rows(kRows * row_bytes);
    std::vector<float> row(static_cast<size_t>(in_dim));
    for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t i = 0; i < in_dim; ++i) {
            const auto at = static_cast<size_t>(drawn(draws_) + r * in_dim + i) % pool().size();
            row[static_cast<size_t>(i)] = pool()[at] * scale;
        }
        std::byte* const to = rows.data() + static_cast<size_t>(r) * row_bytes;
        if (int8) {
            quantize_int8_row(to, DType::f32, row.data(), in_dim);
            continue;
        }
        for (int64_t i = 0; i < in_dim; ++i) {
            const uint16_t bits = f32_to_bf16(row[static_cast<size_t>(i)]);
            std::memcpy(to + i * 2, &bits, 2);
        }
    }
    ++draws_;
    return b.device().make_matrix(dtype, out_dim, in_dim, [&](int64_t begin, int64_t n, void* dst) {
        for (int64_t i = 0; i < n; ++i) {
            const std::byte* const from = rows.data() + static_cast<size_t>((begin + i) % kRows) * row_bytes;
            std::memcpy(static_cast<std::byte*>(dst) + static_cast<size_t>(i) * row_bytes, from, row_bytes);
        }
    });
}

std::vector<std::unique_ptr<Matrix>> Bench::matrices(DType dtype, int64_t out_dim, int64_t in_dim) {
    std::vector<std::unique_ptr<Matrix>> made;
    size_t bytes = 0;
    while (made.size() < 2 || bytes < static_cast<size_t>(sizes.apart_bytes)) {
        made.push_back(matrix(dtype, out_dim, in_dim));
        bytes += made.back()->device_bytes();
    }
    return made;
}

std::unique_ptr<KvCache> Bench::filled_cache(const Heads& h, int32_t slots, int32_t layers, int32_t entries,
                                             int32_t room) {
    auto cache = std::make_unique<KvCache>(b, slots, layers, h.kv_heads, h.dim, room,
                                           b.device().kv_dtype(DType::bf16, h.dim));
    Arena arena(b);
    const int64_t cols = int64_t{h.kv_heads} * h.dim;
    const Tensor k = tensor(arena, std::min(sizes.part, std::max(entries, 1)), cols),
                 v = tensor(arena, k.rows, cols);
    for (int32_t slot = 0; slot < slots; ++slot) {
        for (int32_t held = 0; held < entries;) {
            const int32_t n = std::min(sizes.part, entries - held);
            cache->reserve(slot, n);
            BatchPlan plan;
            plan.add_cached(slot, held, n);
            const ArenaScope scope(arena);
            const Batch batch = plan.upload(b, arena);
            for (int32_t layer = 0; layer < layers; ++layer) {
                b.kv_append(cache->view(), layer, {k.data, k.dtype, n, cols}, {v.data, v.dtype, n, cols},
                            batch);
            }
            cache->advance(slot, n);
            held += n;
        }
    }
    b.download(nullptr, nullptr, 0);
    return cache;
}

double Bench::seconds_of(Backend& by, const std::function<void(int64_t)>& call, int64_t most_calls,
                         const std::function<void()>& prepare) {
    const auto took = [&](const std::function<void()>& calls) {
        prepare();
        b.wait();
        by.wait();
        const double began = now();
        calls();
        by.wait();
        return now() - began;
    };
    const int64_t trial = std::min<int64_t>(sizes.batch_seconds > 0.0 ? 16 : 1, most_calls);
    double one = 0.0;
    for (int turn = 0; turn < 2; ++turn) {
        one = took([&] {
                  for (int64_t i = 0; i < trial; ++i) call(i);
              }) /
              static_cast<double>(trial);
    }
    const int64_t calls =
        std::clamp<int64_t>(static_cast<int64_t>(std::ceil(sizes.batch_seconds / one)), 1, most_calls);
    const auto recording = by.make_recording();
    const auto replay = [&] {
        return took([&] {
                   by.replay(*recording, 0, [&] {
                       for (int64_t i = 0; i < calls; ++i) call(i);
                   });
               }) /
               static_cast<double>(calls);
    };
    // The first runs as it is, the second records, the third is the recording's own warm-up.
    for (int i = 0; i < 3; ++i) replay();
    std::vector<double> times;
    times.reserve(static_cast<size_t>(sizes.repeats));
    for (int i = 0; i < sizes.repeats; ++i) times.push_back(replay());
    std::nth_element(times.begin(), times.begin() + sizes.repeats / 2, times.end());
    return times[static_cast<size_t>(sizes.repeats / 2)];
}

std::vector<float> Bench::values(Backend& of, Tensor t) {
    std::vector<float> x(static_cast<size_t>(t.size()));
    of.download(x.data(), t.data, t.bytes());
    return x;
}

std::string Bench::off(const std::vector<float>& got, const std::vector<float>& expected, double limit) {
    REFRAG_CHECK(got.size() == expected.size(), Status::runtime, "bench_cuda: results of ", got.size(),
                 " and ", expected.size(), " numbers");
    double apart = 0.0, size = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
        const double d = static_cast<double>(got[i]) - static_cast<double>(expected[i]);
        apart += d * d;
        size += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
    }
    const double distance = apart == 0.0 ? 0.0 : std::sqrt(apart / size);
    const bool right = count(distance <= limit);
    char text[48];
    std::snprintf(text, sizeof text, right ? "%.0e" : "WRONG: %.2g", distance);
    return text;
}

void all_tables(Bench& bench) {
    prefill_attention(bench);
    decode_attention(bench);
    matrix_vector(bench);
    own_against_cublas(bench);
    matrix_matrix(bench);
    deterministic_products(bench);
    encoder_attention(bench);
    small_ops(bench);
    draws(bench);
}

}  // namespace refrag_bench
