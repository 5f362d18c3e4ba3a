// See int8.h. Loops are over 32 values without conditions, which compilers turn into vector code: quantising
// a model must not take longer than reading it.
#include "base/int8.h"

#include <algorithm>
#include <bit>

namespace refrag {
namespace {

uint32_t magnitude_bits(float x) {
    return std::bit_cast<uint32_t>(x) & 0x7fffffffu;
}

// The bits of the smallest F16 number s with 127 s >= largest, which is finite and not above kInt8Largest.
uint16_t scale_for(float largest) {
    // A guess from below or just above, then steps to the neighbours; 127 s is exact in F32.
    const float wanted = largest / 127.0f;
    const uint32_t bits = std::bit_cast<uint32_t>(wanted);
    auto half = static_cast<uint16_t>(wanted >= 0x1p-14f ? (bits >> 13) - (112u << 10)
                                                         : static_cast<uint32_t>(wanted * 0x1p24f));
    while (127.0f * f16_to_f32(half) < largest) ++half;
    while (half > 0 && 127.0f * f16_to_f32(static_cast<uint16_t>(half - 1)) >= largest) --half;
    return half;
}

template <DType kStored>
void widen(float (&w)[kInt8Group], const std::byte* values, int64_t n) {
    constexpr size_t kBytes = kStored == DType::f32 ? 4 : 2;
    if constexpr (kStored == DType::f32) {
        std::memcpy(w, values, static_cast<size_t>(n) * kBytes);
    } else {
        uint16_t halves[kInt8Group] = {};
        std::memcpy(halves, values, static_cast<size_t>(n) * kBytes);
        for (int64_t i = 0; i < kInt8Group; ++i) {
            w[i] = kStored == DType::bf16 ? bf16_to_f32(halves[i]) : f16_to_f32(halves[i]);
        }
    }
    for (int64_t i = n; i < kInt8Group; ++i) w[i] = 0.0f;
}

template <DType kStored>
int64_t quantize(uint16_t* scales, int8_t* out, const std::byte* values, int64_t in_dim) {
    constexpr int64_t kBytes = kStored == DType::f32 ? 4 : 2;
    for (int64_t begin = 0; begin < in_dim; begin += kInt8Group) {
        const int64_t n = std::min(kInt8Group, in_dim - begin);
        float w[kInt8Group];
        widen<kStored>(w, values + begin * kBytes, n);
        // Finite magnitudes order as their bits do.
        uint32_t largest_bits = 0;
        for (int64_t i = 0; i < kInt8Group; ++i) largest_bits = std::max(largest_bits, magnitude_bits(w[i]));
        const auto largest = std::bit_cast<float>(largest_bits);
        if (largest > kInt8Largest) {
            for (int64_t i = 0; i < n; ++i) {
                if (std::bit_cast<float>(magnitude_bits(w[i])) > kInt8Largest) return begin + i;
            }
        }
        *scales = scale_for(largest);
        const float scale = *scales == 0 ? 1.0f : f16_to_f32(*scales);
        ++scales;
        // Adding 1.5 * 2^23 rounds to an integer as the default rounding does, and leaves it in the lowest
        // bits.
        int32_t q[kInt8Group];
        for (int64_t i = 0; i < kInt8Group; ++i) {
            q[i] = std::bit_cast<int32_t>(w[i] / scale + 12582912.0f) - 0x4b400000;
        }
        for (int64_t i = 0; i < n; ++i) out[begin + i] = static_cast<int8_t>(q[i]);
    }
    return in_dim;
}

}  // namespace

int64_t quantize_int8_row(void* out, DType dtype, const void* values, int64_t in_dim) {
    auto* scales = static_cast<uint16_t*>(out);
    auto* q = static_cast<int8_t*>(out) + int8_groups(in_dim) * 2;
    if (in_dim % 2 != 0) q[in_dim] = 0;
    const auto* from = static_cast<const std::byte*>(values);
    switch (dtype) {
        case DType::f32:
            return quantize<DType::f32>(scales, q, from, in_dim);
        case DType::f16:
            return quantize<DType::f16>(scales, q, from, in_dim);
        case DType::bf16:
            return quantize<DType::bf16>(scales, q, from, in_dim);
        case DType::i32:
        case DType::i8:
            break;
    }
    fail(Status::runtime, "cannot quantise weights of dtype ", dtype_name(dtype));
}

}  // namespace refrag
