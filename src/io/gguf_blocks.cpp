// See gguf_blocks.h. Layouts, in bytes; d and m are F16, little endian:
//   Q8_0  d, q[32] signed                          x = d q
//   Q4_0  d, q[16]                                 x = d (q - 8)
//   Q4_1  d, m, q[16]                              x = d q + m
//   Q5_0  d, h[4], q[16]                           x = d (q - 16)
//   Q5_1  d, m, h[4], q[16]                        x = d q + m
//   Q4_K  d, m, s[12], q[128]                      x = d s_i q - m m_i, i = 0 .. 7 for 32 values each
//   Q5_K  d, m, s[12], h[32], q[128]               the same with a fifth bit
//   Q6_K  q[128], h[64], s[16] signed, d           x = d s_i (q - 32), i = 0 .. 15 for 16 values each
// Of a byte of q, the low four bits come first and the high four bits half a group later.
#include "io/gguf_blocks.h"

#include <array>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "base/dtype.h"

namespace refrag {
namespace {

constexpr std::array<GgufTypeInfo, 11> kTypes = {{
    {GgufType::f32, 0, "F32", 1, 4},
    {GgufType::f16, 1, "F16", 1, 2},
    {GgufType::bf16, 30, "BF16", 1, 2},
    {GgufType::q8_0, 8, "Q8_0", 32, 34},
    {GgufType::q4_0, 2, "Q4_0", 32, 18},
    {GgufType::q4_1, 3, "Q4_1", 32, 20},
    {GgufType::q5_0, 6, "Q5_0", 32, 22},
    {GgufType::q5_1, 7, "Q5_1", 32, 24},
    {GgufType::q4_k, 12, "Q4_K", 256, 144},
    {GgufType::q5_k, 13, "Q5_K", 256, 176},
    {GgufType::q6_k, 14, "Q6_K", 256, 210},
}};

// Types that other programs write, for messages.
struct OtherType {
    uint32_t id;
    const char* name;
};
constexpr std::array<OtherType, 22> kOthers = {{
    {9, "Q8_1"},     {10, "Q2_K"},  {11, "Q3_K"},   {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"},
    {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"},   {23, "IQ4_XS"},
    {24, "I8"},      {25, "I16"},   {26, "I32"},    {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},
    {34, "TQ1_0"},   {35, "TQ2_0"}, {39, "MXFP4"},  {40, "NVFP4"},
}};

using Bytes = const uint8_t*;

float f16_at(Bytes at) {
    return f16_to_f32(static_cast<uint16_t>(at[0] | at[1] << 8));
}

uint32_t u32_at(Bytes at) {
    return static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[1]) << 8 |
           static_cast<uint32_t>(at[2]) << 16 | static_cast<uint32_t>(at[3]) << 24;
}

float scaled(float d, int q) {
    return d * static_cast<float>(q);
}

void decode_f32(Bytes b, float* out) {
    out[0] = std::bit_cast<float>(u32_at(b));
}
void decode_f16(Bytes b, float* out) {
    out[0] = f16_at(b);
}
void decode_bf16(Bytes b, float* out) {
    out[0] = bf16_to_f32(static_cast<uint16_t>(b[0] | b[1] << 8));
}

void decode_q8_0(Bytes b, float* out) {
    const float d = f16_at(b);
    for (int i = 0; i < 32; ++i) out[i] = scaled(d, static_cast<int8_t>(b[2 + i]));
}

void decode_q4_0(Bytes b, float* out) {
    const float d = f16_at(b);
    for (int i = 0; i < 16; ++i) {
        out[i] = scaled(d, (b[2 + i] & 15) - 8);
        out[i + 16] = scaled(d, (b[2 + i] >> 4) - 8);
    }
}

void decode_q4_1(Bytes b, float* out) {
    const float d = f16_at(b), m = f16_at(b + 2);
    for (int i = 0; i < 16; ++i) {
        out[i] = scaled(d, b[4 + i] & 15) + m;
        out[i + 16] = scaled(d, b[4 + i] >> 4) + m;
    }
}

// Bit i of `high` is the fifth bit of value i.
int fifth_bit(uint32_t high, int i) {
    return static_cast<int>(high >> i & 1u) << 4;
}

void decode_q5_0(Bytes b, float* out) {
    const float d = f16_at(b);
    const uint32_t high = u32_at(b + 2);
    for (int i = 0; i < 16; ++i) {
        out[i] = scaled(d, ((b[6 + i] & 15) | fifth_bit(high, i)) - 16);
        out[i + 16] = scaled(d, ((b[6 + i] >> 4) | fifth_bit(high, i + 16)) - 16);
    }
}

void decode_q5_1(Bytes b, float* out) {
    const float d = f16_at(b), m = f16_at(b + 2);
    const uint32_t high = u32_at(b + 4);
    for (int i = 0; i < 16; ++i) {
        out[i] = scaled(d, (b[8 + i] & 15) | fifth_bit(high, i)) + m;
        out[i + 16] = scaled(d, (b[8 + i] >> 4) | fifth_bit(high, i + 16)) + m;
    }
}

// Eight scales and eight minima of 6 bits in 12 bytes: the first four of each lie in the low bits of bytes
// 0 .. 3 and 4 .. 7; of the last four, four bits lie in bytes 8 .. 11 and two in the others' high bits.
void unpack_scales(Bytes s, int (&scale)[8], int (&minimum)[8]) {
    for (int i = 0; i < 4; ++i) {
        scale[i] = s[i] & 63;
        minimum[i] = s[i + 4] & 63;
        scale[i + 4] = (s[i + 8] & 15) | (s[i] >> 6) << 4;
        minimum[i + 4] = (s[i + 8] >> 4) | (s[i + 4] >> 6) << 4;
    }
}

// Q4_K, and with `fifth` (32 bytes, bit i of byte j for value j of group i) Q5_K.
void decode_k(Bytes b, Bytes fifth, Bytes q, float* out) {
    const float d = f16_at(b), m = f16_at(b + 2);
    int scale[8], minimum[8];
    unpack_scales(b + 4, scale, minimum);
    for (int group = 0; group < 8; ++group) {
        const float group_scale = scaled(d, scale[group]), group_minimum = scaled(m, minimum[group]);
        for (int j = 0; j < 32; ++j) {
            const uint8_t pair = q[group / 2 * 32 + j];
            int value = group % 2 == 0 ? pair & 15 : pair >> 4;
            if (fifth != nullptr) value |= (fifth[j] >> group & 1) << 4;
            *out++ = scaled(group_scale, value) - group_minimum;
        }
    }
}

void decode_q4_k(Bytes b, float* out) {
    decode_k(b, nullptr, b + 16, out);
}
void decode_q5_k(Bytes b, float* out) {
    decode_k(b, b + 16, b + 48, out);
}

void decode_q6_k(Bytes b, float* out) {
    const float d = f16_at(b + 208);
    for (int i = 0; i < 256; ++i) {
        // Halves of 128 values, in each four runs of 32: runs 0 and 1 in the low bits of 64 bytes, 2 and 3 in
        // their high bits, and two more bits of each run in 32 bytes.
        const int half = i / 128, run = i % 128 / 32, j = i % 32;
        const uint8_t low = b[half * 64 + run % 2 * 32 + j];
        const int high = b[128 + half * 32 + j] >> (2 * run) & 3;
        const int value = (run < 2 ? low & 15 : low >> 4) | high << 4;
        out[i] = scaled(scaled(d, static_cast<int8_t>(b[192 + i / 16])), value - 32);
    }
}

}  // namespace

const GgufTypeInfo* find_gguf_type(uint32_t id) {
    for (const GgufTypeInfo& info : kTypes) {
        if (info.id == id) return &info;
    }
    return nullptr;
}

const GgufTypeInfo& gguf_type_info(GgufType type) {
    for (const GgufTypeInfo& info : kTypes) {
        if (info.type == type) return info;
    }
    fail(Status::runtime, "unknown GGUF type ", static_cast<int>(type));
}

std::string gguf_type_name(uint32_t id) {
    if (const GgufTypeInfo* known = find_gguf_type(id)) return known->name;
    for (const OtherType& other : kOthers) {
        if (other.id == id) return other.name;
    }
    return str("type ", id);
}

void decode_gguf_blocks(GgufType type, const void* blocks, size_t n_blocks, float* out) {
    using Decode = void (*)(Bytes, float*);
    const Decode decode = [&]() -> Decode {
        switch (type) {
            case GgufType::f32:
                return decode_f32;
            case GgufType::f16:
                return decode_f16;
            case GgufType::bf16:
                return decode_bf16;
            case GgufType::q8_0:
                return decode_q8_0;
            case GgufType::q4_0:
                return decode_q4_0;
            case GgufType::q4_1:
                return decode_q4_1;
            case GgufType::q5_0:
                return decode_q5_0;
            case GgufType::q5_1:
                return decode_q5_1;
            case GgufType::q4_k:
                return decode_q4_k;
            case GgufType::q5_k:
                return decode_q5_k;
            case GgufType::q6_k:
                return decode_q6_k;
        }
        fail(Status::runtime, "unknown GGUF type ", static_cast<int>(type));
    }();
    const GgufTypeInfo& info = gguf_type_info(type);
    const auto* at = static_cast<Bytes>(blocks);
    for (size_t i = 0; i < n_blocks; ++i) {
        decode(at, out);
        at += info.block_bytes;
        out += info.block_values;
    }
}

}  // namespace refrag
