// Products with 8-bit weights in every way that this CPU has of computing them (CpuInt8), against the weights
// that the matrix stands for, q * scale, in double precision.
//
// Bounds of an output, sum_k |x w| written S:
//   widen  As test_ops_linear.cpp: in_dim + 2 roundings.
//   bf16   The same bits as a BF16 matrix of the weights rounded to bf16, which is under test there.
//   vnni   x is replaced by its nearest multiple of max |x| / 127 within each group of 32: at most 0.5001 of
//   that
//          away (the rest for the roundings of that factor), times the group's sum of |w|. Group sums are
//          exact, then each passes through the roundings of the scales' product, of its own product, of as
//          many additions as there are groups, and of the bias.
#include <algorithm>
#include <array>
#include <bit>

#include "base/int8.h"
#include "cpu/kernels.h"
#include "ops_test.h"

using namespace refrag_test;
using refrag::cpu_supports;
using refrag::CpuInt8;
using refrag::int8_groups;
using refrag::kInt8Group;
using refrag::make_cpu_backend;

namespace {

constexpr CpuInt8 kWays[] = {CpuInt8::widen, CpuInt8::bf16, CpuInt8::vnni};

// A matrix as a loader delivers it, and the values that it stands for.
struct Int8File {
    int64_t out_dim;
    int64_t in_dim;
    std::vector<uint16_t> bytes;
    Floats values;

    Int8File(int64_t out, int64_t in, uint32_t seed) : out_dim(out), in_dim(in) {
        const Floats w = random_floats(out * in, seed);
        const size_t row_halves = refrag::int8_row_bytes(in) / 2;
        bytes.resize(static_cast<size_t>(out) * row_halves);
        for (int64_t n = 0; n < out; ++n) {
            uint16_t* row = bytes.data() + static_cast<size_t>(n) * row_halves;
            REQUIRE(refrag::quantize_int8_row(row, DType::f32, w.data() + n * in, in) == in);
            for (int64_t k = 0; k < in; ++k) {
                const float scale = refrag::f16_to_f32(refrag::int8_row_scales(row)[k / kInt8Group]);
                values.push_back(static_cast<float>(refrag::int8_row_values(row, in)[k]) * scale);
            }
        }
    }
    std::unique_ptr<Matrix> make(Backend& backend) const {
        const size_t row_bytes = refrag::int8_row_bytes(in_dim);
        return backend.device().make_matrix(
            DType::i8, out_dim, in_dim, [&](int64_t row, int64_t n, void* dst) {
                std::memcpy(dst, bytes.data() + static_cast<size_t>(row) * row_bytes / 2,
                            static_cast<size_t>(n) * row_bytes);
            });
    }
    // The same weights, rounded to bf16 as widen_int8_bf16 does: to nearest, ties away from 0.
    std::unique_ptr<Matrix> make_bf16(Backend& backend) const {
        return backend.device().make_matrix(
            DType::bf16, out_dim, in_dim, [&](int64_t row, int64_t n, void* dst) {
                for (int64_t i = 0; i < n * in_dim; ++i) {
                    const float value = values[static_cast<size_t>(row * in_dim + i)];
                    static_cast<uint16_t*>(dst)[i] =
                        static_cast<uint16_t>((std::bit_cast<uint32_t>(value) + 0x8000) >> 16);
                }
            });
    }
};

int64_t wrong_outputs(CpuInt8 way, const Int8File& file, const Floats& x, int64_t rows, const Floats& bias,
                      const Floats& out) {
    const int64_t in_dim = file.in_dim;
    int64_t wrong = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const float* const x_row = x.data() + r * in_dim;
        for (int64_t n = 0; n < file.out_dim; ++n) {
            const float* const w_row = file.values.data() + n * in_dim;
            double sum = 0.0, size = 0.0, rounding = 0.0;
            for (int64_t begin = 0; begin < in_dim; begin += kInt8Group) {
                double largest = 0.0, weights = 0.0;
                for (int64_t k = begin; k < std::min(begin + kInt8Group, in_dim); ++k) {
                    const auto x_k = static_cast<double>(x_row[k]), w_k = static_cast<double>(w_row[k]);
                    sum += x_k * w_k;
                    size += std::fabs(x_k * w_k);
                    largest = std::max(largest, std::fabs(x_k));
                    weights += std::fabs(w_k);
                }
                rounding += 0.5001 * largest / 127.0 * weights;
            }
            const double b = bias.empty() ? 0.0 : static_cast<double>(bias[static_cast<size_t>(n)]);
            const double bound = way == CpuInt8::vnni ? rounding + gamma_n(int8_groups(in_dim) + 4) *
                                                                       (size + rounding + std::fabs(b))
                                                      : gamma_n(in_dim + 2) * (size + std::fabs(b));
            if (!within(out[static_cast<size_t>(r * file.out_dim + n)], sum + b, bound)) ++wrong;
        }
    }
    return wrong;
}

void check_linear(Backend& backend, CpuInt8 way, int64_t rows, int64_t out_dim, int64_t in_dim,
                  bool with_bias) {
    CAPTURE(rows);
    CAPTURE(out_dim);
    CAPTURE(in_dim);
    const Int8File file(out_dim, in_dim, 11);
    const auto w = file.make(backend);
    const Floats x = random_floats(rows * in_dim, 12);
    const Floats bias = with_bias ? random_floats(out_dim, 13) : Floats{};
    const Floats out = run_linear(backend, x, rows, *w, bias);
    if (way == CpuInt8::bf16) {
        CHECK(same_bits(out, run_linear(backend, x, rows, *file.make_bf16(backend), bias)));
    } else {
        CHECK(wrong_outputs(way, file, x, rows, bias, out) == 0);
    }
}

// Calls body(way) for every way that T's instruction set has here.
template <typename T, typename Body>
void for_each_way(Body&& body) {
    for (const CpuInt8 way : kWays) {
        if (!cpu_supports(T::isa, way)) continue;
        CAPTURE(refrag::cpu_int8_name(way));
        body(way);
    }
}

}  // namespace

TEST_CASE_TEMPLATE("int8 ops: linear at awkward sizes", T, Scalar, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    for_each_way<T>([](CpuInt8 way) {
        const auto backend = make_cpu_backend(2, T::isa, way);
        for (int64_t rows = 1; rows <= 35; ++rows) check_linear(*backend, way, rows, 81, 100, true);
        for (const int64_t out_dim : {1, 3, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 113, 300}) {
            check_linear(*backend, way, 1, out_dim, 70, true);
            check_linear(*backend, way, 7, out_dim, 33, out_dim % 2 == 0);
        }
        for (const int64_t in_dim : {1, 2, 31, 32, 33, 63, 64, 65, 100, 257, 513, 1000, 1025, 2051}) {
            for (const int64_t rows : {1, 2, 8, 34}) check_linear(*backend, way, rows, 33, in_dim, true);
        }
        // Several row blocks of a task.
        for (const int64_t rows : {193, 256, 257, 520}) check_linear(*backend, way, rows, 35, 65, false);
        check_linear(*backend, way, 1, 2065, 96, true);
    });
}

TEST_CASE_TEMPLATE("int8 ops: a row's product does not depend on its batch or the threads", T, Scalar, Avx2,
                   Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    constexpr int64_t rows = 265, out_dim = 83, in_dim = 1031;
    const Int8File file(out_dim, in_dim, 21);
    const Floats x = random_floats(rows * in_dim, 22), bias = random_floats(out_dim, 23);
    for_each_way<T>([&](CpuInt8 way) {
        Floats first;
        for (const int threads : {1, 2, 3}) {
            const auto backend = make_cpu_backend(threads, T::isa, way);
            const auto w = file.make(*backend);
            const Floats all = run_linear(*backend, x, rows, *w, bias);
            if (first.empty()) first = all;
            CHECK(same_bits(all, first));
            for (const int64_t r : {0, 5, 6, 191, 192, 264}) {
                const Floats row(x.begin() + r * in_dim, x.begin() + (r + 1) * in_dim);
                const Floats expected(all.begin() + r * out_dim, all.begin() + (r + 1) * out_dim);
                CHECK(same_bits(run_linear(*backend, row, 1, *w, bias), expected));
            }
            for (const int64_t n : {2, 3, 11, 13, 33}) {
                CHECK(same_bits(run_linear(*backend, Floats(x.begin(), x.begin() + n * in_dim), n, *w, bias),
                                Floats(all.begin(), all.begin() + n * out_dim)));
            }
        }
    });
}

TEST_CASE_TEMPLATE("int8 ops: NaN and inf stay in their row", T, Scalar, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    constexpr int64_t out_dim = 35, in_dim = 67;
    const Int8File file(out_dim, in_dim, 41);
    for_each_way<T>([&](CpuInt8 way) {
        const auto backend = make_cpu_backend(2, T::isa, way);
        const auto w = file.make(*backend);
        for (const int64_t rows : {9, 40}) {
            Floats x = random_floats(rows * in_dim, 42);
            const Floats clean = run_linear(*backend, x, rows, *w);
            x[4 * in_dim + 66] = kNan;
            x[7 * in_dim + 2] = kInf;
            x[8 * in_dim + 2] = -kInf;
            const Floats out = run_linear(*backend, x, rows, *w);
            bool right = true;
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t n = 0; n < out_dim; ++n) {
                    const auto at = static_cast<size_t>(r * out_dim + n);
                    const float weight = file.values[static_cast<size_t>(n * in_dim + 2)];
                    float expected = clean[at];
                    // An infinity has no 8-bit form: the row is NaN then.
                    if (r == 4 || (way == CpuInt8::vnni && (r == 7 || r == 8))) {
                        expected = kNan;
                    } else if (r == 7 || r == 8) {
                        expected = (r == 7 ? kInf : -kInf) * weight;
                    }
                    right = right && same_bits(out[at], expected);
                }
            }
            CHECK(right);
        }
    });
}

TEST_CASE_TEMPLATE("int8 ops: fused products are their definitions", T, Scalar, Avx2, Avx512, Avx512Bf16,
                   Amx) {
    REQUIRE_ISA(T);
    const Int8File files[] = {{83, 65, 51}, {16, 65, 52}, {83, 65, 53}};
    const FileMatrix other(DType::bf16, 16, 65, 54);
    for_each_way<T>([&](CpuInt8 way) {
        const auto backend = make_cpu_backend(2, T::isa, way);
        // The second: I8 as the others, or BF16, which is packed otherwise unless x is rounded to bf16.
        for (const bool mixed : {false, true}) {
            std::vector<std::unique_ptr<Matrix>> w;
            for (const Int8File& file : files) w.push_back(file.make(*backend));
            if (mixed) w[1] = other.make(*backend);
            for (const int64_t rows : {1, 7, 200}) {
                Floats x = random_floats(rows * 65, 55), bias = random_floats(83, 56);
                std::vector<Floats> out, expected;
                std::vector<refrag::Product> products;
                for (size_t i = 0; i < 3; ++i) {
                    expected.push_back(run_linear(*backend, x, rows, *w[i], i == 0 ? bias : Floats{}));
                    out.emplace_back(expected[i].size(), kNan);
                }
                for (size_t i = 0; i < 3; ++i) {
                    products.push_back({view(out[i], rows, w[i]->out_dim()), w[i].get(),
                                        i == 0 ? view(bias, 1, 83) : Tensor{}});
                }
                backend->linears(view(x, rows, 65), products);
                for (size_t i = 0; i < 3; ++i) CHECK(same_bits(out[i], expected[i]));

                Floats gate = expected[0], up = expected[2];
                backend->silu_mul(view(gate, rows, 83), view(up, rows, 83));
                backend->linear_silu_mul(view(x, rows, 65), products[0], products[2]);
                CHECK(same_bits(out[0], gate));

                Floats activated = expected[0];
                backend->gelu(view(activated, rows, 83));
                CHECK(same_bits(run_linear(*backend, x, rows, *w[0], bias, true), activated));
            }
        }
    });
}

TEST_CASE_TEMPLATE("int8 ops: embeddings are the exact weights, at 8.5 bits each", T, Scalar, Avx2, Avx512,
                   Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const int64_t dim : {1, 31, 32, 33, 127}) {
        const Int8File file(45, dim, 71);
        const auto table = file.make(*backend);
        CHECK(table->dtype() == DType::i8);
        CHECK(table->device_bytes() == static_cast<size_t>(3 * int8_groups(dim)) * (32 * 16 + 16 * 2));
        Floats vectors = random_floats(2 * dim, 72);
        const std::vector<int32_t> source = {0, 44, -1, 15, 16, -2, 31, 0};
        const auto n = static_cast<int64_t>(source.size());
        Floats out(static_cast<size_t>(n * dim), kNan), expected;
        backend->embed(view(out, n, dim), *table, source.data(), view(vectors, 2, dim));
        for (const int32_t s : source) {
            const Floats& from = s >= 0 ? file.values : vectors;
            const int64_t at = (s >= 0 ? s : -1 - s) * dim;
            expected.insert(expected.end(), from.begin() + at, from.begin() + at + dim);
        }
        CHECK(same_bits(out, expected));
        const std::vector<int32_t> ids = {3, 3, 44, 0, 17, 1, 2, 40};
        backend->add_embed(view(out, n, dim), *table, ids.data());
        for (int64_t i = 0; i < n * dim; ++i) {
            expected[static_cast<size_t>(i)] +=
                file.values[static_cast<size_t>(ids[static_cast<size_t>(i / dim)] * dim + i % dim)];
        }
        CHECK(same_bits(out, expected));
    }
}

TEST_CASE("int8 ops: products without rows or columns") {
    for (const CpuInt8 way : kWays) {
        if (!cpu_supports(refrag::best_cpu_isa(), way)) continue;
        const auto backend = make_cpu_backend(2, refrag::best_cpu_isa(), way);
        CHECK(run_linear(*backend, {}, 0, *Int8File(5, 3, 61).make(*backend)).empty());
        const Floats bias = random_floats(5, 62);
        CHECK(same_bits(run_linear(*backend, {}, 1, *Int8File(5, 0, 61).make(*backend), bias), bias));
        CHECK(Int8File(0, 5, 61).make(*backend)->device_bytes() == 0);
    }
}

TEST_CASE_TEMPLATE("int8 ops: kernels against the scalar definitions", T, Avx2, Avx512, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const refrag::CpuKernels& kernels = refrag::cpu_kernels(T::isa);
    // Every stored byte, with scales of all sizes; padding bytes are ordinary ones.
    constexpr int64_t n_blocks = 9;
    std::vector<refrag::Int8Block> blocks(n_blocks);
    for (size_t i = 0; i < blocks.size(); ++i) {
        auto* q = &blocks[i].q[0][0][0];
        for (size_t j = 0; j < sizeof blocks[i].q; ++j) q[j] = static_cast<uint8_t>(j * 7 + i * 13);
        constexpr uint16_t kScales[] = {0, 1, 0x3ff, 0x400, 0x1234, 0x3c00, 0x3555, 0x7bff};
        for (size_t j = 0; j < 16; ++j) blocks[i].scale[j] = kScales[(i + j) % 8];
    }
    for (const int64_t k : {1, 3, 4, 5, 31, 32, 33, 64, 257, 288}) {
        Floats fast(static_cast<size_t>(k * 16), kNan), plain = fast;
        kernels.widen_int8(fast.data(), blocks.data(), k);
        refrag::scalar::widen_int8(plain.data(), blocks.data(), k);
        bool same = true;
        // Zeros may differ in sign.
        for (size_t i = 0; i < fast.size(); ++i) same = same && fast[i] == plain[i];
        CHECK(same);
    }
    if (kernels.widen_int8_bf16 != nullptr) {
        std::vector<uint16_t> fast(n_blocks * 512, 7), plain = fast;
        kernels.widen_int8_bf16(fast.data(), blocks.data(), n_blocks);
        refrag::scalar::widen_int8_bf16(plain.data(), blocks.data(), n_blocks);
        bool same = true;
        for (size_t i = 0; i < fast.size(); ++i) {
            same = same && refrag::bf16_to_f32(fast[i]) == refrag::bf16_to_f32(plain[i]);
        }
        CHECK(same);
    }
    if (!cpu_supports(T::isa, CpuInt8::vnni)) return;
    Floats x = random_floats(200, 81, 1e3f);
    for (size_t i = 0; i < x.size(); ++i) x[i] = std::ldexp(x[i], static_cast<int>(i % 11) - 5);
    std::fill(x.begin() + 32, x.begin() + 64, 0.0f);
    x[70] = kNan;
    x[100] = -kInf;
    x[130] = 3.4028235e38f;
    for (size_t i = 160; i < 192; ++i) x[i] = 1e-40f;
    for (const int64_t n : {0, 1, 31, 32, 33, 64, 200}) {
        std::vector<refrag::Int8Group> fast(static_cast<size_t>(int8_groups(n)) + 1), plain = fast;
        kernels.quantize_groups(fast.data(), x.data(), n);
        refrag::scalar::quantize_groups(plain.data(), x.data(), n);
        for (size_t g = 0; g < fast.size(); ++g) {
            CHECK(std::equal(std::begin(fast[g].q), std::end(fast[g].q), std::begin(plain[g].q)));
            CHECK(fast[g].start == plain[g].start);
            CHECK(same_bits(fast[g].scale, plain[g].scale));
        }
    }
}

TEST_CASE("int8 ops: ways are named, checked and refused") {
    for (const CpuInt8 way : kWays) CHECK(refrag::parse_cpu_int8(refrag::cpu_int8_name(way)) == way);
    CHECK(error_of([] { refrag::parse_cpu_int8("fast"); }) ==
          "unknown way to compute with int8 weights 'fast': expected widen, bf16 or vnni");
    CHECK(error_of([] { make_cpu_backend(1, CpuIsa::scalar, CpuInt8::bf16); }) ==
          "this CPU does not support bf16 for int8 weights with scalar");
    CHECK(cpu_supports(refrag::best_cpu_isa(), refrag::best_cpu_int8(refrag::best_cpu_isa())));
}
