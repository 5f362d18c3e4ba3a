// GGUF files: the blocks of every type against the gguf package's values, what a valid file gives, and one
// case for each attack on the format, named after it.
#include <doctest/doctest.h>

#include <cstring>

#include "gguf_writer.h"
#include "io/gguf.h"
#include "io/safetensors.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

GgufTestFile valid() {
    GgufTestFile file;
    file.pairs = {gguf_string("general.architecture", "llama"),
                  gguf_u32("llama.block_count", 2),
                  gguf_f32("llama.rope.freq_base", 10000.0f),
                  gguf_bool("tokenizer.ggml.add_bos_token", true),
                  gguf_list("tokenizer.ggml.tokens", 8, {gguf_text("a"), gguf_text("bc")}),
                  gguf_list("tokenizer.ggml.token_type", 5, {little_endian(1, 4), little_endian(3, 4)}),
                  gguf_list("tokenizer.ggml.scores", 6, {little_endian(0, 4), little_endian(0x3f800000, 4)})};
    std::string values;
    for (const uint32_t bits : {0x3f800000u, 0x40000000u, 0x40400000u, 0x40800000u, 0x40a00000u, 0x40c00000u})
        values += little_endian(bits, 4);  // 1 .. 6
    file.tensors = {{"w", 0, {3, 2}, values}, {"norm", 1, {2}, little_endian(0x3c004000, 4)}};
    return file;
}

std::string message_of(const std::string& bytes) {
    const TempDir dir;
    const std::string path = dir.file("x.gguf");
    write_file_atomic(path, bytes);
    const std::string message = error_of([&] { const GgufFile file(path); });
    if (message == "(no error)") return message;
    CHECK(message.starts_with(path + ": "));
    CHECK(printable(message, 1000) == message);
    return message.substr(path.size() + 2);
}

// `pairs` added to a valid file's.
std::string message_with(const std::vector<std::string>& pairs) {
    GgufTestFile file = valid();
    file.pairs.insert(file.pairs.end(), pairs.begin(), pairs.end());
    return message_of(file.bytes());
}

std::string message_of_entry(const std::string& name, const std::vector<uint64_t>& extents, uint32_t type,
                             uint64_t offset, size_t data_bytes = 0) {
    GgufTestFile file;
    file.tensors = {{"", 0, {}, std::string(data_bytes, '\0')}};
    std::string entry = gguf_text(name) + little_endian(extents.size(), 4);
    for (const uint64_t extent : extents) entry += little_endian(extent, 8);
    return message_of(file.bytes({entry + little_endian(type, 4) + little_endian(offset, 8)}));
}

}  // namespace

TEST_CASE("gguf: blocks of every type give the gguf package's values, bit for bit") {
    const WeightFiles golden = WeightFiles::open(repo_path("tests/golden/gguf.safetensors"));
    for (const char* name : {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}) {
        CAPTURE(name);
        const TensorEntry& blocks = golden.get(str(name, ".blocks"));
        std::string bytes(blocks.bytes, '\0');
        golden.read(blocks, bytes.data(), bytes.size());
        const std::vector<float> expected = golden.read_f32(str(name, ".values"));
        const GgufTypeInfo* info = nullptr;
        for (uint32_t id = 0; id < 31; ++id) {
            const GgufTypeInfo* known = find_gguf_type(id);
            if (known != nullptr && std::string(known->name) == name) info = known;
        }
        REQUIRE(info != nullptr);
        CHECK(gguf_type_name(info->id) == name);
        const auto n_blocks = static_cast<size_t>(blocks.shape[0]);
        CHECK(blocks.shape[1] == static_cast<int64_t>(info->block_bytes));
        REQUIRE(expected.size() == n_blocks * static_cast<size_t>(info->block_values));
        std::vector<float> values(expected.size());
        decode_gguf_blocks(info->type, bytes.data(), n_blocks, values.data());
        CHECK(std::memcmp(values.data(), expected.data(), values.size() * sizeof(float)) == 0);
    }
}

TEST_CASE("gguf: a Q4_1 block by hand, and floats as they stand") {
    // d = 0.5, m = -1; byte 0x21 at 0: value 0 is .5 * 1 - 1, value 16 is .5 * 2 - 1.
    std::string block = little_endian(0x3800, 2) + little_endian(0xbc00, 2) + "\x21" + std::string(15, '\0');
    float values[32];
    decode_gguf_blocks(GgufType::q4_1, block.data(), 1, values);
    CHECK(values[0] == -0.5f);
    CHECK(values[16] == 0.0f);
    CHECK(values[1] == -1.0f);
    const std::string floats = little_endian(0x3f8000003f800000u, 8);
    decode_gguf_blocks(GgufType::f32, floats.data(), 2, values);
    CHECK(values[1] == 1.0f);
    const std::string halves = little_endian(0xc0003c00u, 4);
    decode_gguf_blocks(GgufType::f16, halves.data(), 2, values);
    CHECK(values[1] == -2.0f);
    const std::string brains = little_endian(0x40003f80u, 4);
    decode_gguf_blocks(GgufType::bf16, brains.data(), 2, values);
    CHECK(values[1] == 2.0f);
}

TEST_CASE("gguf: a valid file, versions 2 and 3") {
    for (const uint32_t version : {2u, 3u}) {
        GgufTestFile written = valid();
        written.version = version;
        const TempDir dir;
        write_file_atomic(dir.file("x.gguf"), written.bytes());
        CHECK(is_gguf_file(dir.file("x.gguf")));
        CHECK_FALSE(is_gguf_file(dir.file("y.gguf")));
        const GgufFile file(dir.file("x.gguf"));
        CHECK(file.text("general.architecture") == "llama");
        CHECK(file.integer("llama.block_count", 1, 10) == 2);
        CHECK(file.real("llama.rope.freq_base") == 10000.0);
        CHECK(file.truth("tokenizer.ggml.add_bos_token"));
        CHECK(file.texts("tokenizer.ggml.tokens") == std::vector<std::string>{"a", "bc"});
        CHECK(file.integers("tokenizer.ggml.token_type") == std::vector<int64_t>{1, 3});
        CHECK(*file.reals_if_any("tokenizer.ggml.scores") == std::vector<double>{0, 1});
        CHECK_FALSE(file.reals_if_any("none"));
        CHECK_FALSE(file.has("none"));
        const GgufTensor* w = file.find("w");
        REQUIRE(w != nullptr);
        CHECK(w->shape_text() == "[2, 3]");
        float row[3];
        file.read_rows(*w, 1, 1, row);
        CHECK(row[0] == 4.0f);
        CHECK(row[2] == 6.0f);
        file.read_rows(*file.find("norm"), 0, 1, row);
        CHECK(row[0] == 2.0f);
        CHECK(row[1] == 1.0f);
        CHECK(error_of([&] { file.read_rows(*w, 1, 2, row); }) ==
              str(dir.file("x.gguf"), ": tensor \"w\": cannot read rows 1 to 3 of 2"));
    }
}

TEST_CASE("gguf: a value of another kind or range is refused with key, expected and found") {
    const TempDir dir;
    write_file_atomic(dir.file("x.gguf"), valid().bytes());
    const GgufFile file(dir.file("x.gguf"));
    const auto message = [&](auto&& get) { return error_of(get).substr(dir.file("x.gguf").size() + 2); };
    CHECK(message([&] { file.text("none"); }) == "key \"none\": expected a text, found none");
    CHECK(message([&] { file.text("llama.block_count"); }) ==
          "key \"llama.block_count\": expected a text, found 2");
    CHECK(message([&] { file.integer("llama.block_count", 3, 9); }) ==
          "key \"llama.block_count\": expected an integer of 3 to 9, found 2");
    CHECK(message([&] { file.truth("general.architecture"); }) ==
          "key \"general.architecture\": expected a truth value, found \"llama\"");
    CHECK(
        message([&] { file.texts("tokenizer.ggml.token_type"); }) ==
        "key \"tokenizer.ggml.token_type\": expected a list of texts, found a list of integers with 2 items");
}

TEST_CASE("gguf attack: not a GGUF file, another version, another byte order") {
    CHECK(message_of("") ==
          "the file ends within the file's first four bytes: expected 4 bytes at 0, found 0");
    CHECK(message_of("GGML\1\0\0\0") == "expected a GGUF file, which begins with \"GGUF\", found \"GGML\"");
    GgufTestFile file = valid();
    file.version = 1;
    CHECK(message_of(file.bytes()) == "GGUF version: expected 2 or 3, found 1");
    file.version = 3u << 24;
    CHECK(message_of(file.bytes()) == "expected a little-endian GGUF file, found a big-endian one");
}

TEST_CASE("gguf attack: cut short anywhere") {
    const std::string bytes = valid().bytes();
    for (size_t n = 0; n < bytes.size(); ++n) {
        CAPTURE(n);
        CHECK(message_of(bytes.substr(0, n)) != "(no error)");
    }
    CHECK(message_of(bytes) == "(no error)");
    CHECK(message_of(bytes + std::string(64, '\0')).find("but the file has") != std::string::npos);
}

TEST_CASE("gguf attack: counts that pass the file's end") {
    const std::string head = "GGUF" + little_endian(3, 4);
    CHECK(message_of(head + little_endian(0, 8) + little_endian(UINT64_MAX, 8)) ==
          "metadata: 18446744073709551615 keys pass the end of the file, which has 0 bytes left");
    CHECK(message_of(head + little_endian(uint64_t{1} << 60, 8) + little_endian(0, 8)) ==
          "tensors: a table of 1152921504606846976 passes the end of the file, which has 0 bytes left");
}

TEST_CASE("gguf attack: lengths and lists that pass the file's end or wrap") {
    const std::string far = little_endian(UINT64_MAX, 8);
    CHECK(message_with({gguf_pair("k", 8, far)}).find("key \"k\" passes the end of the file") == 0);
    CHECK(message_with({far + "xxxxxxxxxxxx"}).find("the name of key 7 passes the end of the file") == 0);
    CHECK(message_with({gguf_pair("k", 9, little_endian(4, 4) + little_endian(uint64_t{1} << 62, 8))})
              .find("key \"k\": a list of 4611686018427387904 items passes the end of the file") == 0);
    CHECK(message_with({gguf_pair("k", 9, little_endian(8, 4) + little_endian(1u << 20, 8))})
              .find("key \"k\": a list of 1048576 items passes the end of the file") == 0);
}

TEST_CASE("gguf attack: lists of lists, types out of range, truth values that are neither") {
    CHECK(message_with({gguf_pair("k", 9, little_endian(9, 4) + little_endian(1, 8))}) ==
          "key \"k\": expected a list of plain values, found a list of lists");
    CHECK(message_with({gguf_pair("k", 13, little_endian(0, 8))}) ==
          "key \"k\": expected a value type of 0 to 12, found 13");
    CHECK(message_with({gguf_pair("k", 9, little_endian(77, 4) + little_endian(1, 8))}) ==
          "key \"k\": expected a value type of 0 to 12, found 77");
    CHECK(message_with({gguf_pair("k", 7, "\2")}) == "key \"k\": expected a truth value of 0 or 1, found 2");
    CHECK(message_with({gguf_pair("k", 10, little_endian(UINT64_MAX, 8))}) ==
          "key \"k\": expected at most 9223372036854775807, found 18446744073709551615");
    CHECK(message_with({gguf_pair("k", 11, little_endian(UINT64_MAX, 8))}) == "(no error)");  // -1
}

TEST_CASE("gguf attack: keys and tensors that stand there twice or have no name") {
    CHECK(message_with({gguf_u32("llama.block_count", 2)}) == "key \"llama.block_count\" stands there twice");
    CHECK(message_with({gguf_u32("", 2)}) == "key 7: expected a name, found an empty one");
    GgufTestFile file = valid();
    file.tensors[1].name = "w";
    CHECK(message_of(file.bytes()) == "tensor \"w\" is there twice");
    file.tensors[1].name = "";
    CHECK(message_of(file.bytes()) == "tensor 1: expected a name, found an empty one");
}

TEST_CASE("gguf attack: alignment that is none") {
    for (const uint32_t alignment : {0u, 4u, 24u, 1u << 30}) {
        CAPTURE(alignment);
        CHECK(message_with({gguf_u32("general.alignment", alignment)})
                  .find("key \"general.alignment\": expected ") == 0);
    }
    GgufTestFile file = valid();
    file.alignment = 64;
    file.pairs.push_back(gguf_u32("general.alignment", 64));
    CHECK(message_of(file.bytes()) == "(no error)");
}

TEST_CASE("gguf attack: shapes that overflow, have no or too many dimensions, or do not fill blocks") {
    CHECK(message_of_entry("t", {}, 0, 0) == "tensor \"t\": expected 1 to 4 dimensions, found 0");
    CHECK(message_of_entry("t", {1, 1, 1, 1, 1}, 0, 0) ==
          "tensor \"t\": expected 1 to 4 dimensions, found 5");
    CHECK(message_of_entry("t", {UINT64_MAX}, 0, 0) == "tensor \"t\": the size of its shape overflows");
    CHECK(message_of_entry("t", {uint64_t{1} << 32, uint64_t{1} << 32}, 0, 0) ==
          "tensor \"t\": the size of its shape overflows");
    CHECK(message_of_entry("t", {uint64_t{1} << 62}, 0, 0) ==
          "tensor \"t\": the size of its shape overflows");
    CHECK(message_of_entry("t", {48}, 3, 0) ==
          "tensor \"t\": expected rows of a multiple of 32 values for Q4_1, found shape [48]");
    CHECK(message_of_entry("t", {128}, 14, 0) ==
          "tensor \"t\": expected rows of a multiple of 256 values for Q6_K, found shape [128]");
}

TEST_CASE("gguf attack: types that are not supported are refused by name") {
    CHECK(message_of_entry("t", {256}, 23, 0) ==
          "tensor \"t\": expected type F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K, "
          "found IQ4_XS");
    CHECK(message_of_entry("t", {256}, 99, 0).ends_with("found type 99"));
}

TEST_CASE("gguf attack: data that overlap, leave holes, are not aligned or pass the end") {
    CHECK(message_of_entry("t", {8}, 0, 16, 64) ==
          "tensor \"t\": expected an offset that is a multiple of 32, found 16");
    CHECK(message_of_entry("t", {8}, 0, 32, 64) ==
          "tensor \"t\": expected its data at offset 0, found 32: a hole in the data");
    CHECK(message_of_entry("t", {8}, 0, uint64_t{1} << 63, 64)
              .find("tensor \"t\": expected its data at offset 0, found 9223372036854775808") == 0);
    CHECK(message_of_entry("t", {8}, 0, 0, 16)
              .find("tensor \"t\": its 32 bytes at offset 0 pass the end of the file") == 0);
    // The data would begin at the next multiple of 32, beyond the end.
    const std::string cut =
        message_of(read_file(repo_path("tests/fuzz/corpus/gguf/no-values-past-the-end"), 1024));
    CHECK(cut.find("its 0 bytes at offset 0 pass the end of the file, which has 0 bytes of data") !=
          std::string::npos);
    GgufTestFile file = valid();
    std::vector<std::string> entries = file.entries();
    entries[1].replace(entries[1].size() - 8, 8, little_endian(0, 8));  // both begin at 0
    CHECK(message_of(file.bytes(entries)).find("it overlaps the tensor before") != std::string::npos);
}
