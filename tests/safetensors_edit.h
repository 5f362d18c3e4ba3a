// Real safetensors files as lists that a test can change and write back: whole, valid files whose tensors are
// not the ones a network expects.
#pragma once

#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "io/safetensors.h"
#include "safetensors_writer.h"

namespace refrag_test {

// All tensors of a file or a directory of weights, sorted by name.
inline std::vector<TestTensor> read_tensors(const std::string& path) {
    const refrag::WeightFiles files = refrag::WeightFiles::open(path);
    std::vector<TestTensor> tensors;
    for (const refrag::TensorEntry& entry : files.tensors()) {
        TestTensor tensor{entry.name, entry.dtype_name, entry.shape, std::string(entry.bytes, '\0')};
        files.read(entry, tensor.bytes.data(), tensor.bytes.size());
        tensors.push_back(std::move(tensor));
    }
    return tensors;
}

// As write_safetensors, but without its fsync, which hundreds of small files would wait for.
inline void write_tensors(const std::string& path, const std::vector<TestTensor>& tensors) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file << safetensors_bytes(tensors) << std::flush;
    REFRAG_CHECK(file.good(), refrag::Status::runtime, "cannot write ", path);
}

inline TestTensor& tensor_named(std::vector<TestTensor>& tensors, const std::string& name) {
    for (TestTensor& tensor : tensors) {
        if (tensor.name == name) return tensor;
    }
    refrag::fail(refrag::Status::runtime, "the test's file has no tensor ", name);
}

}  // namespace refrag_test
