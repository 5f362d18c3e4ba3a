// Speed of the CUDA backend's ops on a GPU, each beside a limit that was measured in the same run
// (cuda/peaks.h): products and prefill attention beside cuBLAS' bf16 product, the rest beside reading memory.
// Markdown tables on stdout. The mirror of bench_ops.cpp; bench/sdpa.py measures PyTorch at the same
// attention shapes.
//
// A figure is the median of at least 20 batches of calls. The calls of a batch are recorded once (as a decode
// step is) and replayed, so that the gaps between launches are not in it, and ended by one download. What
// waits for memory goes round through copies of its data that together are far larger than the L2 cache.
//
//   bench_cuda [REPEATS]
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/dtype.h"
#include "base/int8.h"
#include "cuda/cuda_backend.h"
#include "cuda/peaks.h"
#include "models/device_batch.h"
#include "models/kv_cache.h"

namespace {

using namespace refrag;

constexpr double kBatchSeconds = 5e-3;      // about how long a batch of calls takes
constexpr int64_t kMaxCalls = 1000;         // of a batch
constexpr int64_t kApartBytes = 512 << 20;  // of data, before it comes round again
constexpr int32_t kPart = 2048;             // rows of a prefill's part

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

uint32_t drawn(uint64_t z) {
    z = (z + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(z >> 32);
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

class Bench {
  public:
    Bench(Backend& backend, const cuda::GpuPeaks& measured, int repeats)
        : b(backend), peaks(measured), repeats_(repeats) {}

    Backend& b;
    const cuda::GpuPeaks& peaks;

    // A tensor of drawn numbers.
    Tensor tensor(Arena& arena, int64_t rows, int64_t cols) {
        const Tensor t = arena.tensor(rows, cols);
        const std::vector<float>& from = pool();
        for (int64_t at = 0; at < t.size();) {
            const auto begin = static_cast<size_t>(drawn(draws_++) % 4096);
            const int64_t n =
                std::min<int64_t>(t.size() - at, std::ssize(from) - static_cast<int64_t>(begin));
            b.upload(t.f32() + at, from.data() + begin, static_cast<size_t>(n) * sizeof(float));
            at += n;
        }
        return t;
    }

    // A weight matrix of drawn numbers about 1 / sqrt(in_dim) large.
    std::unique_ptr<Matrix> matrix(DType dtype, int64_t out_dim, int64_t in_dim) {
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
                const std::byte* const from =
                    rows.data() + static_cast<size_t>((begin + i) % kRows) * row_bytes;
                std::memcpy(static_cast<std::byte*>(dst) + static_cast<size_t>(i) * row_bytes, from,
                            row_bytes);
            }
        });
    }

    // Seconds of call(i), i counting the calls of a batch. prepare(): before each batch, not timed.
    // most_calls: of a batch.
    double seconds(
        const std::function<void(int64_t)>& call, int64_t most_calls = kMaxCalls,
        const std::function<void()>& prepare = [] {}) {
        constexpr int64_t kTrial = 16;
        const int64_t trial = std::min(kTrial, most_calls);
        double took = 0.0;
        for (int i = 0; i < 2; ++i) took = batch(call, trial, prepare);
        const double one = took / static_cast<double>(trial);
        const int64_t calls =
            std::clamp<int64_t>(static_cast<int64_t>(std::ceil(kBatchSeconds / one)), 1, most_calls);
        const auto recording = b.make_recording();
        const auto replay = [&] {
            prepare();
            b.download(nullptr, nullptr, 0);
            const double began = now();
            b.replay(*recording, 0, [&] {
                for (int64_t i = 0; i < calls; ++i) call(i);
            });
            b.download(nullptr, nullptr, 0);
            return (now() - began) / static_cast<double>(calls);
        };
        // The first runs as it is, the second records, the third is the recording's own warm-up.
        for (int i = 0; i < 3; ++i) replay();
        std::vector<double> times;
        times.reserve(static_cast<size_t>(repeats_));
        for (int i = 0; i < repeats_; ++i) times.push_back(replay());
        std::nth_element(times.begin(), times.begin() + repeats_ / 2, times.end());
        return times[static_cast<size_t>(repeats_ / 2)];
    }

  private:
    double batch(const std::function<void(int64_t)>& call, int64_t calls,
                 const std::function<void()>& prepare) {
        prepare();
        b.download(nullptr, nullptr, 0);
        const double began = now();
        for (int64_t i = 0; i < calls; ++i) call(i);
        b.download(nullptr, nullptr, 0);
        return now() - began;
    }

    int repeats_;
    uint64_t draws_ = 0;
};

struct Heads {
    int32_t heads, kv_heads, dim;
};

std::string shown(const Heads& h) {
    return str(h.heads, " heads, ", h.kv_heads, " KV heads, dim ", h.dim);
}

AttentionShape shape_of(const Heads& h) {
    return {h.heads, h.kv_heads, h.dim, 1.0f / std::sqrt(static_cast<float>(h.dim)), DType::bf16};
}

// A cache of `layers` layers whose slots all hold `entries` entries of drawn numbers.
std::unique_ptr<KvCache> filled_cache(Bench& bench, const Heads& h, int32_t slots, int32_t layers,
                                      int32_t entries, int32_t room) {
    auto cache = std::make_unique<KvCache>(bench.b, slots, layers, h.kv_heads, h.dim, room,
                                           bench.b.device().kv_dtype(DType::bf16, h.dim));
    Arena arena(bench.b);
    const int64_t cols = int64_t{h.kv_heads} * h.dim;
    const Tensor k = bench.tensor(arena, std::min(kPart, std::max(entries, 1)), cols),
                 v = bench.tensor(arena, k.rows, cols);
    for (int32_t slot = 0; slot < slots; ++slot) {
        for (int32_t held = 0; held < entries;) {
            const int32_t n = std::min(kPart, entries - held);
            cache->reserve(slot, n);
            BatchPlan plan;
            plan.add_cached(slot, held, n);
            const ArenaScope scope(arena);
            const Batch batch = plan.upload(bench.b, arena);
            for (int32_t layer = 0; layer < layers; ++layer) {
                bench.b.kv_append(cache->view(), layer, {k.data, k.dtype, n, cols},
                                  {v.data, v.dtype, n, cols}, batch);
            }
            cache->advance(slot, n);
            held += n;
        }
    }
    bench.b.download(nullptr, nullptr, 0);
    return cache;
}

// Of n new rows after `start` entries: scores and values over what each row sees.
double causal_flops(const Heads& h, double start, double n) {
    return 4.0 * h.dim * h.heads * (n * start + n * (n + 1.0) / 2.0);
}

void prefill_attention(Bench& bench) {
    std::printf(
        "\n| attention, prefill: %d new rows | after | ms | TFLOP/s | of bf16 |\n|---|---|---|---|---|\n",
        kPart);
    constexpr int32_t kParts = 8;
    for (const Heads h : {Heads{32, 32, 128}, Heads{32, 8, 128}, Heads{32, 32, 64}, Heads{32, 8, 64}}) {
        Arena arena(bench.b);
        const int64_t q_cols = int64_t{h.heads} * h.dim, k_cols = int64_t{h.kv_heads} * h.dim;
        const Tensor q = bench.tensor(arena, kPart, q_cols), k = bench.tensor(arena, kPart, k_cols),
                     v = bench.tensor(arena, kPart, k_cols), out = arena.tensor(kPart, q_cols);
        double all_s = 0.0;
        const auto row = [&](const char* after, double s, double flops) {
            std::printf("| %s | %s | %.3f | %.1f | %.2f |\n", shown(h).c_str(), after, s * 1e3,
                        flops / s * 1e-12, flops / s * 1e-9 / bench.peaks.bf16_gflops);
            std::fflush(stdout);
        };
        for (int32_t part = 0; part < kParts; ++part) {
            const int32_t start = part * kPart;
            const auto cache = filled_cache(bench, h, 1, 1, start, start + kPart);
            cache->reserve(0, kPart);
            BatchPlan plan;
            plan.add_cached(0, start, kPart);
            const ArenaScope scope(arena);
            const Batch batch = plan.upload(bench.b, arena);
            bench.b.kv_append(cache->view(), 0, k, v, batch);
            const double s = bench.seconds(
                [&](int64_t) { bench.b.attention(out, q, k, v, shape_of(h), &cache->view(), 0, batch); });
            all_s += s;
            if (part <= 1 || part == kParts - 1) row(str(start).c_str(), s, causal_flops(h, start, kPart));
        }
        row(str("sum of ", kParts, " parts").c_str(), all_s, causal_flops(h, 0, kParts * kPart));
    }
}

void decode_attention(Bench& bench) {
    std::printf(
        "\n| attention, decode | batch | context | us | KV GB/s | of read |\n|---|---|---|---|---|---|\n");
    for (const Heads h : {Heads{32, 32, 128}, Heads{32, 8, 128}, Heads{32, 32, 64}, Heads{32, 8, 64}}) {
        for (const int32_t n_seq : {1, 8}) {
            for (const int32_t context : {1024, 4096, 16384}) {
                const double bytes =
                    2.0 * static_cast<double>(dtype_bytes(bench.b.device().kv_dtype(DType::bf16, h.dim))) *
                    h.kv_heads * h.dim * context * n_seq;
                const int32_t layers =
                    std::max(2, static_cast<int32_t>(static_cast<double>(kApartBytes) / bytes) + 1);
                const auto cache = filled_cache(bench, h, n_seq, layers, context, context);
                Arena arena(bench.b);
                const int64_t q_cols = int64_t{h.heads} * h.dim, k_cols = int64_t{h.kv_heads} * h.dim;
                const Tensor q = bench.tensor(arena, n_seq, q_cols), k = bench.tensor(arena, n_seq, k_cols),
                             v = bench.tensor(arena, n_seq, k_cols), out = arena.tensor(n_seq, q_cols);
                BatchPlan plan;
                for (int32_t slot = 0; slot < n_seq; ++slot) plan.add_cached(slot, context - 1, 1);
                const Batch batch = plan.upload(bench.b, arena);
                const double s = bench.seconds([&](int64_t i) {
                    bench.b.attention(out, q, k, v, shape_of(h), &cache->view(),
                                      static_cast<int32_t>(i % layers), batch);
                });
                std::printf("| %s | %d | %d | %.1f | %.0f | %.2f |\n", shown(h).c_str(), n_seq, context,
                            s * 1e6, bytes / s * 1e-9, bytes / s * 1e-9 / bench.peaks.read_gbs);
                std::fflush(stdout);
            }
        }
    }
}

void encoder_attention(Bench& bench) {
    std::printf(
        "\n| attention, encoder: 16 heads, dim 64 | us | TFLOP/s | of bf16 | q, k, v, out GB/s | of read |\n"
        "|---|---|---|---|---|---|\n");
    constexpr int32_t kChunks = 1024;
    for (const int32_t tokens : {16, 18}) {
        const Heads h{16, 16, 64};
        const int64_t rows = int64_t{kChunks} * tokens, cols = int64_t{h.heads} * h.dim;
        Arena arena(bench.b);
        const Tensor q = bench.tensor(arena, rows, cols), k = bench.tensor(arena, rows, cols),
                     v = bench.tensor(arena, rows, cols), out = arena.tensor(rows, cols);
        BatchPlan plan;
        for (int32_t i = 0; i < kChunks; ++i) plan.add_encoder(tokens);
        const Batch batch = plan.upload(bench.b, arena);
        const double s =
            bench.seconds([&](int64_t) { bench.b.attention(out, q, k, v, shape_of(h), nullptr, 0, batch); });
        const double flops = 4.0 * static_cast<double>(rows) * tokens * static_cast<double>(cols);
        const double bytes = 4.0 * static_cast<double>(q.bytes());
        std::printf("| %d chunks of %d tokens | %.1f | %.1f | %.2f | %.0f | %.2f |\n", kChunks, tokens,
                    s * 1e6, flops / s * 1e-12, flops / s * 1e-9 / bench.peaks.bf16_gflops, bytes / s * 1e-9,
                    bytes / s * 1e-9 / bench.peaks.read_gbs);
        std::fflush(stdout);
    }
}

// As many matrices as lie apart in the L2 cache's eyes, at least two.
std::vector<std::unique_ptr<Matrix>> matrices(Bench& bench, DType dtype, int64_t out_dim, int64_t in_dim) {
    std::vector<std::unique_ptr<Matrix>> made;
    size_t bytes = 0;
    while (made.size() < 2 || bytes < static_cast<size_t>(kApartBytes)) {
        made.push_back(bench.matrix(dtype, out_dim, in_dim));
        bytes += made.back()->device_bytes();
    }
    return made;
}

double product_seconds(Bench& bench, const std::vector<std::unique_ptr<Matrix>>& w, int64_t rows) {
    Arena arena(bench.b);
    const Tensor x = bench.tensor(arena, rows, w[0]->in_dim()), out = arena.tensor(rows, w[0]->out_dim());
    return bench.seconds(
        [&](int64_t i) { bench.b.linear(out, x, *w[static_cast<size_t>(i) % w.size()], Tensor{}); });
}

constexpr std::pair<int64_t, int64_t> kDecoderShapes[] = {{4096, 4096}, {11008, 4096}, {32000, 4096}};

void matrix_vector(Bench& bench) {
    std::printf(
        "\n| linear: out x in | weights | rows | us | weights GB/s | of read |\n|---|---|---|---|---|---|\n");
    for (const auto& [out_dim, in_dim] : kDecoderShapes) {
        for (const DType dtype : {DType::bf16, DType::i8}) {
            const auto w = matrices(bench, dtype, out_dim, in_dim);
            for (const int64_t rows : {1, 2, 4, 8}) {
                const double s = product_seconds(bench, w, rows);
                const double gbs = static_cast<double>(w[0]->device_bytes()) / s * 1e-9;
                std::printf("| %lld x %lld | %s | %lld | %.1f | %.0f | %.2f |\n",
                            static_cast<long long>(out_dim), static_cast<long long>(in_dim),
                            dtype_name(dtype), static_cast<long long>(rows), s * 1e6, gbs,
                            gbs / bench.peaks.read_gbs);
                std::fflush(stdout);
            }
        }
    }
}

void matrix_matrix(Bench& bench) {
    std::printf(
        "\n| linear: out x in | weights | rows | us | TFLOP/s | of bf16 |\n|---|---|---|---|---|---|\n");
    const auto table = [&](int64_t out_dim, int64_t in_dim, std::initializer_list<int64_t> all_rows,
                           std::initializer_list<DType> dtypes) {
        for (const DType dtype : dtypes) {
            const auto w = matrices(bench, dtype, out_dim, in_dim);
            for (const int64_t rows : all_rows) {
                const double s = product_seconds(bench, w, rows);
                const double tflops = 2e-12 * static_cast<double>(out_dim) * static_cast<double>(in_dim) *
                                      static_cast<double>(rows) / s;
                std::printf("| %lld x %lld | %s | %lld | %.1f | %.1f | %.2f |\n",
                            static_cast<long long>(out_dim), static_cast<long long>(in_dim),
                            dtype_name(dtype), static_cast<long long>(rows), s * 1e6, tflops,
                            tflops * 1e3 / bench.peaks.bf16_gflops);
                std::fflush(stdout);
            }
        }
    };
    for (const auto& [out_dim, in_dim] : kDecoderShapes)
        table(out_dim, in_dim, {128, 512, 2048}, {DType::bf16, DType::i8});
    // The encoder's, of 1024 chunks of 18 tokens.
    table(1024, 1024, {18432}, {DType::bf16});
    table(4096, 1024, {18432}, {DType::bf16});
    table(1024, 4096, {18432}, {DType::bf16});
}

// What a layer does between its products.
void small_ops(Bench& bench) {
    std::printf("\n| op | rows | us | memory touched GB/s | of read |\n|---|---|---|---|---|\n");
    constexpr int64_t kDim = 4096, kHidden = 11008, kVocab = 32000;
    const Heads h{32, 32, 128};
    const auto table = bench.matrix(DType::bf16, kVocab, kDim);
    for (const int32_t rows : {1, 8, kPart}) {
        const auto row = [&](const char* op, double bytes, double s) {
            std::printf("| %s | %d | %.2f | %.0f | %.2f |\n", op, rows, s * 1e6, bytes / s * 1e-9,
                        bytes / s * 1e-9 / bench.peaks.read_gbs);
            std::fflush(stdout);
        };
        Arena arena(bench.b);
        const auto n = static_cast<double>(rows);
        // Each works on copies in turn, so that many rows do not lie in the L2 cache; a single row always
        // does, in a forward too.
        const auto copies = [&](int64_t cols, double tensors) {
            const double bytes = 4.0 * n * static_cast<double>(cols) * tensors;
            return rows < kPart ? int64_t{1}
                                : static_cast<int64_t>(static_cast<double>(kApartBytes) / bytes) + 1;
        };
        {
            const ArenaScope scope(arena);
            const int64_t count = copies(kDim, 2);
            const Tensor x = bench.tensor(arena, rows * count, kDim), out = arena.tensor(rows * count, kDim),
                         weight = bench.tensor(arena, 1, kDim);
            const auto part = [&](Tensor t, int64_t i) {
                return Tensor{t.f32() + i % count * rows * kDim, t.dtype, rows, kDim};
            };
            row("rms_norm, 4096", 8.0 * n * kDim,
                bench.seconds([&](int64_t i) { bench.b.rms_norm(part(out, i), part(x, i), weight, 1e-5f); }));
        }
        {
            const ArenaScope scope(arena);
            const int64_t count = copies(kHidden, 2);
            // Numbers change from call to call, toward 0 and no further than denormals: a GPU does not mind.
            const Tensor gate = bench.tensor(arena, rows * count, kHidden),
                         up = bench.tensor(arena, rows * count, kHidden);
            const auto part = [&](Tensor t, int64_t i) {
                return Tensor{t.f32() + i % count * rows * kHidden, t.dtype, rows, kHidden};
            };
            row("silu_mul, 11008", 12.0 * n * kHidden,
                bench.seconds([&](int64_t i) { bench.b.silu_mul(part(gate, i), part(up, i)); }));
        }
        {
            // A decode step's rows are of as many sequences, a prefill's of one. The slots are emptied before
            // every batch of calls.
            const ArenaScope scope(arena);
            const int32_t slots = rows < kPart ? rows : 1, each = rows / slots;
            constexpr int64_t kCalls = 16;
            const int64_t most = rows < kPart ? 256 : kCalls;
            const auto entries = static_cast<int32_t>(most * each);
            KvCache cache(bench.b, slots, 1, h.kv_heads, h.dim, entries,
                          bench.b.device().kv_dtype(DType::bf16, h.dim));
            const Tensor q = bench.tensor(arena, rows, kDim), k = bench.tensor(arena, rows, kDim),
                         v = bench.tensor(arena, rows, kDim), cos_sin = bench.tensor(arena, rows, h.dim);
            BatchPlan plan;
            for (int32_t slot = 0; slot < slots; ++slot) plan.add_cached(slot, 0, each);
            const Batch batch = plan.upload(bench.b, arena);
            const double s = bench.seconds(
                [&](int64_t) { bench.b.rope_kv_append(cache.view(), 0, q, k, v, cos_sin, batch); }, most,
                [&] {
                    for (int32_t slot = 0; slot < slots; ++slot) {
                        cache.truncate(slot, 0);
                        cache.reserve(slot, entries);
                    }
                });
            // q and k read and written, v read, k and v appended in 16 bits.
            row("rope_kv_append, 32 heads of 128", n * kDim * (8.0 + 8.0 + 4.0 + 4.0), s);
        }
        {
            const ArenaScope scope(arena);
            std::vector<int32_t> ids(static_cast<size_t>(rows));
            for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(drawn(i) % kVocab);
            const int64_t count = copies(kDim, 1.5);
            const Tensor out = arena.tensor(rows * count, kDim);
            const int32_t* const source = upload_vector(bench.b, arena, ids);
            row("embed, 4096 of bf16", 6.0 * n * kDim, bench.seconds([&](int64_t i) {
                bench.b.embed({out.f32() + i % count * rows * kDim, DType::f32, rows, kDim}, *table, source,
                              {});
            }));
        }
    }
}

std::string today() {
    const std::time_t time = std::time(nullptr);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&time));
    return text;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        const int repeats = std::max(20, argc > 1 ? std::atoi(argv[1]) : 0);
        const auto backend = cuda::make_cuda_backend();
        const cuda::GpuInfo info = cuda::gpu_info();
        const cuda::GpuPeaks peaks = cuda::measure_gpu_peaks();
        std::printf("date: %s\nGPU: %s (%s)\nCUDA: driver up to %s, runtime %s\n", today().c_str(),
                    info.name.c_str(), backend->device().description().c_str(), info.driver.c_str(),
                    info.runtime.c_str());
        std::printf(
            "peaks: bf16 %.1f TFLOP/s, fp32 %.1f TFLOP/s, memory read %.0f GB/s, copied %.0f GB/s (read and "
            "written)\nmedians of %d batches of calls\n",
            peaks.bf16_gflops * 1e-3, peaks.fp32_gflops * 1e-3, peaks.read_gbs, peaks.copy_gbs, repeats);
        std::fflush(stdout);
        Bench bench(*backend, peaks, repeats);
        prefill_attention(bench);
        decode_attention(bench);
        encoder_attention(bench);
        matrix_vector(bench);
        matrix_matrix(bench);
        small_ops(bench);
    } catch (const Error& e) {
        std::fprintf(stderr, "bench_cuda: %s\n", e.what());
        return 1;
    }
    return 0;
}
