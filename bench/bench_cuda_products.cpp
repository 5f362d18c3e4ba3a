// The products' tables of bench_cuda (bench_cuda.h).
#include <algorithm>
#include <cstdio>

#include "bench_cuda.h"

namespace refrag_bench {

using namespace refrag;

namespace {

using Matrices = std::vector<std::unique_ptr<Matrix>>;

struct Timed {
    double seconds;
    std::string off;
};

// By `by`, and how far off what `other` computes. kRounded where one of them rounds activations.
Timed product(Bench& bench, const Matrices& w, int64_t rows, Backend& by, Backend& other, double limit) {
    Arena arena(bench.b);
    const Tensor x = bench.tensor(arena, rows, w[0]->in_dim()), out = arena.tensor(rows, w[0]->out_dim()),
                 expected = arena.tensor(rows, w[0]->out_dim());
    bench.b.wait();
    const double s = bench.seconds_of(
        by, [&](int64_t i) { by.linear(out, x, *w[static_cast<size_t>(i) % w.size()], Tensor{}); });
    by.linear(out, x, *w[0], Tensor{});
    other.linear(expected, x, *w[0], Tensor{});
    return {s, bench.off(Bench::values(by, out), Bench::values(other, expected), limit)};
}

void print_row(Bench& bench, const Matrices& w, int64_t rows, const std::string& figures) {
    std::fprintf(bench.tables, "| %lld x %lld | %s | %lld | %s |\n", static_cast<long long>(w[0]->out_dim()),
                 static_cast<long long>(w[0]->in_dim()), dtype_name(w[0]->dtype()),
                 static_cast<long long>(rows), figures.c_str());
    std::fflush(bench.tables);
}

std::string figures(const char* format, double a, double b, double c) {
    char text[96];
    std::snprintf(text, sizeof text, format, a, b, c);
    return text;
}

}  // namespace

void matrix_vector(Bench& bench) {
    std::fprintf(bench.tables,
                 "\n| linear: out x in | weights | rows | us | weights GB/s | of read | off "
                 "|\n|---|---|---|---|---|---|---|\n");
    for (const auto& [out_dim, in_dim] : bench.sizes.products) {
        for (const DType dtype : {DType::bf16, DType::i8}) {
            const auto w = bench.matrices(dtype, out_dim, in_dim);
            for (const int64_t rows : bench.sizes.few_rows) {
                const Timed t = product(bench, w, rows, bench.b, bench.cublas(), kRounded);
                const double gbs = static_cast<double>(w[0]->device_bytes()) / t.seconds * 1e-9;
                print_row(bench, w, rows,
                          figures("%.1f | %.0f | %.2f | ", t.seconds * 1e6, gbs, gbs / bench.peaks.read_gbs) +
                              t.off);
            }
        }
    }
}

// Where cuBLAS becomes the faster one.
void own_against_cublas(Bench& bench) {
    std::fprintf(bench.tables,
                 "\n| linear: out x in | weights | rows | own us | cuBLAS us | own / cuBLAS | off |\n"
                 "|---|---|---|---|---|---|---|\n");
    for (const auto& [out_dim, in_dim] : bench.sizes.products) {
        const auto w = bench.matrices(DType::bf16, out_dim, in_dim);
        for (const int64_t rows : bench.sizes.crossing_rows) {
            const Timed own = product(bench, w, rows, bench.own_products(), bench.cublas(), kRounded),
                        other = product(bench, w, rows, bench.cublas(), bench.own_products(), kRounded);
            print_row(bench, w, rows,
                      figures("%.1f | %.1f | %.2f | ", own.seconds * 1e6, other.seconds * 1e6,
                              own.seconds / other.seconds) +
                          own.off);
        }
    }
}

void matrix_matrix(Bench& bench) {
    std::fprintf(bench.tables,
                 "\n| linear: out x in | weights | rows | us | TFLOP/s | of bf16 | off "
                 "|\n|---|---|---|---|---|---|---|\n");
    const auto table = [&](int64_t out_dim, int64_t in_dim, const std::vector<int64_t>& all_rows,
                           std::initializer_list<DType> dtypes) {
        for (const DType dtype : dtypes) {
            const auto w = bench.matrices(dtype, out_dim, in_dim);
            for (const int64_t rows : all_rows) {
                const Timed t = product(bench, w, rows, bench.b, bench.own_products(), kRounded);
                const double tflops = 2e-12 * static_cast<double>(out_dim) * static_cast<double>(in_dim) *
                                      static_cast<double>(rows) / t.seconds;
                print_row(bench, w, rows,
                          figures("%.1f | %.1f | %.2f | ", t.seconds * 1e6, tflops,
                                  tflops * 1e3 / bench.peaks.bf16_gflops) +
                              t.off);
            }
        }
    };
    for (const auto& [out_dim, in_dim] : bench.sizes.products)
        table(out_dim, in_dim, bench.sizes.many_rows, {DType::bf16, DType::i8});
    for (const auto& [out_dim, in_dim] : bench.sizes.encoder_products)
        table(out_dim, in_dim, {bench.sizes.encoder_rows}, {DType::bf16});
}

// What --deterministic costs.
void deterministic_products(Bench& bench) {
    std::fprintf(bench.tables,
                 "\n| linear, deterministic: out x in | weights | rows | us | TFLOP/s | of bf16 | off |\n"
                 "|---|---|---|---|---|---|---|\n");
    const auto& [out_dim, in_dim] = bench.sizes.products[bench.sizes.products.size() / 2];
    for (const DType dtype : {DType::bf16, DType::i8}) {
        const auto w = bench.matrices(dtype, out_dim, in_dim);
        for (const int64_t rows : bench.sizes.deterministic_rows) {
            const Timed t = product(bench, w, rows, bench.deterministic(), bench.own_products(), kRounded);
            const double tflops = 2e-12 * static_cast<double>(out_dim) * static_cast<double>(in_dim) *
                                  static_cast<double>(rows) / t.seconds;
            print_row(bench, w, rows,
                      figures("%.1f | %.1f | %.2f | ", t.seconds * 1e6, tflops,
                              tflops * 1e3 / bench.peaks.bf16_gflops) +
                          t.off);
        }
    }
}

}  // namespace refrag_bench
