// Finds NaN and infinities in stored weights: a test of exponent bits, done word by word, so that checking a
// tensor while it is copied costs a small part of the copy. Not for activations, which backends compute with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"

namespace refrag {

// The index of the first of n values that is NaN or infinite; n where all are finite. `values` holds n
// elements of F32, F16 or BF16 and need not be aligned.
inline size_t first_non_finite(DType dtype, const void* values, size_t n) {
    // A value is not finite where all bits of its exponent are ones. Adding the exponent's lowest bit to the
    // exponent alone then carries into the place of the sign, and never further: so one 64-bit addition tests
    // two or four values.
    const uint64_t exponent = dtype == DType::f32   ? 0x7f800000'7f800000u
                              : dtype == DType::f16 ? 0x7c007c00'7c007c00u
                                                    : 0x7f807f80'7f807f80u;
    const uint64_t lowest = dtype == DType::f32   ? 0x00800000'00800000u
                            : dtype == DType::f16 ? 0x04000400'04000400u
                                                  : 0x00800080'00800080u;
    const uint64_t sign = dtype == DType::f32 ? 0x80000000'80000000u : 0x80008000'80008000u;
    const size_t size = dtype_bytes(dtype);
    const auto* bytes = static_cast<const unsigned char*>(values);

    // Blocks first: all clean as a rule. The block that is not, and the rest, value by value.
    constexpr size_t block_words = 16;
    constexpr size_t block_bytes = block_words * sizeof(uint64_t);
    size_t at = 0;
    for (; at + block_bytes <= n * size; at += block_bytes) {
        uint64_t words[block_words];
        std::memcpy(words, bytes + at, block_bytes);
        uint64_t carries = 0;
        for (const uint64_t word : words) carries |= (word & exponent) + lowest;
        if ((carries & sign) != 0) break;
    }
    for (size_t i = at / size; i < n; ++i) {
        uint64_t word = 0;
        std::memcpy(&word, bytes + i * size, size);
        if ((((word & exponent) + lowest) & sign) != 0) return i;
    }
    return n;
}

}  // namespace refrag
