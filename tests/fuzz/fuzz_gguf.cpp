// Any bytes as a GGUF file. What is accepted: ranges lie within the file, in order and aligned, shapes and
// types fill them, every row can be read, and names are found again.
#include <algorithm>
#include <vector>

#include "base/check.h"
#include "io/gguf.h"
#include "main.h"

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

}  // namespace

void fuzz_gguf(std::string_view input) {
    static const ScratchDir scratch;
    scratch.write("model.gguf", input);
    refused([&] { check_file(refrag::GgufFile(scratch.file("model.gguf")), input); });
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_gguf)
