// Any bytes as a .safetensors file. What is accepted: the tensors tile the data without a hole, every shape
// and dtype fills its range, every byte can be read, and names are found again.
#include <algorithm>
#include <map>
#include <vector>

#include "base/check.h"
#include "io/safetensors.h"
#include "main.h"

namespace refrag_fuzz {
namespace {

using refrag::SafetensorsFile;
using refrag::TensorEntry;
using refrag::WeightFiles;

void check_file(const SafetensorsFile& file, std::string_view input) {
    uint64_t data_begin = 8;
    for (size_t i = 0; i < 8; ++i)
        data_begin += static_cast<uint64_t>(static_cast<unsigned char>(input[i])) << (8 * i);
    promise(data_begin <= input.size(), "the header lies within the file");
    uint64_t at = data_begin;
    for (const TensorEntry& tensor : file.tensors()) {
        promise(tensor.offset == at, "tensors tile the data");
        at += tensor.bytes;
        uint64_t n = 1;
        for (const int64_t extent : tensor.shape) {
            promise(extent >= 0, "an extent is not negative");
            n *= static_cast<uint64_t>(extent);
        }
        promise(tensor.shape.size() <= 64, "a shape is short");
        promise(n == static_cast<uint64_t>(tensor.n_values()), "n_values is the product of the shape");
        if (tensor.dtype)
            promise(n * refrag::dtype_bytes(*tensor.dtype) == tensor.bytes, "shape and dtype fill the range");
        promise(file.find(tensor.name) == &tensor, "a tensor is found by its name");
        std::string bytes(tensor.bytes, '\0');
        file.read(tensor, 0, bytes.data(), bytes.size());
        promise(bytes == input.substr(tensor.offset, tensor.bytes), "what is read is what the file holds");
    }
    promise(at == input.size(), "tensors end with the file");
}

}  // namespace

void fuzz_safetensors(std::string_view input) {
    static const ScratchDir scratch;
    scratch.write("model.safetensors", input);
    const bool no = refused([&] { check_file(SafetensorsFile(scratch.file("model.safetensors")), input); });
    if (no) return;
    // The same file as a network's weights: what can be computed with is read as floats, the rest refused.
    const WeightFiles weights = WeightFiles::open(scratch.path());
    for (const TensorEntry& tensor : weights.tensors()) {
        const bool computable = tensor.dtype && *tensor.dtype != refrag::DType::i32;
        const bool not_read = refused([&] {
            promise(weights.read_f32(tensor).size() == static_cast<size_t>(tensor.n_values()),
                    "all values are read");
        });
        promise(not_read == !computable, "floats are read, and nothing else");
    }
}

}  // namespace refrag_fuzz

REFRAG_FUZZ_ENTRY(fuzz_safetensors)
