// Element-by-element ops, norms, RoPE tables, pooling and likelihoods against double-precision references.
// Bounds: n roundings in a row give gamma_n(n) (ops_test.h); each case says where its n comes from. The
// errors of exp, tanh and gelu were measured over all fp32 arguments when their polynomials were made; here
// they are sampled, against the bounds that scalar_math.h states.
#include <algorithm>
#include <functional>

#include "cpu/kernels.h"
#include "ops_test.h"

using namespace refrag_test;
using refrag::Batch;
using refrag::make_cpu_backend;
using refrag::Pooling;

namespace {

double as_double(float x) {
    return static_cast<double>(x);
}

// Every 4099th float (a prime step: all exponents, changing mantissas), both signs, zeros, infinities, NaN.
Floats float_samples() {
    Floats x = {0.0f,   -0.0f,   kInf,   -kInf,  kNan,     1.0f,   -1.0f,
                0.625f, -0.625f, 88.72f, 88.74f, -103.97f, -104.0f};
    for (uint64_t bits = 1; bits < 0x7f800000u; bits += 4099) {
        const float v = std::bit_cast<float>(static_cast<uint32_t>(bits));
        x.push_back(v);
        x.push_back(-v);
    }
    return x;
}

// One unit in the last place of an fp32 result, never below the smallest subnormal.
double ulp(double value) {
    const double a = std::fabs(value);
    if (a < 0x1p-126) return 0x1p-149;
    return std::exp2(std::floor(std::log2(a)) - 23.0);
}

// The largest violation is reported as its argument.
void check_function(const Floats& x, const Floats& got, const std::function<double(double)>& exact,
                    const std::function<double(double, double)>& bound) {
    int64_t wrong = 0;
    float first = 0.0f;
    for (size_t i = 0; i < x.size(); ++i) {
        const double expected = exact(as_double(x[i]));
        if (within(got[i], expected, bound(as_double(x[i]), expected))) continue;
        // Beyond fp32's range an infinity is the right answer.
        if (std::isinf(got[i]) && std::fabs(expected) > 0x1.ffffffp127) continue;
        if (wrong++ == 0) first = x[i];
    }
    CAPTURE(first);
    CHECK(wrong == 0);
}

Floats one_row_each(int64_t rows, int64_t cols, uint32_t seed) {
    return random_floats(rows * cols, seed, 3.0f);
}

const int64_t kSizes[] = {1, 3, 8, 15, 16, 17, 31, 33, 63, 65, 768, 1023};

}  // namespace

TEST_CASE_TEMPLATE("ops: exp within 2 ulp over fp32's range", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    // A sum of one term.
    const auto& kernels = refrag::cpu_kernels(T::isa);
    const Floats x = float_samples();
    Floats y;
    for (const float& v : x) y.push_back(static_cast<float>(kernels.sum_exp(&v, 1, 0.0f)));
    check_function(
        x, y, [](double v) { return std::exp(v); }, [](double, double e) { return 2.0 * ulp(e); });
    CHECK(same_bits(y[0], 1.0f));
    CHECK(same_bits(y[3], 0.0f));
}

TEST_CASE_TEMPLATE("ops: gelu over fp32's range", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    const Floats x = float_samples();
    Floats y = x;
    backend->gelu(view(y, 1, static_cast<int64_t>(y.size())));
    check_function(
        x, y,
        [](double v) { return v == -HUGE_VAL ? std::nan("") : 0.5 * v * std::erfc(-v * std::sqrt(0.5)); },
        [](double v, double e) { return v > -6.0 ? 1e-6 * std::fabs(e) + 0x1p-149 : 1e-13; });
}

TEST_CASE_TEMPLATE("ops: tanh over fp32's range", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    const Floats x = float_samples();
    Floats y = x;
    backend->tanh(view(y, 1, static_cast<int64_t>(y.size())));
    check_function(
        x, y, [](double v) { return std::tanh(v); }, [](double, double e) { return 3.0 * ulp(e); });
    CHECK(same_bits(y[1], -0.0f));
}

TEST_CASE_TEMPLATE("ops: silu_mul over fp32's range", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    const Floats x = float_samples();
    const Floats up = random_floats(static_cast<int64_t>(x.size()), 5);
    Floats y = x, u = up;
    backend->silu_mul(view(y, 1, static_cast<int64_t>(y.size())), view(u, 1, static_cast<int64_t>(u.size())));
    int64_t wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double g = as_double(x[i]);
        double expected = g / (1.0 + std::exp(-g)) * as_double(up[i]);
        // Two ulp of exp and a rounding each for sum, quotient and product, which may land among subnormals;
        // and where fp32's exp(-x) is inf, x / inf is 0.
        double bound = 8.0 * kEps * std::fabs(expected) + 0x1p-148;
        if (g < -88.72 && std::isfinite(g)) bound = 128.0 * std::exp(-88.0);
        if (std::isinf(g)) expected = g > 0 ? g * as_double(up[i]) : std::nan("");
        if (!within(y[i], expected, bound)) ++wrong;
    }
    CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("ops: an element's result does not depend on its place", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto one = make_cpu_backend(1, T::isa), three = make_cpu_backend(3, T::isa);
    // Big enough for several threads, and an odd size for the tail.
    const int64_t n = 150001;
    const Floats x = random_floats(n, 6, 6.0f), z = random_floats(n, 7);
    using Op = std::function<void(Backend&, Tensor, Tensor)>;
    const std::vector<Op> ops = {
        [](Backend& b, Tensor t, Tensor) { b.gelu(t); },
        [](Backend& b, Tensor t, Tensor) { b.tanh(t); },
        [](Backend& b, Tensor t, Tensor u) { b.silu_mul(t, u); },
        [](Backend& b, Tensor t, Tensor u) { b.add(t, u); },
    };
    for (const Op& op : ops) {
        Floats all = x, threaded = x, z_all = z;
        op(*one, view(all, 1, n), view(z_all, 1, n));
        op(*three, view(threaded, 1, n), view(z_all, 1, n));
        CHECK(same_bits(all, threaded));
        for (const int64_t begin : {0, 1, 31, 777, 149990}) {
            const int64_t m = std::min<int64_t>(11, n - begin);
            Floats part(x.begin() + begin, x.begin() + begin + m),
                z_part(z.begin() + begin, z.begin() + begin + m);
            op(*one, view(part, 1, m), view(z_part, 1, m));
            CHECK(same_bits(part, Floats(all.begin() + begin, all.begin() + begin + m)));
        }
    }
}

TEST_CASE_TEMPLATE("ops: add, with a row for every row or one for all", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(3, T::isa);
    for (const int64_t n : kSizes) {
        for (const int64_t y_rows : {1, 40}) {
            Floats x = one_row_each(40, n, 8), y = one_row_each(y_rows, n, 9);
            Floats expected = x;
            for (int64_t i = 0; i < 40 * n; ++i) {
                expected[static_cast<size_t>(i)] += y[static_cast<size_t>(y_rows == 1 ? i % n : i)];
            }
            backend->add(view(x, 40, n), view(y, y_rows, n));
            CHECK(same_bits(x, expected));
        }
    }
}

TEST_CASE_TEMPLATE("ops: rms_norm and layer_norm", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    constexpr int64_t rows = 5;
    const float eps = 1e-5f;
    for (const int64_t n : kSizes) {
        CAPTURE(n);
        Floats x = one_row_each(rows, n, 14), w = random_floats(n, 15), b = random_floats(n, 16);
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) x[i] += 100.0f;  // one row with a large mean
        Floats rms(x.size()), layer(x.size());
        backend->rms_norm(view(rms, rows, n), view(x, rows, n), view(w, 1, n), eps);
        backend->layer_norm(view(layer, rows, n), view(x, rows, n), view(w, 1, n), view(b, 1, n), eps);
        int64_t wrong_rms = 0, wrong_layer = 0;
        for (int64_t r = 0; r < rows; ++r) {
            const float* row = x.data() + r * n;
            double sum = 0.0, squares = 0.0, sizes = 0.0;
            for (int64_t i = 0; i < n; ++i) {
                sum += as_double(row[i]);
                sizes += std::fabs(as_double(row[i]));
                squares += as_double(row[i]) * as_double(row[i]);
            }
            const double dn = static_cast<double>(n);
            const double mean = sum / dn;
            double var = 0.0;
            for (int64_t i = 0; i < n; ++i) var += (as_double(row[i]) - mean) * (as_double(row[i]) - mean);
            var /= dn;
            const double rms_inverse = 1.0 / std::sqrt(squares / dn + as_double(eps));
            const double inverse = 1.0 / std::sqrt(var + as_double(eps));
            // The mean is wrong by at most gamma_n(n) times the mean of |x|; that shifts every difference
            // and, to first order, moves the deviation's own sum by no more than its square.
            const double shift = gamma_n(n + 1) * sizes / dn;
            for (int64_t i = 0; i < n; ++i) {
                const size_t at = static_cast<size_t>(r * n + i), col = static_cast<size_t>(i);
                // The sum of squares has n roundings; division, eps, root, reciprocal and two products
                // follow, and the root halves what came before it.
                const double e = as_double(row[i]) * rms_inverse * as_double(w[col]);
                if (!within(rms[at], e, gamma_n(n / 2 + 8) * std::fabs(e))) ++wrong_rms;

                const double centred = (as_double(row[i]) - mean) * inverse;
                const double scaled = centred * as_double(w[col]);
                // d(inverse) / inverse <= shift^2 inverse^2 / 2 + rounding of differences (2 roundings, each
                // relative to |x - mean| + shift) and sums.
                const double relative =
                    gamma_n(n + 12) + 2.0 * shift * inverse + 0.5 * shift * shift * inverse * inverse;
                const double bound = std::fabs(scaled) * relative +
                                     (shift + kEps * std::fabs(as_double(row[i]) - mean)) * inverse *
                                         std::fabs(as_double(w[col])) * (1.0 + relative) +
                                     2.0 * kEps * (std::fabs(scaled) + std::fabs(as_double(b[col])));
                if (!within(layer[at], scaled + as_double(b[col]), bound)) ++wrong_layer;
            }
        }
        CHECK(wrong_rms == 0);
        CHECK(wrong_layer == 0);
    }
}

TEST_CASE_TEMPLATE("ops: norms in place, and row by row alone", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(3, T::isa);
    for (const int64_t n : {1, 33, 768}) {
        const int64_t rows = 70;
        const Floats x = one_row_each(rows, n, 17);
        Floats w = random_floats(n, 19), b = random_floats(n, 20), in_place = x, apart = x;
        const auto row = [n](Floats& v) { return view(v, 1, n); };
        const auto each_row = [&](auto&& norm) {
            for (int64_t r = 0; r < rows; ++r) {
                Floats one(x.begin() + r * n, x.begin() + (r + 1) * n), out(one.size());
                norm(view(out, 1, n), view(one, 1, n));
                std::copy(out.begin(), out.end(), apart.begin() + r * n);
            }
        };
        const auto rms = [&](Tensor out, Tensor in) { backend->rms_norm(out, in, row(w), 1e-6f); };
        rms(view(in_place, rows, n), view(in_place, rows, n));
        each_row(rms);
        CHECK(same_bits(in_place, apart));

        in_place = x;
        const auto layer = [&](Tensor out, Tensor in) {
            backend->layer_norm(out, in, row(w), row(b), 1e-5f);
        };
        layer(view(in_place, rows, n), view(in_place, rows, n));
        each_row(layer);
        CHECK(same_bits(in_place, apart));
    }
}

TEST_CASE_TEMPLATE("ops: l2_normalize", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const int64_t n : kSizes) {
        Floats x = one_row_each(3, n, 24);
        std::fill(x.begin() + n, x.begin() + 2 * n, 0.0f);
        const Floats before = x;
        backend->l2_normalize(view(x, 3, n));
        int64_t wrong = 0;
        for (int64_t r = 0; r < 3; ++r) {
            double squares = 0.0;
            for (int64_t i = r * n; i < (r + 1) * n; ++i) {
                squares +=
                    as_double(before[static_cast<size_t>(i)]) * as_double(before[static_cast<size_t>(i)]);
            }
            const double length = std::max(std::sqrt(squares), 1e-12);
            for (int64_t i = r * n; i < (r + 1) * n; ++i) {
                const double e = as_double(before[static_cast<size_t>(i)]) / length;
                if (!within(x[static_cast<size_t>(i)], e, gamma_n(n / 2 + 4) * std::fabs(e))) ++wrong;
            }
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE_TEMPLATE("ops: a NaN in one row of a norm stays there", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    const int64_t n = 65;
    Floats x = one_row_each(4, n, 25), w = random_floats(n, 26), b = random_floats(n, 27);
    x[static_cast<size_t>(2 * n + 64)] = kNan;
    Floats rms(x.size()), layer(x.size()), l2 = x;
    backend->rms_norm(view(rms, 4, n), view(x, 4, n), view(w, 1, n), 1e-5f);
    backend->layer_norm(view(layer, 4, n), view(x, 4, n), view(w, 1, n), view(b, 1, n), 1e-5f);
    backend->l2_normalize(view(l2, 4, n));
    for (const Floats* out : {&rms, &layer, &l2}) {
        bool right = true;
        for (size_t i = 0; i < out->size(); ++i) {
            right = right && std::isnan((*out)[i]) == (i / static_cast<size_t>(n) == 2);
        }
        CHECK(right);
    }
}

TEST_CASE_TEMPLATE("ops: rope_table and rope", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    for (const int64_t head_dim : {2, 6, 8, 34, 64, 80, 128}) {
        const int64_t half = head_dim / 2, heads = 3;
        Floats position = {0.0f, 1.0f, 17.0f, 0.37f, 4095.0f, 131071.0f, 999999.0f}, freq;
        const auto rows = static_cast<int64_t>(position.size());
        for (int64_t m = 0; m < half; ++m) {
            freq.push_back(std::pow(10000.0f, -2.0f * static_cast<float>(m) / static_cast<float>(head_dim)));
        }
        Floats table(static_cast<size_t>(rows * head_dim));
        backend->rope_table(view(table, rows, head_dim), position.data(), view(freq, 1, half));
        Floats x = random_floats(rows * heads * head_dim, 28);
        const Floats before = x;
        backend->rope(view(x, rows, heads * head_dim), view(table, rows, head_dim));
        int64_t wrong_table = 0, wrong_x = 0;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t m = 0; m < half; ++m) {
                // The angle is the fp32 product; its sine and cosine are good to one ulp of 1.
                const double angle =
                    as_double(position[static_cast<size_t>(r)] * freq[static_cast<size_t>(m)]);
                const double c = std::cos(angle), s = std::sin(angle);
                if (!within(table[static_cast<size_t>(r * head_dim + m)], c, 2.0 * kEps)) ++wrong_table;
                if (!within(table[static_cast<size_t>(r * head_dim + half + m)], s, 2.0 * kEps))
                    ++wrong_table;
                for (int64_t h = 0; h < heads; ++h) {
                    const auto at = static_cast<size_t>((r * heads + h) * head_dim + m);
                    const double a = as_double(before[at]),
                                 b = as_double(before[at + static_cast<size_t>(half)]);
                    // Two products and a sum, of factors each good to 2 eps.
                    const double bound = gamma_n(4) * (std::fabs(a) + std::fabs(b));
                    if (!within(x[at], a * c - b * s, bound)) ++wrong_x;
                    if (!within(x[at + static_cast<size_t>(half)], b * c + a * s, bound)) ++wrong_x;
                }
            }
        }
        CHECK(wrong_table == 0);
        CHECK(wrong_x == 0);
    }
}

TEST_CASE_TEMPLATE("ops: pool takes a sequence's first row, or the mean of its rows", T, Scalar, Avx2,
                   Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(2, T::isa);
    const std::vector<int32_t> row_begin = {0, 1, 4, 21, 22};
    Batch batch;
    batch.n_seq = 4;
    batch.n_rows = 22;
    batch.row_begin = row_begin.data();
    for (const int64_t n : {1, 17, 65, 768}) {
        Floats x = random_floats(22 * n, 33), first(static_cast<size_t>(4 * n)), mean(first.size());
        backend->pool(view(first, 4, n), view(x, 22, n), batch, Pooling::cls);
        backend->pool(view(mean, 4, n), view(x, 22, n), batch, Pooling::mean);
        int64_t wrong = 0;
        for (size_t s = 0; s < 4; ++s) {
            for (size_t c = 0; c < static_cast<size_t>(n); ++c) {
                double sum = 0.0, size = 0.0;
                const auto begin = static_cast<size_t>(row_begin[s]),
                           end = static_cast<size_t>(row_begin[s + 1]);
                for (size_t r = begin; r < end; ++r) {
                    sum += as_double(x[r * static_cast<size_t>(n) + c]);
                    size += std::fabs(as_double(x[r * static_cast<size_t>(n) + c]));
                }
                const auto count = static_cast<double>(end - begin);
                const size_t at = s * static_cast<size_t>(n) + c;
                if (!same_bits(first[at], x[begin * static_cast<size_t>(n) + c])) ++wrong;
                if (!within(mean[at], sum / count,
                            gamma_n(row_begin[s + 1] - row_begin[s] + 2) * size / count))
                    ++wrong;
            }
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE_TEMPLATE("ops: nll", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto one = make_cpu_backend(1, T::isa), three = make_cpu_backend(3, T::isa);
    for (const int64_t n : {1, 3, 16, 17, 33, 1000, 8191}) {
        CAPTURE(n);
        const int64_t rows = 9;
        Floats x = random_floats(rows * n, 34, 30.0f), out(static_cast<size_t>(rows)), again(out.size());
        for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(i)] += 1000.0f;  // exp() alone would overflow
        std::vector<int32_t> target;
        for (int64_t r = 0; r < rows; ++r) target.push_back(static_cast<int32_t>((r * 7919) % n));
        one->nll(view(out, 1, rows), view(x, rows, n), target.data());
        three->nll(view(again, 1, rows), view(x, rows, n), target.data());
        CHECK(same_bits(out, again));
        for (int64_t r = 0; r < rows; ++r) {
            const float* row = x.data() + r * n;
            const double largest = as_double(*std::max_element(row, row + n));
            double sum = 0.0;
            for (int64_t i = 0; i < n; ++i) sum += std::exp(as_double(row[i]) - largest);
            const double expected = std::log(sum) + largest - as_double(row[target[static_cast<size_t>(r)]]);
            // x - max rounds by eps |x - max| <= 60 eps, which exp passes on as a relative error of each
            // term, with 4 eps of its own; the sum is in double, and the result rounds once.
            CHECK(within(out[static_cast<size_t>(r)], expected, 64.0 * kEps + kEps * std::fabs(expected)));
        }
    }
}

TEST_CASE_TEMPLATE("ops: nll with infinities and NaN", T, Scalar, Avx2, Avx512) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(1, T::isa);
    const int64_t n = 19;
    Floats x(static_cast<size_t>(6 * n), 0.0f), out(6);
    const auto row = [&](int64_t r) { return x.begin() + r * n; };
    row(0)[3] = -kInf;                     // a masked logit, another is the target
    row(1)[5] = -kInf;                     // the target itself is masked
    row(2)[18] = kNan;                     // a NaN anywhere
    std::fill(row(3), row(3) + n, -kInf);  // log 0 - (-inf)
    row(4)[7] = kInf;                      // inf - 0
    row(5)[5] = kInf;                      // inf - inf
    const std::vector<int32_t> target(6, 5);
    backend->nll(view(out, 1, 6), view(x, 6, n), target.data());
    CHECK(within(out[0], std::log(18.0), 4.0 * kEps * 3.0));
    CHECK(out[1] == kInf);
    CHECK(std::isnan(out[2]));
    CHECK(std::isnan(out[3]));
    CHECK(out[4] == kInf);
    CHECK(std::isnan(out[5]));
}

TEST_CASE("ops: no rows is no work") {
    const auto backend = make_cpu_backend(2, CpuIsa::scalar);
    const Tensor none{nullptr, DType::f32, 0, 16};
    Floats w(16, 1.0f);
    backend->gelu(none);
    backend->tanh(none);
    backend->silu_mul(none, none);
    backend->add(none, none);
    backend->rms_norm(none, none, view(w, 1, 16), 1e-5f);
    backend->layer_norm(none, none, view(w, 1, 16), view(w, 1, 16), 1e-5f);
    backend->l2_normalize(none);
    backend->rope(none, none);
    backend->rope_table(none, nullptr, Tensor{w.data(), DType::f32, 1, 8});
    backend->pool(none, none, Batch{}, Pooling::mean);
    backend->nll(Tensor{nullptr, DType::f32, 1, 0}, none, nullptr);
}
