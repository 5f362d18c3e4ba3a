// The element types of GGUF tensors that can be read, and their blocks written out as floats. A quantised
// row is a sequence of blocks of 32 or 256 neighbours; each block carries its own scales.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace refrag {

enum class GgufType { f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k };

struct GgufTypeInfo {
    GgufType type;
    uint32_t id;  // as in the file
    const char* name;
    int64_t block_values;  // a row's length is a multiple of this
    size_t block_bytes;
};

// Null for a type that cannot be read.
const GgufTypeInfo* find_gguf_type(uint32_t id);
const GgufTypeInfo& gguf_type_info(GgufType type);
// The published name of any type's number: "IQ4_XS", or "type 99".
std::string gguf_type_name(uint32_t id);

// Writes n_blocks * block_values floats. `blocks` holds n_blocks * block_bytes bytes, need not be aligned.
// Exact in fp32 for F32, F16, BF16, Q8_0, Q4_0, Q5_0; the others round each product and sum once.
void decode_gguf_blocks(GgufType type, const void* blocks, size_t n_blocks, float* out);

}  // namespace refrag
