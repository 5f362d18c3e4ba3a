// Any bytes as a GGUF file. What is accepted: ranges lie within the file, in order and aligned, shapes and
// types fill them, every row can be read, and names are found again. Its configuration and its vocabulary are
// read, or refused, as well.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "io/gguf.h"
#include "main.h"
#include "models/gguf_config.h"
#include "text/tokenizer.h"
#include "tokenizer_promises.h"

namespace refrag_fuzz {
namespace {

void check_file(const refrag::GgufFile& file, std::string_view input) {
    uint64_t at = 0;
    for (const refrag::GgufTensor& tensor : file.tensors()) {
        promise(tensor.offset >= at && tensor.offset - at < (1u << 20) + input.size(), "ranges are in order");
        at = tensor.offset + tensor.bytes;
        promise(at <= input.size(), "a range lies within the file");
        promise(file.find(tensor.name) == &tensor, "a tensor is found by its name");
        const refrag::GgufTypeInfo& type = refrag::gguf_type_info(tensor.type);
        const int64_t n = tensor.n_values();
        promise(n >= 0 && static_cast<uint64_t>(n / type.block_values) * type.block_bytes == tensor.bytes,
                "shape and type fill the range");
        const int64_t columns = tensor.shape.back();
        if (n == 0) continue;
        std::vector<float> row(static_cast<size_t>(columns));
        file.read_rows(tensor, 0, 1, row.data());
        file.read_rows(tensor, n / columns - 1, 1, row.data());
    }
}

void check_config(const refrag::DecoderConfig& c) {
    promise(c.dim > 0 && c.hidden_dim > 0 && c.n_layers > 0 && c.max_seq_len > 0, "sizes are positive");
    promise(c.n_kv_heads > 0 && c.n_heads % c.n_kv_heads == 0, "heads share keys evenly");
    promise(c.head_dim > 0 && c.head_dim % 2 == 0, "a head is rotated in pairs");
    for (const float f : c.inverse_frequencies()) promise(std::isfinite(f), "frequencies are finite");
}

}  // namespace

void fuzz_gguf(std::string_view input) {
    static const ScratchDir scratch;
    scratch.write("model.gguf", input);
    refused([&] {
        const refrag::GgufFile file(scratch.file("model.gguf"));
        check_file(file, input);
        refused([&] { check_config(refrag::read_gguf_config(file)); });
        refused([&] { check_tokenizer(refrag::Tokenizer::from_gguf(file), "a1 b  c"); });
    });
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_gguf)
