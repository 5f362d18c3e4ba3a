// io/safetensors: one case for each way in which a file can lie, reading of every dtype at odd places, and
// shards.
#include <doctest/doctest.h>
#include <unistd.h>

#include <cmath>
#include <set>

#include "io/json.h"
#include "io/safetensors.h"
#include "safetensors_writer.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// The message for a file of these bytes.
std::string refusal_of_bytes(std::string_view bytes) {
    const TempDir dir;
    const std::string path = dir.write("x.safetensors", bytes);
    std::string message = error_of([&] { SafetensorsFile file(path); });
    if (message != "(no error)") CHECK(contains(message, path));
    return message;
}

// The message for a file with this header and n_data bytes of data.
std::string refusal(const std::string& header, size_t n_data) {
    return refusal_of_bytes(safetensors_bytes(header, std::string(n_data, '\0')));
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

// One F32 tensor "a" of two values at the given offsets.
std::string one(const std::string& offsets) {
    return "{\"a\":" + entry("F32", "[2]", offsets) + "}";
}

constexpr const char* no_error = "(no error)";

}  // namespace

TEST_CASE("safetensors: header length field cut short") {
    CHECK(contains(refusal_of_bytes(""), "expected at least 8 bytes of safetensors header length, found 0"));
    CHECK(contains(refusal_of_bytes("1234567"), "found 7"));
}

TEST_CASE("safetensors: header longer than 100 MB") {
    CHECK(contains(refusal_of_bytes(std::string("\x01\xE1\xF5\x05\0\0\0\0{}", 10)),
                   "header is too long: expected at most 100000000 bytes, found 100000001"));
    CHECK(contains(refusal_of_bytes(std::string(8, '\xFF') + "{}"), "found 18446744073709551615"));
}

TEST_CASE("safetensors: header beyond the file") {
    CHECK(contains(refusal_of_bytes(std::string("\x03\0\0\0\0\0\0\0{}", 10)),
                   "header passes the end of the file: it needs 11 bytes, the file has 10"));
}

TEST_CASE("safetensors: header must begin with a brace") {
    CHECK(contains(refusal(" {}", 0), "expected the safetensors header to begin with '{', found ' '"));
    CHECK(contains(refusal("", 0), "found an empty one"));
    CHECK(contains(refusal("\xEF\xBB\xBF{}", 0), "begin with '{'"));
    CHECK(contains(refusal("[]", 0), "begin with '{'"));
}

TEST_CASE("safetensors: header padded with spaces is fine, with anything else is not") {
    CHECK(refusal(one("[0,8]") + "     ", 8) == no_error);
    CHECK(contains(refusal(one("[0,8]") + std::string("\0\0", 2), 8), "not valid JSON"));
    CHECK(contains(refusal(one("[0,8]") + "x", 8), "not valid JSON"));
}

TEST_CASE("safetensors: header that is not JSON") {
    CHECK(contains(refusal("{\"a\":", 0), "not valid JSON"));
    CHECK(contains(refusal("{" + std::string(100000, '['), 0), "not valid JSON"));
    CHECK(contains(refusal("{\"a\":" + std::string(100000, '['), 0), "at most 64 levels"));
}

TEST_CASE("safetensors: header that is not UTF-8") {
    CHECK(contains(refusal("{\"\xFF\":" + entry("F32", "[2]", "[0,8]") + "}", 8), "not valid JSON"));
}

TEST_CASE("safetensors: duplicate tensor name") {
    CHECK(contains(
        refusal("{\"a\":" + entry("F32", "[1]", "[0,4]") + ",\"a\":" + entry("F32", "[1]", "[4,8]") + "}", 8),
        "key \"a\" occurs twice"));
}

TEST_CASE("safetensors: duplicate or unknown key within an entry") {
    CHECK(contains(
        refusal("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
        "key \"dtype\" occurs twice"));
    CHECK(contains(refusal("{\"a\":{\"dtype\":\"F32\",\"x\":1,\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
                   "unknown key \"x\""));
}

TEST_CASE("safetensors: metadata must be a map of strings") {
    CHECK(refusal("{\"__metadata__\":{\"format\":\"pt\"},\"a\":" + entry("F32", "[2]", "[0,8]") + "}", 8) ==
          no_error);
    CHECK(contains(refusal("{\"__metadata__\":{\"n\":1}}", 0),
                   "__metadata__: key \"n\": expected a string, found an integer"));
    CHECK(contains(refusal("{\"__metadata__\":[]}", 0),
                   "__metadata__: expected an object of strings, found an array"));
}

TEST_CASE("safetensors: entry that is no entry") {
    CHECK(contains(refusal("{\"a\":5}", 0),
                   "tensor \"a\": expected an object with dtype, shape and data_offsets"));
    CHECK(
        contains(refusal("{\"a\":{\"shape\":[],\"data_offsets\":[0,4]}}", 4), "expected the key \"dtype\""));
    CHECK(contains(refusal("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4),
                   "expected the key \"shape\""));
    CHECK(contains(refusal("{\"a\":{\"dtype\":\"F32\",\"shape\":[]}}", 4),
                   "expected the key \"data_offsets\""));
}

TEST_CASE("safetensors: unknown dtype") {
    CHECK(contains(refusal("{\"a\":" + entry("F31", "[2]", "[0,8]") + "}", 8),
                   "tensor \"a\": unknown dtype \"F31\""));
    CHECK(contains(refusal("{\"a\":" + entry("f32", "[2]", "[0,8]") + "}", 8), "unknown dtype \"f32\""));
    CHECK(contains(refusal("{\"a\":{\"dtype\":32,\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
                   "expected a string"));
}

TEST_CASE("safetensors: shape that is not a list of non-negative integers") {
    for (const char* shape :
         {"[-1]", "[2.0]", "[\"2\"]", "[null]", "[true]", "2", "{}", "[[2]]", "[18446744073709551615]"}) {
        CAPTURE(shape);
        CHECK(contains(refusal("{\"a\":" + entry("F32", shape, "[0,8]") + "}", 8), "key \"a.shape"));
    }
}

TEST_CASE("safetensors: shape whose size overflows") {
    CHECK(contains(refusal("{\"a\":" + entry("F32", "[4294967296,4294967296]", "[0,8]") + "}", 8),
                   "overflows"));
    CHECK(
        contains(refusal("{\"a\":" + entry("F32", "[4611686018427387905]", "[0,8]") + "}", 8), "overflows"));
    CHECK(contains(refusal("{\"a\":" + entry("F32", "[9223372036854775807,2,2]", "[0,8]") + "}", 8),
                   "overflows"));
}

TEST_CASE("safetensors: too many dimensions") {
    std::string shape = "[1";
    for (int i = 0; i < 100; ++i) shape += ",1";
    CHECK(contains(refusal("{\"a\":" + entry("F32", shape + "]", "[0,4]") + "}", 4),
                   "expected at most 64 dimensions"));
}

TEST_CASE("safetensors: shape and dtype that do not fill the range") {
    CHECK(contains(refusal("{\"a\":" + entry("F32", "[3]", "[0,8]") + "}", 8),
                   "shape [3] with dtype F32 needs 12 bytes, data_offsets give 8"));
    CHECK(contains(refusal("{\"a\":" + entry("F16", "[2]", "[0,8]") + "}", 8),
                   "needs 4 bytes, data_offsets give 8"));
    CHECK(contains(refusal("{\"a\":" + entry("F4", "[3]", "[0,2]") + "}", 2), "does not fill whole bytes"));
}

TEST_CASE("safetensors: offsets that are no pair of non-negative integers") {
    for (const char* offsets : {"[0]", "[0,4,8]", "[]"})
        CHECK(contains(refusal(one(offsets), 8), "expected 2 data_offsets"));
    for (const char* offsets : {"[-8,0]", "[0,8.0]", "[\"0\",8]", "{}", "null"})
        CHECK(contains(refusal(one(offsets), 8), "key \"a.data_offsets"));
}

TEST_CASE("safetensors: offsets that end before they begin") {
    CHECK(contains(refusal(one("[8,0]"), 8), "data_offsets [8, 0] end before they begin"));
}

TEST_CASE("safetensors: offsets beyond the file") {
    CHECK(contains(refusal(one("[0,8]"), 7),
                   "data_offsets [0, 8] pass the end of the data, which has 7 bytes"));
    CHECK(contains(refusal(one("[9223372036854775799,9223372036854775807]"), 8), "pass the end of the data"));
}

TEST_CASE("safetensors: overlapping tensors") {
    const std::string header =
        "{\"a\":" + entry("F32", "[2]", "[0,8]") + ",\"b\":" + entry("F32", "[2]", "[4,12]") + "}";
    CHECK(contains(refusal(header, 12),
                   "tensor \"a\" and tensor \"b\": overlapping data_offsets: expected 8, found 4"));
    const std::string same =
        "{\"a\":" + entry("F32", "[2]", "[0,8]") + ",\"b\":" + entry("F32", "[2]", "[0,8]") + "}";
    CHECK(contains(refusal(same, 8), "overlapping"));
}

TEST_CASE("safetensors: hole before, between and after tensors") {
    CHECK(contains(refusal(one("[4,12]"), 12),
                   "tensor \"a\": a hole in the data: expected data_offsets to go on at 0, found 4"));
    const std::string header =
        "{\"b\":" + entry("F32", "[1]", "[8,12]") + ",\"a\":" + entry("F32", "[1]", "[0,4]") + "}";
    CHECK(contains(refusal(header, 12), "tensor \"a\" and tensor \"b\": a hole in the data"));
    CHECK(contains(refusal(one("[0,8]"), 9), "the tensors end at byte"));
    CHECK(contains(refusal("{}", 1), "but the file has 11 bytes"));
}

TEST_CASE("safetensors: no tensors, empty tensors and scalars are fine") {
    CHECK(refusal("{}", 0) == no_error);
    const TempDir dir;
    const std::string header = "{\"e\":" + entry("F32", "[0,5]", "[0,0]") +
                               ",\"s\":" + entry("F32", "[]", "[0,4]") +
                               ",\"z\":" + entry("I64", "[0]", "[4,4]") + "}";
    const SafetensorsFile file(dir.write("x.safetensors", safetensors_bytes(header, "\0\0\x80\x3f"s)));
    REQUIRE(file.find("e") != nullptr);
    CHECK(file.find("e")->n_values() == 0);
    CHECK(file.find("s")->n_values() == 1);
    CHECK(file.find("s")->shape_text() == "[]");
    CHECK_FALSE(file.find("z")->dtype.has_value());
    CHECK(file.find("none") == nullptr);
}

TEST_CASE("safetensors: not a safetensors file at all") {
    CHECK(contains(refusal_of_bytes("PK\x03\x04 a pickle in a zip archive, by its first bytes"),
                   "header is too long"));
    CHECK(contains(refusal_of_bytes(std::string(64, '\0')), "found an empty one"));
}

TEST_CASE("safetensors: all readable dtypes convert exactly, wherever they lie") {
    const TempDir dir;
    const std::vector<TestTensor> tensors = {
        {"b", "BOOL", {1}, "\x01"},
        {"bf16", "BF16", {3}, "\x80\x3f\x00\xc0\xc0\x7f"s},
        {"f16", "F16", {2, 2}, "\x00\x3c\x01\x00\x00\xfc\xff\x7b"s},
        {"f32", "F32", {2}, "\x00\x00\x80\x3f\x00\x00\x00\x80"s},
        {"i32", "I32", {1}, "\x2a\x00\x00\x00"s},
        {"i64", "I64", {2}, std::string(16, '\0')},
    };
    std::set<uint64_t> places;
    for (size_t n_spaces = 0; n_spaces < 4; ++n_spaces) {
        write_safetensors(dir.file("model.safetensors"), tensors, n_spaces);
        const WeightFiles weights = WeightFiles::open(dir.path());
        CHECK(weights.tensors().size() == 6);
        places.insert(weights.get("f32").offset % 4);

        const auto bf16 = weights.read_f32("bf16");
        CHECK(bf16[0] == 1.0f);
        CHECK(bf16[1] == -2.0f);
        CHECK(std::isnan(bf16[2]));
        const auto f16 = weights.read_f32("f16");
        CHECK(f16[0] == 1.0f);
        CHECK(f16[1] == 0x1p-24f);
        CHECK(f16[2] == -INFINITY);
        CHECK(f16[3] == 65504.0f);
        const auto f32 = weights.read_f32("f32");
        CHECK(f32[0] == 1.0f);
        CHECK(std::signbit(f32[1]));
    }
    CHECK(places.size() == 4);  // aligned and not

    const WeightFiles weights = WeightFiles::open(dir.path());
    CHECK(contains(error_of([&] { weights.read_f32("i64"); }),
                   "tensor \"i64\": expected dtype F32, F16 or BF16, found I64"));
    CHECK(contains(error_of([&] { weights.read_f32("i32"); }), "found I32"));
    int32_t raw = 0;
    weights.read(weights.get("i32"), &raw, sizeof raw);
    CHECK(raw == 42);
    uint16_t part = 0;
    weights.read_part(weights.get("bf16"), 2, &part, 2);
    CHECK(part == 0xc000);
    CHECK(contains(error_of([&] { weights.read_part(weights.get("bf16"), 5, &part, 2); }),
                   "cannot read 2 bytes at 5"));
    CHECK(contains(error_of([&] { weights.read(weights.get("i64"), &part, 2); }),
                   "has 16 bytes, its place has 2"));
    CHECK(contains(error_of([&] { weights.get("gone"); }), "expected tensor \"gone\", found none"));
}

TEST_CASE("safetensors: large half tensors are converted piece by piece") {
    const TempDir dir;
    std::string bytes;
    for (int i = 0; i < 150'001; ++i) {
        const uint16_t value = static_cast<uint16_t>(i % 0x7c00);
        bytes.append(reinterpret_cast<const char*>(&value), 2);
    }
    write_safetensors(dir.file("w.safetensors"), {{"h", "F16", {150'001}, bytes}});
    const auto values = WeightFiles::open(dir.file("w.safetensors")).read_f32("h");
    bool same = values.size() == 150'001;
    for (size_t i = 0; same && i < values.size(); ++i)
        same = values[i] == f16_to_f32(static_cast<uint16_t>(i % 0x7c00));
    CHECK(same);
}

TEST_CASE("safetensors: file cut while in use") {
    const TempDir dir;
    const std::string path = dir.file("model.safetensors");
    write_safetensors(path, {{"a", "F32", {1000}, std::string(4000, '\0')}});
    const WeightFiles weights = WeightFiles::open(dir.path());
    REQUIRE(::truncate(path.c_str(), 2000) == 0);
    CHECK(contains(error_of([&] { weights.read_f32("a"); }), "cut while in use"));
}

namespace {

const std::vector<TestTensor> shard_1 = {{"a", "F32", {1}, "\0\0\x80\x3f"s},
                                         {"b", "F32", {1}, "\0\0\x00\x40"s}};
const std::vector<TestTensor> shard_2 = {{"c", "F32", {1}, "\0\0\x40\x40"s}};

// Writes two shards and an index with this weight_map; gives the message of opening them.
std::string sharded_refusal(const TempDir& dir, const std::string& weight_map) {
    write_safetensors(dir.file("m-1.safetensors"), shard_1);
    write_safetensors(dir.file("m-2.safetensors"), shard_2);
    dir.write("model.safetensors.index.json",
              "{\"metadata\": {\"total_size\": 12}, \"weight_map\": " + weight_map + "}");
    return error_of([&] { WeightFiles::open(dir.path()); });
}

}  // namespace

TEST_CASE("safetensors: shards") {
    const TempDir dir;
    REQUIRE(
        sharded_refusal(dir, R"({"c": "m-2.safetensors", "a": "m-1.safetensors", "b": "m-1.safetensors"})") ==
        no_error);
    const WeightFiles weights = WeightFiles::open(dir.path());
    CHECK(weights.paths().size() == 2);
    CHECK(weights.read_f32("a")[0] == 1.0f);
    CHECK(weights.read_f32("b")[0] == 2.0f);
    CHECK(weights.read_f32("c")[0] == 3.0f);
    CHECK(weights.paths()[weights.get("c").file] == dir.file("m-2.safetensors"));
}

TEST_CASE("safetensors: shard name that leaves the directory") {
    const TempDir dir;
    for (const char* name :
         {"../m-1.safetensors", "/etc/passwd", "sub/m.safetensors", "..", ".", "", "a\\\\b"}) {
        CAPTURE(name);
        CHECK(contains(sharded_refusal(dir, str("{\"a\": \"", name, "\"}")),
                       "key \"weight_map.a\": expected a plain file name within the directory"));
    }
}

TEST_CASE("safetensors: index and shards that disagree") {
    const TempDir dir;
    CHECK(contains(
        sharded_refusal(dir, R"({"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-1.safetensors"})"),
        "weight_map puts tensor \"c\" into m-1.safetensors, which does not hold it"));
    CHECK(sharded_refusal(dir, R"({"a": "m-1.safetensors", "c": "m-2.safetensors"})") == "(no error)");
    CHECK(WeightFiles::open(dir.path()).tensors().size() == 2);  // "b" is a stray
    CHECK(contains(sharded_refusal(dir, R"({"a": "m-3.safetensors"})"), "m-3.safetensors: cannot be opened"));
    CHECK(contains(sharded_refusal(dir, "{}"), "weight_map names no tensor"));
    CHECK(contains(sharded_refusal(dir, "[]"), "key \"weight_map\": expected an object"));
    CHECK(contains(sharded_refusal(dir, R"({"a": 1})"), "key \"weight_map.a\": expected a string"));
    CHECK(contains(sharded_refusal(dir, R"({"a": "m-1.safetensors", "a": "m-1.safetensors"})"),
                   "occurs twice"));
}

TEST_CASE("safetensors: one tensor in two shards") {
    const TempDir dir;
    write_safetensors(dir.file("m-3.safetensors"), shard_1);
    CHECK(sharded_refusal(dir, R"({"a": "m-1.safetensors", "b": "m-3.safetensors"})") == "(no error)");
    const WeightFiles files = WeightFiles::open(dir.path());  // the index decides
    CHECK(path_name(files.paths()[files.get("a").file]) == "m-1.safetensors");
    CHECK(path_name(files.paths()[files.get("b").file]) == "m-3.safetensors");
}

TEST_CASE("safetensors: a directory with neither or both kinds") {
    const TempDir dir;
    CHECK(contains(error_of([&] { WeightFiles::open(dir.path()); }), "found neither"));
    write_safetensors(dir.file("model.safetensors"), shard_1);
    CHECK(WeightFiles::open(dir.path()).tensors().size() == 2);
    CHECK(contains(sharded_refusal(dir, R"({"a": "m-1.safetensors"})"), "found both"));
    CHECK(contains(error_of([&] { WeightFiles::open(dir.file("none")); }), "cannot be opened"));
}

TEST_CASE("safetensors: every cut of a valid file is refused, and no changed byte of the header crashes") {
    const TempDir dir;
    write_safetensors(dir.file("x"), {{"ab", "F32", {2}, std::string(8, '\x01')},
                                      {"c", "BF16", {1, 2}, std::string(4, '\x02')}});
    const std::string valid = read_file(dir.file("x"), 1000);
    for (size_t n = 0; n < valid.size(); ++n) CHECK(refusal_of_bytes(valid.substr(0, n)) != no_error);
    CHECK(refusal_of_bytes(valid + "x") != no_error);
    for (size_t i = 0; i + 12 < valid.size(); ++i) {
        for (const char c : {'\0', '9', '"', '}', '\xFF'}) {
            std::string changed = valid;
            changed[i] = c;
            refusal_of_bytes(
                changed);  // accepted (a renamed tensor) or refused with an Error, never anything else
        }
    }
}
