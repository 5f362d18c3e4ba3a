// Attention in bf16: which caches hold it, how pages are packed, and one step of it, against the scalar
// loops.
#include "cpu/kernels.h"
#include "ops_attention_test.h"

using namespace refrag_test;
using namespace refrag_test::ops_attention;
using refrag::make_cpu_backend;

TEST_CASE_TEMPLATE("ops: a bf16 cache is for BF16 weights and whole tiles", T, Scalar, Avx2, Avx512,
                   Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    const auto backend = make_cpu_backend(1, T::isa);
    const bool bf16 = T::isa == CpuIsa::avx512_bf16 || T::isa == CpuIsa::amx;
    for (const int32_t dim : {32, 64, 96, 128}) {
        CHECK(backend->device().kv_dtype(DType::bf16, dim) == (bf16 ? DType::bf16 : DType::f32));
        CHECK(backend->device().kv_dtype(DType::f32, dim) == DType::f32);
        CHECK(backend->device().kv_dtype(DType::f16, dim) == DType::f32);
    }
    for (const int32_t dim : {8, 40, 48, 80})
        CHECK(backend->device().kv_dtype(DType::bf16, dim) == DType::f32);
}

TEST_CASE_TEMPLATE("ops: F32 weights are attended in fp32, as without bf16 instructions", T, Avx512Bf16,
                   Amx) {
    REQUIRE_ISA(T);
    const Shape shape{4, 2, 64};
    const Sequence x = make_sequence(shape, 70, 601), chunk = make_sequence(shape, 18, 602);
    Cache one(shape, 1, 96), two(shape, 1, 96);
    CHECK(same_bits(
        attend(*make_cpu_backend(1, T::isa), shape, {{&x, 0, 70, 0}, {&chunk, 0, 18, -1}}, &one),
        attend(*make_cpu_backend(1, CpuIsa::avx512), shape, {{&x, 0, 70, 0}, {&chunk, 0, 18, -1}}, &two)));
}

TEST_CASE_TEMPLATE("ops: pages of bf16 are packed as the scalar loop does", T, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    for (const int64_t dim : {32, 96}) {
        const int64_t ldk = dim + 5, ldv = 2 * dim + 1;
        Floats k = random_floats(kPageEntries * ldk, 611), v = random_floats(kPageEntries * ldv, 612);
        k[3] = v[1] = kInf;
        k[4] = v[2] = -kNan;
        k[5] = v[3] = 3.4e38f;                                // rounds to infinity
        k[6] = v[4] = refrag::bf16_to_f32(0x3f81) + 0x1p-8f;  // half way, to even
        int64_t wrong = 0;
        for (int64_t first = 0; first < kPageEntries; ++first) {
            for (int64_t n = 1; n <= kPageEntries - first; ++n) {
                std::vector<uint16_t> expected(static_cast<size_t>(2 * kPageEntries * dim), 0xfffe);
                std::vector<uint16_t> got = expected;
                refrag::scalar::pack_kv(expected.data(), first, n, k.data(), ldk, v.data(), ldv, dim);
                refrag::cpu_kernels(T::isa).pack_kv(got.data(), first, n, k.data(), ldk, v.data(), ldv, dim);
                if (got != expected) ++wrong;
                const auto touched =
                    std::count_if(got.begin(), got.end(), [](uint16_t b) { return b != 0xfffe; });
                if (touched != 2 * n * dim) ++wrong;
            }
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE_TEMPLATE("ops: a step of attention in bf16 is that of the scalar loop", T, Avx512Bf16, Amx) {
    REQUIRE_ISA(T);
    using refrag::kAttendEntries;
    using refrag::kAttendRows;
    constexpr int64_t dim = 96, pages = 5;
    const auto bf16 = [](int64_t n, uint32_t seed) {
        std::vector<uint16_t> x;
        for (const float f : random_floats(n, seed, 1.5f)) x.push_back(refrag::f32_to_bf16(f));
        return x;
    };
    const std::vector<uint16_t> q = bf16(kAttendRows * dim, 621),
                                kv = bf16(pages * 2 * kPageEntries * dim, 622);
    std::vector<const uint16_t*> k, v;
    for (int64_t i = 0; i < pages; ++i) {
        k.push_back(kv.data() + i * 2 * kPageEntries * dim);
        v.push_back(k.back() + kPageEntries * dim);
    }
    for (const int64_t rows : {1, 15, 16, 17, 32}) {
        CAPTURE(rows);
        std::vector<int32_t> visible;
        for (int64_t r = 0; r < rows; ++r) visible.push_back(static_cast<int32_t>((r * 37 + 160) % 161));
        struct State {
            alignas(64) float m[kAttendRows], l[kAttendRows], acc[kAttendRows * dim];
            alignas(64) float s[kAttendRows * kAttendEntries];
            alignas(64) uint16_t p[kAttendRows * kAttendEntries];
        };
        const auto run = [&](void (*attend_bf16)(const refrag::Bf16Attend&)) {
            auto x = std::make_unique<State>();
            std::fill_n(x->m, kAttendRows, -kInf);
            std::fill_n(x->l, kAttendRows, 0.0f);
            std::fill_n(x->acc, kAttendRows * dim, 0.0f);
            refrag::Bf16Attend a{};
            a.q = q.data();
            a.rows = rows;
            a.dim = dim;
            a.k = k.data();
            a.v = v.data();
            a.n_pages = pages;
            a.visible = visible.data();
            a.m = x->m;
            a.l = x->l;
            a.acc = x->acc;
            a.s = x->s;
            a.p = x->p;
            for (int i = 0; i < 2; ++i) attend_bf16(a);  // the same entries once more: sums twice as large
            return x;
        };
        const auto expected = run(refrag::scalar::attend_bf16),
                   got = run(refrag::cpu_kernels(T::isa).attend_bf16);
        int64_t wrong = 0;
        for (int64_t r = 0; r < rows; ++r) {
            const auto row = static_cast<size_t>(r);
            // A score next to a whole number may be rounded to it by one and beyond it by the other.
            if (visible[row] == 0) {
                if (got->m[r] != -kInf || got->l[r] != 0.0f) ++wrong;
                continue;
            }
            if (std::fabs(got->m[r] - expected->m[r]) > 1.0f) ++wrong;
            const double factor = std::exp2(static_cast<double>(got->m[r] - expected->m[r]));
            const double l = static_cast<double>(got->l[r]) * factor,
                         l2 = static_cast<double>(expected->l[r]);
            // Sums of 96 products up to 2.25 are right to gamma(98) 216 = 1.3e-3 in each, powers to 7.6e-5:
            // together 2 (1.3e-3 ln 2 + 7.6e-5) < 2e-3.
            if (std::fabs(l - l2) > l2 * 2e-3) ++wrong;
            for (int64_t d = 0; d < dim; ++d) {
                const double x = static_cast<double>(got->acc[r * dim + d]) * factor;
                const double x2 = static_cast<double>(expected->acc[r * dim + d]);
                // Each rounds every power to 8 bits; |v| <= 1.5.
                if (std::fabs(x - x2) > l2 * 1.5 * (0x1p-7 + 2e-3)) ++wrong;
            }
        }
        CHECK(wrong == 0);
    }
}
