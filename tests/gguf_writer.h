// Writes GGUF files for tests: valid ones from metadata and tensors, with every field open to spoiling.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace refrag_test {

// `value` as n_bytes little-endian bytes.
inline std::string little_endian(uint64_t value, int n_bytes) {
    std::string bytes;
    for (int i = 0; i < n_bytes; ++i) bytes.push_back(static_cast<char>(value >> (8 * i) & 0xff));
    return bytes;
}

inline std::string gguf_text(std::string_view text) {
    return little_endian(text.size(), 8) + std::string(text);
}

// Metadata pairs, as they stand in the file. The numbers are the format's value types.
inline std::string gguf_pair(std::string_view key, uint32_t type, const std::string& value) {
    return gguf_text(key) + little_endian(type, 4) + value;
}
inline std::string gguf_u32(std::string_view key, uint32_t value) {
    return gguf_pair(key, 4, little_endian(value, 4));
}
inline std::string gguf_f32(std::string_view key, float value) {
    return gguf_pair(key, 6, little_endian(std::bit_cast<uint32_t>(value), 4));
}
inline std::string gguf_bool(std::string_view key, bool value) {
    return gguf_pair(key, 7, little_endian(value ? 1 : 0, 1));
}
inline std::string gguf_string(std::string_view key, std::string_view value) {
    return gguf_pair(key, 8, gguf_text(value));
}
inline std::string gguf_list(std::string_view key, uint32_t type, const std::vector<std::string>& items) {
    std::string value = little_endian(type, 4) + little_endian(items.size(), 8);
    for (const std::string& item : items) value += item;
    return gguf_pair(key, 9, value);
}

struct GgufTestTensor {
    std::string name;
    uint32_t type = 0;              // 0: F32
    std::vector<uint64_t> extents;  // as the file has them, the row's length first
    std::string bytes;
};

struct GgufTestFile {
    std::string magic = "GGUF";
    uint32_t version = 3;
    std::vector<std::string> pairs;
    std::vector<GgufTestTensor> tensors;
    uint64_t alignment = 32;

    // The table's entries, offsets included.
    std::vector<std::string> entries() const {
        std::vector<std::string> list;
        uint64_t offset = 0;
        for (const GgufTestTensor& tensor : tensors) {
            std::string entry = gguf_text(tensor.name) + little_endian(tensor.extents.size(), 4);
            for (const uint64_t extent : tensor.extents) entry += little_endian(extent, 8);
            list.push_back(entry + little_endian(tensor.type, 4) + little_endian(offset, 8));
            offset = (offset + tensor.bytes.size() + alignment - 1) / alignment * alignment;
        }
        return list;
    }

    std::string bytes() const { return bytes(entries()); }
    // With other entries than its own.
    std::string bytes(const std::vector<std::string>& table) const {
        std::string file = magic + little_endian(version, 4) + little_endian(table.size(), 8) +
                           little_endian(pairs.size(), 8);
        for (const std::string& pair : pairs) file += pair;
        for (const std::string& entry : table) file += entry;
        for (const GgufTestTensor& tensor : tensors) {
            file.append((alignment - file.size() % alignment) % alignment, '\0');
            file += tensor.bytes;
        }
        return file;
    }
};

}  // namespace refrag_test
