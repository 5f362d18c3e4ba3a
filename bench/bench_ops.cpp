// Speed of the CPU backend's ops, each beside a limit of the machine: products beside the peak of their type,
// the rest beside the bytes it reads a second (src/cpu/peaks.h). Markdown tables on stdout.
//
// On a shared machine the limits themselves move: read the shares, not the absolute figures. Every figure is
// the best of several repetitions; the limits are measured again before every table.
//
//   bench_ops [threads] [seconds per figure]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/int8.h"
#include "base/threads.h"
#include "cpu/cpu_backend.h"
#include "cpu/peaks.h"

namespace {

using namespace refrag;

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the fastest call of `body` within `budget` seconds, at least three calls.
double best_seconds(double budget, const std::function<void()>& body) {
    double best = 1e30;
    const double end = now() + budget;
    for (int i = 0; i < 3 || now() < end; ++i) {
        const double begin = now();
        body();
        best = std::min(best, now() - begin);
    }
    return best;
}

struct Machine {
    int threads;
    MachinePeaks peaks;

    void measure() { peaks = measure_peaks(threads, uint64_t{1} << 30); }
    // Of products with weights, or attention over a cache, of this type.
    double peak(DType dtype) const {
        if (dtype == DType::i8) return peaks.int8_gops;
        return dtype == DType::bf16 ? peaks.bf16_gflops : peaks.fp32_gflops;
    }
};

Tensor tensor_of(const Buffer& buffer, int64_t rows, int64_t cols) {
    return {buffer.data(), DType::f32, rows, cols};
}

Buffer filled(Backend& backend, int64_t n) {
    Buffer buffer(backend, static_cast<size_t>(n) * 4);
    for (int64_t i = 0; i < n; ++i)
        static_cast<float*>(buffer.data())[i] = static_cast<float>(i * 7919 % 1000) * 1e-3f;
    return buffer;
}

// Bytes of a row as make_matrix takes it; of I8, scales included.
size_t row_bytes(DType dtype, int64_t in_dim) {
    return dtype == DType::i8 ? int8_row_bytes(in_dim) : static_cast<size_t>(in_dim) * dtype_bytes(dtype);
}

// Every 16 bits are an F16 or a BF16 number of about 1, or two bytes.
std::unique_ptr<Matrix> weights(Backend& backend, DType dtype, int64_t out_dim, int64_t in_dim) {
    return backend.device().make_matrix(dtype, out_dim, in_dim, [&](int64_t, int64_t n, void* dst) {
        const auto halves = n * static_cast<int64_t>(row_bytes(dtype, in_dim)) / 2;
        for (int64_t i = 0; i < halves; ++i) {
            static_cast<uint16_t*>(dst)[i] = static_cast<uint16_t>(0x3c00 + i * 7919 % 512);
        }
    });
}

void bench_linear(Backend& backend, const Machine& machine, double budget) {
    std::printf(
        "\n| linear: out x in | weights | rows | GFLOP/s | peak | share | weights GB/s | read GB/s | "
        "share |\n");
    std::printf("|---|---|---|---|---|---|---|---|---|\n");
    const std::pair<int64_t, int64_t> shapes[] = {
        {768, 768}, {2048, 768}, {768, 2048}, {32000, 768}, {2048, 5632}};
    for (const auto& shape : shapes) {
        const int64_t out_dim = shape.first, in_dim = shape.second;
        for (const DType dtype : {DType::f32, DType::bf16, DType::i8}) {
            const auto w = weights(backend, dtype, out_dim, in_dim);
            for (const int64_t rows : {1, 16, 64, 512, 2048}) {
                const Buffer x = filled(backend, rows * in_dim), out = filled(backend, rows * out_dim);
                const double peak = machine.peak(dtype), read = machine.peaks.read_gbs;
                const double s = best_seconds(budget, [&] {
                    backend.linear(tensor_of(out, rows, out_dim), tensor_of(x, rows, in_dim), *w, Tensor{});
                });
                const double elements = static_cast<double>(out_dim) * static_cast<double>(in_dim);
                const double gflops = 2e-9 * elements * static_cast<double>(rows) / s;
                const double gbs =
                    1e-9 * static_cast<double>(out_dim) * static_cast<double>(row_bytes(dtype, in_dim)) / s;
                std::printf("| %lld x %lld | %s | %lld | %.1f | %.0f | %.2f | %.1f | %.1f | %.2f |\n",
                            static_cast<long long>(out_dim), static_cast<long long>(in_dim),
                            dtype_name(dtype), static_cast<long long>(rows), gflops, peak, gflops / peak, gbs,
                            read, gbs / read);
                std::fflush(stdout);
            }
        }
    }
}

// A cache of one slot and one layer, filled with `entries` entries.
struct BenchCache {
    std::vector<int32_t> length, table;
    Buffer pages;
    KvView view;

    BenchCache(Backend& backend, int32_t kv_heads, int32_t dim, int64_t entries, DType dtype)
        : length(static_cast<size_t>(kv_heads), static_cast<int32_t>(entries)) {
        view.dtype = dtype;
        view.n_layers = 1;
        view.n_kv_heads = kv_heads;
        view.head_dim = dim;
        view.max_pages = static_cast<int32_t>((entries + kPageEntries - 1) / kPageEntries);
        table.resize(static_cast<size_t>(kv_heads * view.max_pages));
        for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
        pages =
            Buffer(backend, table.size() * 2 * kPageEntries * static_cast<size_t>(dim) * dtype_bytes(dtype));
        std::memset(pages.data(), 0x3c, pages.bytes());  // .01, in either type
        view.pages = pages.data();
        view.length = length.data();
        view.page_table = table.data();
    }
};

// rows = entries: a prefill; rows = 1: a decode step. As BF16 weights have it.
double attention_seconds(Backend& backend, int32_t heads, int32_t kv_heads, int32_t dim, int32_t entries,
                         int32_t rows, double budget) {
    const BenchCache cache(backend, kv_heads, dim, entries, backend.device().kv_dtype(DType::bf16, dim));
    const std::vector<int32_t> row_begin = {0, rows}, start = {entries - rows}, slot = {0};
    const Batch batch{1, rows, rows, entries, row_begin.data(), start.data(), slot.data(), nullptr};
    const Buffer q = filled(backend, int64_t{rows} * heads * dim),
                 kv = filled(backend, int64_t{rows} * kv_heads * dim),
                 out = filled(backend, int64_t{rows} * heads * dim);
    const AttentionShape shape{heads, kv_heads, dim, 0.125f, DType::bf16};
    return best_seconds(budget, [&] {
        backend.attention(tensor_of(out, rows, heads * dim), tensor_of(q, rows, heads * dim),
                          tensor_of(kv, rows, kv_heads * dim), tensor_of(kv, rows, kv_heads * dim), shape,
                          &cache.view, 0, batch);
    });
}

void bench_attention(Backend& backend, const Machine& machine, double budget) {
    std::printf("\n| attention, prefill | entries | GFLOP/s | bf16 peak | share |\n|---|---|---|---|---|\n");
    struct Heads {
        int32_t heads, kv_heads, dim;
    };
    for (const Heads h : {Heads{12, 12, 64}, Heads{32, 4, 64}, Heads{8, 8, 128}}) {
        for (const int32_t n : {512, 2048}) {
            const double peak = machine.peak(DType::bf16);
            const double s = attention_seconds(backend, h.heads, h.kv_heads, h.dim, n, n, budget);
            // Scores and values, over what the rows see: n (n + 1) / 2 entries.
            const double gflops = 4e-9 * h.heads * h.dim * (0.5 * n * (n + 1.0)) / s;
            std::printf("| %d heads, %d KV heads, dim %d | %d | %.1f | %.0f | %.2f |\n", h.heads, h.kv_heads,
                        h.dim, n, gflops, peak, gflops / peak);
            std::fflush(stdout);
        }
    }
    std::printf("\n| attention, one row | entries | KV GB/s | read GB/s | share |\n|---|---|---|---|---|\n");
    for (const Heads h : {Heads{12, 12, 64}, Heads{32, 4, 64}, Heads{8, 8, 128}}) {
        for (const int32_t n : {512, 8192, 65536}) {
            const double read = machine.peaks.read_gbs;
            const size_t bytes = dtype_bytes(backend.device().kv_dtype(DType::bf16, h.dim));
            const double s = attention_seconds(backend, h.heads, h.kv_heads, h.dim, n, 1, budget);
            const double gbs = 2e-9 * static_cast<double>(bytes) * h.kv_heads * h.dim * n / s;
            std::printf("| %d heads, %d KV heads, dim %d | %d | %.1f | %.1f | %.2f |\n", h.heads, h.kv_heads,
                        h.dim, n, gbs, read, gbs / read);
            std::fflush(stdout);
        }
    }
}

// Many short encoder sequences in one call.
void bench_encoder(Backend& backend, const Machine& machine, double budget) {
    std::printf("\n| attention, encoder | GFLOP/s | bf16 peak | share |\n|---|---|---|---|\n");
    const int32_t n_seq = 1024, rows_each = 18, heads = 12, dim = 64, rows = n_seq * rows_each;
    std::vector<int32_t> row_begin, start(static_cast<size_t>(n_seq), 0),
        slot(static_cast<size_t>(n_seq), -1);
    for (int32_t s = 0; s <= n_seq; ++s) row_begin.push_back(s * rows_each);
    const Batch batch{n_seq,        rows,        rows_each, rows_each, row_begin.data(),
                      start.data(), slot.data(), nullptr};
    const Buffer q = filled(backend, int64_t{rows} * heads * dim),
                 out = filled(backend, int64_t{rows} * heads * dim);
    const Tensor x = tensor_of(q, rows, heads * dim);
    const double peak = machine.peak(DType::bf16);
    const double s = best_seconds(budget, [&] {
        backend.attention(tensor_of(out, rows, heads * dim), x, x, x,
                          AttentionShape{heads, heads, dim, 0.125f, DType::bf16}, nullptr, 0, batch);
    });
    const double gflops = 4e-9 * heads * dim * rows_each * rows / s;
    std::printf("| %d chunks of %d, 12 heads, dim 64 | %.1f | %.0f | %.2f |\n", n_seq, rows_each, gflops,
                peak, gflops / peak);
}

void bench_rows(Backend& backend, const Machine& machine, double budget) {
    std::printf(
        "\n| op, 2048 x 768 | elements / ns | memory touched GB/s | read GB/s |\n|---|---|---|---|\n");
    const int64_t rows = 2048, cols = 768;
    const Buffer a = filled(backend, rows * cols), b = filled(backend, rows * cols),
                 w = filled(backend, cols), table = filled(backend, rows * 64),
                 logits = filled(backend, 64 * 32000), one = filled(backend, 64);
    const Tensor x = tensor_of(a, rows, cols), y = tensor_of(b, rows, cols), weight = tensor_of(w, 1, cols);
    std::fill_n(y.f32(), y.size(), 1.0f);
    const auto row = [&](const char* name, double elements, double bytes, const std::function<void()>& body) {
        // Ops work in place, again and again: numbers that none of them drives towards 0, where all is slow.
        std::fill_n(x.f32(), x.size(), 8.0f);
        const double read = machine.peaks.read_gbs, s = best_seconds(budget, body);
        std::printf("| %s | %.2f | %.1f | %.1f |\n", name, elements / s * 1e-9, elements * bytes / s * 1e-9,
                    read);
        std::fflush(stdout);
    };
    const double n = static_cast<double>(rows * cols);
    row("add", n, 12, [&] { backend.add(x, y); });
    row("gelu", n, 8, [&] { backend.gelu(x); });
    row("tanh", n, 8, [&] { backend.tanh(x); });
    row("silu_mul", n, 12, [&] { backend.silu_mul(x, y); });
    row("rms_norm", n, 8, [&] { backend.rms_norm(y, x, weight, 1e-5f); });
    row("layer_norm", n, 8, [&] { backend.layer_norm(y, x, weight, weight, 1e-5f); });
    row("rope", n, 8, [&] { backend.rope(x, tensor_of(table, rows, 64)); });
    const std::vector<int32_t> target(64, 5);
    row("nll, 64 x 32000", 64.0 * 32000, 4,
        [&] { backend.nll(tensor_of(one, 1, 64), tensor_of(logits, 64, 32000), target.data()); });
}

}  // namespace

int main(int argc, char** argv) {
    try {
        const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
        const double budget = argc > 2 ? std::atof(argv[2]) : 0.1;
        const auto backend = make_cpu_backend(threads);
        Machine machine{threads, {}};
        std::printf("%s\n", backend->device().description().c_str());
        const auto table = [&](void (*bench)(Backend&, const Machine&, double)) {
            machine.measure();
            const MachinePeaks& peaks = machine.peaks;
            std::printf(
                "\npeaks: fp32 %.0f GFLOP/s, bf16 %.0f GFLOP/s, int8 %.0f GOP/s, memory read %.1f GB/s\n",
                peaks.fp32_gflops, peaks.bf16_gflops, peaks.int8_gops, peaks.read_gbs);
            bench(*backend, machine, budget);
        };
        table(bench_linear);
        table(bench_attention);
        table(bench_encoder);
        table(bench_rows);
    } catch (const Error& e) {
        std::fprintf(stderr, "bench_ops: %s\n", e.what());
        return 1;
    }
    return 0;
}
