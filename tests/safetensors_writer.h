// Writes safetensors files for tests: valid ones from tensors, and any bytes behind any header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io/file.h"
#include "io/json.h"

namespace refrag_test {

using namespace std::string_literals;

// A tensor as it shall stand in the file; `bytes` are its little-endian values.
struct TestTensor {
    std::string name;
    std::string dtype;
    std::vector<int64_t> shape;
    std::string bytes;
};

// The length field, the header as given, the data as given.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
    std::string file;
    for (int shift = 0; shift < 64; shift += 8)
        file.push_back(static_cast<char>(static_cast<uint64_t>(header.size()) >> shift & 0xFF));
    return file + header + data;
}

// The bytes of a valid file with the tensors one after another in the order given; n_spaces after the header
// shift all data.
inline std::string safetensors_bytes(const std::vector<TestTensor>& tensors, size_t n_spaces = 0) {
    refrag::JsonWriter header;
    std::string data;
    header.begin_object();
    for (const TestTensor& tensor : tensors) {
        header.key(tensor.name).begin_object().key("dtype").string(tensor.dtype).key("shape").begin_array();
        for (const int64_t extent : tensor.shape) header.integer(extent);
        header.end_array().key("data_offsets").begin_array().integer(static_cast<int64_t>(data.size()));
        data += tensor.bytes;
        header.integer(static_cast<int64_t>(data.size())).end_array().end_object();
    }
    header.end_object();
    return safetensors_bytes(header.text() + std::string(n_spaces, ' '), data);
}

inline void write_safetensors(const std::string& path, const std::vector<TestTensor>& tensors,
                              size_t n_spaces = 0) {
    refrag::write_file_atomic(path, safetensors_bytes(tensors, n_spaces));
}

}  // namespace refrag_test
