// Matrix products and embedding look-ups against double-precision references.
//
// Bound of a product: an output is one chain of in_dim multiply-adds and one addition of the bias. Without
// fused multiply-adds (scalar, x86-64) every product rounds too, so no element passes through more than
// in_dim + 2 roundings: |error| <= gamma_n(in_dim + 2) * (sum |x w| + |bias|). Nothing underflows at these
// sizes.
#include <algorithm>

#include "cpu/kernels.h"
#include "ops_test.h"

using namespace refrag_test;
using refrag::Error;
using refrag::make_cpu_backend;

namespace {

// Whether a backend with this instruction set rounds x to bf16 before a product with BF16 weights.
bool rounds_x(CpuIsa isa, DType weights) {
    return weights == DType::bf16 && (isa == CpuIsa::avx512_bf16 || isa == CpuIsa::amx);
}

Floats rounded_to_bf16(Floats x) {
    for (float& value : x) value = refrag::bf16_to_f32(refrag::f32_to_bf16(value));
    return x;
}

void check_linear(Backend& backend, CpuIsa isa, DType dtype, int64_t rows, int64_t out_dim, int64_t in_dim,
                  bool with_bias) {
    CAPTURE(refrag::dtype_name(dtype));
    CAPTURE(rows);
    CAPTURE(out_dim);
    CAPTURE(in_dim);
    const FileMatrix file(dtype, out_dim, in_dim, 11);
    const auto w = file.make(backend);
    Floats x = random_floats(rows * in_dim, 12);
    const Floats bias = with_bias ? random_floats(out_dim, 13) : Floats{};
    const Floats out = run_linear(backend, x, rows, *w, bias);
    if (rounds_x(isa, dtype)) x = rounded_to_bf16(x);
    int64_t wrong = 0;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < out_dim; ++n) {
            double sum = 0.0, size = 0.0;
            for (int64_t k = 0; k < in_dim; ++k) {
                const double term = static_cast<double>(x[static_cast<size_t>(r * in_dim + k)]) *
                                    static_cast<double>(file.values[static_cast<size_t>(n * in_dim + k)]);
                sum += term;
                size += std::fabs(term);
            }
            if (with_bias) {
                sum += static_cast<double>(bias[static_cast<size_t>(n)]);
                size += std::fabs(static_cast<double>(bias[static_cast<size_t>(n)]));
            }
            if (!within(out[static_cast<size_t>(r * out_dim + n)], sum, gamma_n(in_dim + 2) * size)) ++wrong;
        }
    }
    CHECK(wrong == 0);
}

}  // namespace

TEST_CASE_TEMPLATE("ops: linear at awkward sizes", T, Scalar, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        // Rows around the tile of 6, columns around panels of 16 and groups of 64, odd and single k.
        for (const int64_t rows : {1, 3, 5, 6, 7, 13})
            check_linear(*backend, T::isa, dtype, rows, 65, 33, true);
        for (const int64_t out_dim : {1, 3, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 113}) {
            check_linear(*backend, T::isa, dtype, 7, out_dim, 31, out_dim % 2 == 0);
        }
        for (const int64_t in_dim : {1, 2, 3, 15, 16, 63, 65, 255, 256, 257, 513}) {
            check_linear(*backend, T::isa, dtype, 7, 33, in_dim, true);
        }
        // Enough rows to widen 2-byte weights first, and two row blocks.
        check_linear(*backend, T::isa, dtype, 24, 65, 259, true);
        check_linear(*backend, T::isa, dtype, 25, 17, 1, false);
        check_linear(*backend, T::isa, dtype, 201, 33, 65, true);
        // Several blocks of the inner dimension, whose sums pass through the output.
        for (const int64_t in_dim : {1024, 1025, 2051}) {
            check_linear(*backend, T::isa, dtype, 8, 17, in_dim, true);
            check_linear(*backend, T::isa, dtype, 26, 17, in_dim, true);
        }
        // Around the tiles of 16 rows, 32 k and two panels, and a block of 256 rows, of the bf16 products.
        for (const int64_t rows : {15, 16, 17, 31, 32, 33, 48, 63}) {
            check_linear(*backend, T::isa, dtype, rows, 49, 97, true);
        }
        for (const int64_t rows : {255, 256, 257, 513}) {
            check_linear(*backend, T::isa, dtype, rows, 19, 290, true);
        }
        check_linear(*backend, T::isa, dtype, 1, 2065, 96, true);
    }
}

TEST_CASE_TEMPLATE("ops: a row's product does not depend on its batch or the threads", T, Scalar, Avx2,
                   Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    // Two row blocks, and two blocks of the inner dimension for all but a single row tile.
    constexpr int64_t rows = 205, out_dim = 83, in_dim = 1031;
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        const FileMatrix file(dtype, out_dim, in_dim, 21);
        const Floats x = random_floats(rows * in_dim, 22), bias = random_floats(out_dim, 23);
        Floats first;
        for (const int threads : {1, 2, 3}) {
            const auto backend = make_cpu_backend(threads, T::isa);
            const auto w = file.make(*backend);
            const Floats all = run_linear(*backend, x, rows, *w, bias);
            if (first.empty()) first = all;
            CHECK(same_bits(all, first));
            for (const int64_t r : {0, 5, 6, 191, 192, 204}) {
                const Floats row(x.begin() + r * in_dim, x.begin() + (r + 1) * in_dim);
                const Floats expected(all.begin() + r * out_dim, all.begin() + (r + 1) * out_dim);
                CHECK(same_bits(run_linear(*backend, row, 1, *w, bias), expected));
            }
            const Floats part(x.begin(), x.begin() + 11 * in_dim);
            CHECK(same_bits(run_linear(*backend, part, 11, *w, bias),
                            Floats(all.begin(), all.begin() + 11 * out_dim)));
        }
    }
}

TEST_CASE_TEMPLATE("ops: bf16 and f16 weights give what their widened values give", T, Scalar, Avx2, Avx512,
                   Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(1, T::isa);
    for (const DType dtype : {DType::bf16, DType::f16}) {
        const FileMatrix file(dtype, 37, 67, 31);
        FileMatrix wide(DType::f32, 37, 67, 31);
        std::memcpy(wide.bytes.data(), file.values.data(), wide.bytes.size());
        for (const int64_t rows : {2, 30}) {
            const Floats x = random_floats(rows * 67, 32);
            if (rounds_x(T::isa, dtype)) continue;  // another order of the sum
            CHECK(same_bits(run_linear(*backend, x, rows, *file.make(*backend), {}),
                            run_linear(*backend, x, rows, *wide.make(*backend), {})));
        }
    }
}

TEST_CASE_TEMPLATE("ops: NaN and inf stay in their row, and pass as in the formula", T, Scalar, Avx2, Avx512,
                   Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    constexpr int64_t out_dim = 35, in_dim = 19;
    for (const int64_t rows : {9, 40}) {
        for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
            const FileMatrix file(dtype, out_dim, in_dim, 41);
            const auto w = file.make(*backend);
            Floats x = random_floats(rows * in_dim, 42);
            const Floats clean = run_linear(*backend, x, rows, *w, {});
            x[4 * in_dim + 18] = kNan;
            x[7 * in_dim + 2] = kInf;
            const Floats out = run_linear(*backend, x, rows, *w, {});
            bool right = true;
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t n = 0; n < out_dim; ++n) {
                    const float got = out[static_cast<size_t>(r * out_dim + n)];
                    float expected = clean[static_cast<size_t>(r * out_dim + n)];
                    if (r == 4) expected = kNan;
                    if (r == 7) expected = kInf * file.values[static_cast<size_t>(n * in_dim + 2)];
                    right = right && same_bits(got, expected);
                }
            }
            CHECK(right);
        }
    }
}

TEST_CASE_TEMPLATE("ops: linear_gelu is linear, then gelu", T, Scalar, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const int64_t rows : {1, 7, 200}) {
        const FileMatrix file(DType::bf16, 83, 65, 51);
        const auto w = file.make(*backend);
        const Floats x = random_floats(rows * 65, 52), bias = random_floats(83, 53);
        Floats expected = run_linear(*backend, x, rows, *w, bias);
        backend->gelu(view(expected, rows, 83));
        CHECK(same_bits(run_linear(*backend, x, rows, *w, bias, true), expected));
    }
}

TEST_CASE_TEMPLATE("ops: several products of one x are linear, one by one", T, Scalar, Avx2, Avx512,
                   Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    // Of one dtype, and of two, which no fused product can do at once.
    for (const DType second : {DType::bf16, DType::f32}) {
        for (const int64_t rows : {1, 18, 270}) {
            const int64_t dims[] = {83, 16, 700};
            const FileMatrix files[] = {
                {DType::bf16, dims[0], 65, 61}, {second, dims[1], 65, 62}, {DType::bf16, dims[2], 65, 63}};
            Floats x = random_floats(rows * 65, 64);
            std::vector<std::unique_ptr<Matrix>> w;
            std::vector<Floats> biases, out, expected;
            for (size_t i = 0; i < 3; ++i) {
                w.push_back(files[i].make(*backend));
                biases.push_back(i == 1 ? Floats{} : random_floats(dims[i], 65));
                out.emplace_back(static_cast<size_t>(rows * dims[i]), kNan);
                expected.push_back(run_linear(*backend, x, rows, *w[i], biases[i]));
            }
            std::vector<refrag::Product> products;
            for (size_t i = 0; i < 3; ++i) {
                products.push_back({view(out[i], rows, dims[i]), w[i].get(),
                                    biases[i].empty() ? Tensor{} : view(biases[i], 1, dims[i])});
            }
            backend->linears(view(x, rows, 65), products);
            for (size_t i = 0; i < 3; ++i) CHECK(same_bits(out[i], expected[i]));
        }
    }
}

// Depths of one and of several pieces, columns that end within a panel, rows on both sides of kEpilogueRows.
TEST_CASE_TEMPLATE("ops: fused products are their definitions", T, Scalar, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    constexpr int64_t n = 99;
    for (const DType dtype : {DType::bf16, DType::f32}) {
        for (const int64_t depth : {70, 2100}) {
            const FileMatrix gate_file(dtype, n, depth, 71), up_file(dtype, n, depth, 72);
            const auto gate_w = gate_file.make(*backend), up_w = up_file.make(*backend);
            for (const int64_t rows : {1, 17, 33, 300}) {
                Floats x = random_floats(rows * depth, 73), bias = random_floats(n, 74);
                x[static_cast<size_t>((rows - 1) * depth)] = kNan;
                for (const bool biased : {false, true}) {
                    CAPTURE(static_cast<int>(dtype));
                    CAPTURE(depth);
                    CAPTURE(rows);
                    CAPTURE(biased);
                    const Tensor b = biased ? view(bias, 1, n) : Tensor{};
                    Floats gate = run_linear(*backend, x, rows, *gate_w, biased ? bias : Floats{});
                    Floats up = run_linear(*backend, x, rows, *up_w, {});
                    const Floats before = random_floats(rows * n, 75);
                    Floats sum = before, residual = before, out(gate.size(), kNan), scratch = out;
                    backend->add(view(sum, rows, n), view(gate, rows, n));
                    backend->linear_add(view(residual, rows, n), view(x, rows, depth),
                                        {view(scratch, rows, n), gate_w.get(), b});
                    CHECK(same_bits(residual, sum));

                    backend->silu_mul(view(gate, rows, n), view(up, rows, n));
                    backend->linear_silu_mul(view(x, rows, depth), {view(out, rows, n), gate_w.get(), b},
                                             {view(scratch, rows, n), up_w.get(), Tensor{}});
                    CHECK(same_bits(out, gate));
                }
            }
        }
    }
}

TEST_CASE_TEMPLATE("ops: bf16 kernels against the scalar definition", T, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const refrag::CpuKernels& kernels = refrag::cpu_kernels(T::isa);
    REQUIRE(static_cast<bool>(kernels.gemm_bf16));
    // Rounding: halfway cases, the largest finite value, infinities, NaNs with any payload, denormals.
    Floats special = {0.0f,        -0.0f,       kInf,          -kInf,  1.0f,
                      1.00390625f, 1.01171875f, 3.4028235e38f, 1e-40f, -1e-40f};
    for (int i = 0; i < 200; ++i) special.push_back(random_floats(1, static_cast<uint32_t>(i), 1e3f)[0]);
    special.push_back(kNan);
    const auto n = static_cast<int64_t>(special.size());
    std::vector<uint16_t> fast(static_cast<size_t>(refrag::tile_k_ceil(n) * refrag::kPanel), 7), plain = fast;
    for (const int64_t rows : {1, 3}) {
        const int64_t ld = n / rows;
        kernels.pack_bf16(fast.data(), special.data(), ld, rows, ld);
        refrag::scalar::pack_bf16(plain.data(), special.data(), ld, rows, ld);
        CHECK(
            std::equal(fast.begin(), fast.begin() + refrag::tile_k_ceil(ld) * refrag::kPanel, plain.begin()));
    }
    // Sums: strides larger than the operands, parts of tiles, accumulation; nothing beyond n_cols is written.
    for (const int64_t rows : {1, 2, 7, 8, 9, 16, 17, 40, 270}) {
        for (const int64_t n_cols : {1, 16, 17, 32, 33, 95, 96, 97}) {
            for (const int64_t k_tiles : {1, 2, 9}) {
                CAPTURE(rows);
                CAPTURE(n_cols);
                CAPTURE(k_tiles);
                const int64_t k = k_tiles * refrag::kTileK, ldc = n_cols + 5;
                const int64_t a_stride = k * refrag::kPanel + 64, b_stride = k * refrag::kPanel + 32;
                const int64_t blocks = (rows + 15) / 16, panels = (n_cols + 15) / 16;
                std::vector<uint16_t> a(static_cast<size_t>(blocks * a_stride)),
                    b(static_cast<size_t>(panels * b_stride));
                const Floats fa = random_floats(std::ssize(a), 81), fb = random_floats(std::ssize(b), 82);
                for (size_t i = 0; i < a.size(); ++i) a[i] = refrag::f32_to_bf16(fa[i]);
                for (size_t i = 0; i < b.size(); ++i) b[i] = refrag::f32_to_bf16(fb[i]);
                const Floats before = random_floats(rows * ldc, 83);
                for (const bool accumulate : {false, true}) {
                    Floats c = before, expected = before;
                    const float* const start = accumulate ? before.data() : nullptr;
                    refrag::Bf16Gemm g{a.data(), a_stride, b.data(), b_stride, c.data(),
                                       ldc,      rows,     n_cols,   k_tiles,  start};
                    kernels.gemm_bf16(g);
                    g.c = expected.data();
                    refrag::scalar::gemm_bf16(g);
                    int64_t wrong = 0;
                    for (int64_t r = 0; r < rows; ++r) {
                        for (int64_t i = 0; i < ldc; ++i) {
                            const auto at = static_cast<size_t>(r * ldc + i);
                            // Both sums have at most k + 1 roundings of terms at most 1 in size.
                            const double bound = 2 * gamma_n(k + 1) * static_cast<double>(k + 1);
                            const bool right = i < n_cols
                                                   ? within(c[at], static_cast<double>(expected[at]), bound)
                                                   : same_bits(c[at], before[at]);
                            if (!right) ++wrong;
                        }
                    }
                    CHECK(wrong == 0);
                }
            }
        }
    }
}

TEST_CASE("ops: products without rows or columns") {
    const auto backend = make_cpu_backend(2, CpuIsa::scalar);
    const FileMatrix file(DType::f32, 5, 3, 61);
    const auto w = file.make(*backend);
    CHECK(run_linear(*backend, {}, 0, *w, {}).empty());
    // Nothing to sum: the bias alone.
    const auto empty = FileMatrix(DType::f32, 5, 0, 61).make(*backend);
    const Floats bias = random_floats(5, 62);
    CHECK(same_bits(run_linear(*backend, {}, 1, *empty, bias), bias));
    CHECK(FileMatrix(DType::f32, 0, 5, 61).make(*backend)->device_bytes() == 0);
}

TEST_CASE("ops: make_matrix reads every row once, in order, and passes a reader's error on") {
    const auto backend = make_cpu_backend(2, CpuIsa::scalar);
    // 2000 rows of 4 KiB come in several blocks.
    std::vector<int64_t> seen;
    const auto w =
        backend->device().make_matrix(DType::f32, 2000, 1024, [&](int64_t row, int64_t n, void* dst) {
            auto* to = static_cast<float*>(dst);
            for (int64_t r = row; r < row + n; ++r) {
                seen.push_back(r);
                for (int64_t k = 0; k < 1024; ++k) *to++ = static_cast<float>(r * 1024 + k);
            }
        });
    CHECK(w->device_bytes() == 2000 * 1024 * 4);
    bool in_order = seen.size() == 2000;
    for (size_t i = 0; i < seen.size(); ++i) in_order = in_order && seen[i] == static_cast<int64_t>(i);
    CHECK(in_order);
    std::vector<int32_t> ids = {1999, 0, 1023, 1024};
    Floats out(4 * 1024);
    backend->embed(view(out, 4, 1024), *w, ids.data(), Tensor{});
    for (size_t i = 0; i < 4; ++i) CHECK(out[i * 1024 + 7] == static_cast<float>(ids[i] * 1024 + 7));

    CHECK(error_of([&] {
              backend->device().make_matrix(DType::f32, 2000, 1024, [](int64_t row, int64_t, void*) {
                  if (row > 0) refrag::fail(refrag::Status::runtime, "read failed");
              });
          }) == "read failed");
    CHECK_THROWS_AS(backend->device().make_matrix(DType::i32, 1, 1, [](int64_t, int64_t, void*) {}), Error);
}

TEST_CASE_TEMPLATE("ops: embed takes rows from the table and from vectors given from outside", T, Scalar,
                   Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        for (const int64_t dim : {1, 17, 64, 127}) {
            const FileMatrix file(dtype, 45, dim, 71);
            const auto table = file.make(*backend);
            Floats vectors = random_floats(3 * dim, 72);
            const std::vector<int32_t> source = {0, 44, -1, 15, 16, -3, -2, 31, 0};
            const auto n = static_cast<int64_t>(source.size());
            Floats out(static_cast<size_t>(n * dim));
            backend->embed(view(out, n, dim), *table, source.data(), view(vectors, 3, dim));
            Floats expected;
            for (const int32_t s : source) {
                const Floats& from = s >= 0 ? file.values : vectors;
                const int64_t at = (s >= 0 ? s : -1 - s) * dim;
                expected.insert(expected.end(), from.begin() + at, from.begin() + at + dim);
            }
            CHECK(same_bits(out, expected));

            const std::vector<int32_t> ids = {3, 3, 44, 0, 17, 1, 2, 9, 40};
            backend->add_embed(view(out, n, dim), *table, ids.data());
            for (int64_t r = 0; r < n; ++r) {
                for (int64_t k = 0; k < dim; ++k) {
                    expected[static_cast<size_t>(r * dim + k)] +=
                        file.values[static_cast<size_t>(ids[static_cast<size_t>(r)] * dim + k)];
                }
            }
            CHECK(same_bits(out, expected));
            backend->embed(Tensor{nullptr, DType::f32, 0, dim}, *table, nullptr, Tensor{});
        }
    }
}

TEST_CASE_TEMPLATE("ops: bf16 products of few rows are those of many, whatever the bits", T, Avx512Bf16,
                   Amx) {
    REQUIRE_ISA(T);
    const refrag::CpuKernels& kernels = refrag::cpu_kernels(T::isa);
    constexpr int64_t rows = 16, n_cols = 16 * 7 + 3, k_tiles = 5;
    constexpr int64_t stride = k_tiles * refrag::kTileElements, panels = 8;
    std::mt19937 random(91);
    // Any bits at all: denormals, infinities and NaNs among them; then small numbers, whose products are
    // denormal, and sums that begin denormal.
    for (const int mode : {0, 1}) {
        std::vector<uint16_t> a(stride), b(panels * stride);
        const auto value = [&](float scale) {
            return mode == 0 ? static_cast<uint16_t>(random())
                             : refrag::f32_to_bf16(scale * (static_cast<float>(random() % 2048) - 1024));
        };
        for (uint16_t& x : a) x = value(1e-21f);
        for (uint16_t& x : b) x = value(1e-21f);
        Floats before = random_floats(rows * n_cols, 92, mode == 0 ? 1.0f : 1e-38f);
        for (const bool accumulate : {false, true}) {
            Floats many = before;
            const auto multiply = [&](Floats& c, int64_t n) {
                kernels.gemm_bf16({a.data(), stride, b.data(), stride, c.data(), n_cols, n, n_cols, k_tiles,
                                   accumulate ? c.data() : nullptr});
            };
            multiply(many, rows);
            for (const int64_t n : {1, 2, 3}) {
                CAPTURE(mode);
                CAPTURE(n);
                Floats few = before;
                multiply(few, n);
                CHECK(same_bits(Floats(few.begin(), few.begin() + n * n_cols),
                                Floats(many.begin(), many.begin() + n * n_cols)));
            }
        }
    }
}
