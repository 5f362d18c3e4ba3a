// What tests of ops on any backend share: tensors in the backend's memory, and numbers that no backend
// rounds.
#pragma once

#include "base/int8.h"
#include "every_backend.h"
#include "models/device_batch.h"
#include "ops_test.h"

namespace refrag_test {

using refrag::Arena;

// Whole multiples of 1/128 in [-1, 1], which bf16 and F16 hold exactly.
inline Floats exact_floats(int64_t n, uint32_t seed) {
    Floats x = random_floats(n, seed, 128.0f);
    for (float& v : x) v = std::nearbyint(v) / 128.0f;
    return x;
}

// A backend, and tensors that go to its memory and back.
class On {
  public:
    explicit On(Backend& backend) : b(backend), arena(backend) {}

    Tensor put(const Floats& x, int64_t rows, int64_t cols) {
        REQUIRE(static_cast<int64_t>(x.size()) == rows * cols);
        const Tensor t = arena.tensor(rows, cols);
        b.upload(t.data, x.data(), t.bytes());
        return t;
    }
    int32_t* put(const std::vector<int32_t>& x) { return refrag::upload_vector(b, arena, x); }
    Tensor empty(int64_t rows, int64_t cols) {
        return put(Floats(static_cast<size_t>(rows * cols), kNan), rows, cols);
    }
    Floats get(Tensor t) {
        Floats x(static_cast<size_t>(t.size()));
        b.download(x.data(), t.data, t.bytes());
        return x;
    }

    Backend& b;
    Arena arena;
};

// A weight matrix [out, in] of values that `dtype` holds exactly (I8 takes any).
inline std::unique_ptr<Matrix> matrix_of(Backend& b, DType dtype, int64_t out, int64_t in, const Floats& x) {
    const size_t row_bytes = dtype == DType::i8 ? refrag::int8_row_bytes(in)
                                                : static_cast<size_t>(in) * refrag::dtype_bytes(dtype);
    return b.device().make_matrix(dtype, out, in, [&](int64_t row, int64_t n, void* dst) {
        for (int64_t r = row; r < row + n; ++r) {
            const float* const from = x.data() + r * in;
            auto* const to = static_cast<std::byte*>(dst) + static_cast<size_t>(r - row) * row_bytes;
            if (dtype == DType::i8) {
                refrag::quantize_int8_row(to, DType::f32, from, in);
                continue;
            }
            for (int64_t k = 0; k < in; ++k) {
                auto* const at = to + static_cast<size_t>(k) * refrag::dtype_bytes(dtype);
                uint16_t bits = refrag::f32_to_bf16(from[k]);
                // A multiple of 1/128 below 2 as a half: exact, found by its own widening.
                if (dtype == DType::f16) {
                    const float magnitude = std::fabs(from[k]);
                    uint16_t half = 0;
                    for (int e = 30; e > 0 && magnitude > 0.0f; --e) {
                        const float unit = std::ldexp(1.0f, e - 15);
                        if (magnitude < unit) continue;
                        half = static_cast<uint16_t>(e << 10 |
                                                     static_cast<int>((magnitude / unit - 1.0f) * 1024.0f));
                        break;
                    }
                    if (refrag::f16_to_f32(half) != magnitude) throw std::logic_error("not exact in F16");
                    bits = static_cast<uint16_t>(half | (std::signbit(from[k]) ? 0x8000 : 0));
                }
                if (dtype == DType::f32)
                    std::memcpy(at, from + k, 4);
                else
                    std::memcpy(at, &bits, 2);
            }
        }
    });
}

}  // namespace refrag_test
