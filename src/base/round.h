// Floats rounded to the 16-bit types: to nearest, ties to even. Their way back is exact (dtype.h).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"

namespace refrag {

// Above F16's range: infinity. NaN stays NaN (quiet).
inline uint16_t f32_to_f16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520
    if (magnitude < 0x38800000u) {
        // Below 2^-14 F16 counts in steps of 2^-24, as floats of 0.5 to 1 do.
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// n floats as `dtype` (F32, F16 or BF16) at `out`, which need not be aligned.
inline void round_values(DType dtype, const float* values, size_t n, void* out) {
    if (dtype == DType::f32) {
        std::memcpy(out, values, n * sizeof(float));
        return;
    }
    auto* to = static_cast<std::byte*>(out);
    for (size_t i = 0; i < n; ++i, to += sizeof(uint16_t)) {
        const uint16_t half = dtype == DType::bf16 ? f32_to_bf16(values[i]) : f32_to_f16(values[i]);
        std::memcpy(to, &half, sizeof half);
    }
}

}  // namespace refrag
