// CUDA with --deterministic: a row of a product has the bits that it has alone, whatever the number of rows
// it comes with and its place among them. Numbers are drawn, so that every other order of a sum shows.
#include <array>

#include "backends_test.h"

using namespace refrag_test;
using refrag::Product;

namespace {

// The rows [first, first + n) of a call's results, one op behind the other.
struct Results {
    std::array<Floats, 4> of_op;

    bool operator==(const Results& other) const {
        for (size_t i = 0; i < of_op.size(); ++i) {
            if (!same_bits(of_op[i], other.of_op[i])) return false;
        }
        return true;
    }
    Results rows(int64_t first, int64_t n, int64_t cols) const {
        Results some;
        for (size_t i = 0; i < of_op.size(); ++i) {
            const Floats& all = of_op[i];
            some.of_op[i] = Floats(all.begin() + first * cols, all.begin() + (first + n) * cols);
        }
        return some;
    }
};

struct Weights {
    std::unique_ptr<Matrix> gate, up;
    Floats bias;
};

// linear, linears, linear_add and linear_silu_mul of these rows.
Results products(Backend& backend, const Weights& w, const Floats& x, const Floats& before) {
    On on(backend);
    const int64_t in_dim = w.gate->in_dim(), out_dim = w.gate->out_dim(), rows = std::ssize(x) / in_dim;
    const Tensor xs = on.put(x, rows, in_dim), bias = on.put(w.bias, 1, out_dim);
    const Tensor one = on.empty(rows, out_dim), first = on.empty(rows, out_dim),
                 second = on.empty(rows, out_dim), sum = on.put(before, rows, out_dim),
                 gated = on.empty(rows, out_dim);
    backend.linear(one, xs, *w.gate, bias);
    const std::array both = {Product{first, w.gate.get(), Tensor{}}, Product{second, w.up.get(), bias}};
    backend.linears(xs, both);
    backend.linear_add(sum, xs, {one, w.up.get(), bias});
    Results results{{on.get(one), on.get(second), on.get(sum), {}}};
    backend.linear_silu_mul(xs, {gated, w.gate.get(), bias}, {one, w.up.get(), Tensor{}});
    results.of_op[3] = on.get(gated);
    return results;
}

Floats part_of(const Floats& x, int64_t first, int64_t n, int64_t cols) {
    return Floats(x.begin() + first * cols, x.begin() + (first + n) * cols);
}

}  // namespace

TEST_CASE("backends: deterministic products of a row are those of the row alone") {
    constexpr int64_t kRows = 131, kOut = 20;
    for (const auto& backend : every_backend(true)) {
        if (!backend->device().is_remote()) continue;
        CAPTURE(backend->device().description());
        for (const DType dtype : {DType::bf16, DType::f16, DType::i8, DType::f32}) {
            // Of a few of the tiles' steps, of nearly one, of odd lengths, and of many.
            for (const int64_t in_dim : {296, 24, 33, 1000}) {
                CAPTURE(refrag::dtype_name(dtype));
                CAPTURE(in_dim);
                const Weights w{matrix_of(*backend, dtype, kOut, in_dim, exact_floats(kOut * in_dim, 1)),
                                matrix_of(*backend, dtype, kOut, in_dim, exact_floats(kOut * in_dim, 2)),
                                random_floats(kOut, 3)};
                const Floats x = random_floats(kRows * in_dim, 4), before = random_floats(kRows * kOut, 5);
                const auto rows = [&](int64_t first, int64_t n) {
                    return products(*backend, w, part_of(x, first, n, in_dim),
                                    part_of(before, first, n, kOut));
                };
                const Results all = rows(0, kRows);
                for (const int64_t alone : {0, 9, 63, 64, 130})
                    CHECK(rows(alone, 1) == all.rows(alone, 1, kOut));
                for (const int64_t n : {2, 8, 9, 16, 17, 64, 65}) {
                    CAPTURE(n);
                    // In other places of a tile than in the whole.
                    CHECK(rows(3, n) == all.rows(3, n, kOut));
                }
            }
        }
    }
}

// Rounded activations are all that a product in tiles leaves out: 2^-9 of each term in bf16, 2^-12 in F16.
// Sums are fp32.
TEST_CASE("backends: deterministic products are right to the rounding of activations") {
    constexpr int64_t kOut = 20, kIn = 500;
    const Floats w = exact_floats(kOut * kIn, 1);
    for (const auto& backend : every_backend(true)) {
        if (!backend->device().is_remote()) continue;
        CAPTURE(backend->device().description());
        for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
            for (const int64_t rows : {1, 70}) {
                CAPTURE(refrag::dtype_name(dtype));
                const Floats x = random_floats(rows * kIn, 2);
                On on(*backend);
                const auto matrix = matrix_of(*backend, dtype, kOut, kIn, w);
                const Tensor out = on.empty(rows, kOut);
                backend->linear(out, on.put(x, rows, kIn), *matrix, Tensor{});
                const Floats got = on.get(out);
                const double rounding = dtype == DType::bf16 ? 0x1p-9 : dtype == DType::f16 ? 0x1p-12 : 0.0;
                int64_t wrong = 0;
                for (int64_t r = 0; r < rows; ++r) {
                    for (int64_t n = 0; n < kOut; ++n) {
                        double sum = 0.0, size = 0.0;
                        for (int64_t k = 0; k < kIn; ++k) {
                            const double term = static_cast<double>(x[static_cast<size_t>(r * kIn + k)]) *
                                                static_cast<double>(w[static_cast<size_t>(n * kIn + k)]);
                            sum += term;
                            size += std::fabs(term);
                        }
                        wrong += within(got[static_cast<size_t>(r * kOut + n)], sum,
                                        1.01 * (rounding + gamma_n(kIn + 2)) * size)
                                     ? 0
                                     : 1;
                    }
                }
                CHECK(wrong == 0);
            }
        }
    }
}

TEST_CASE("backends: in deterministic products a NaN stays in its row, or its column") {
    constexpr int64_t kRows = 70, kOut = 24, kIn = 40;
    for (const auto& backend : every_backend(true)) {
        if (!backend->device().is_remote()) continue;
        CAPTURE(backend->device().description());
        for (const int64_t rows : {int64_t{5}, kRows}) {
            Floats x = exact_floats(rows * kIn, 6), w = exact_floats(kOut * kIn, 7);
            const auto run = [&] {
                On on(*backend);
                const auto matrix = matrix_of(*backend, DType::bf16, kOut, kIn, w);
                const Tensor out = on.empty(rows, kOut);
                backend->linear(out, on.put(x, rows, kIn), *matrix, Tensor{});
                return on.get(out);
            };
            const Floats clean = run();
            x[static_cast<size_t>(3 * kIn + 39)] = kNan;
            w[static_cast<size_t>(17 * kIn + 1)] = kInf;
            const Floats bad = run();
            int64_t wrong = 0;
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t n = 0; n < kOut; ++n) {
                    const auto at = static_cast<size_t>(r * kOut + n);
                    const bool touched = r == 3 || n == 17;
                    wrong +=
                        touched ? (std::isfinite(bad[at]) ? 1 : 0) : (same_bits(bad[at], clean[at]) ? 0 : 1);
                }
            }
            CHECK(wrong == 0);
        }
    }
}
