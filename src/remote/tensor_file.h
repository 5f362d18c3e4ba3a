// A tensor as `torch.save` writes it, in base64: what vLLM takes as "prompt_embeds". The file is a zip
// archive without compression that holds a pickle of fixed form and the values; it is written here directly,
// and read by nobody here.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace refrag {

// rows [n_rows, dim], the bits of BF16.
std::string bf16_tensor_file(std::span<const uint16_t> rows, int64_t n_rows, int64_t dim);

// Bytes of base64 of so many bytes, and the text itself added to `out`.
uint64_t base64_bytes(uint64_t n);
void add_base64(std::string& out, std::string_view bytes);

}  // namespace refrag
