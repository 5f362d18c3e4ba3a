// One case for each attack on a safetensors file, named after it: every rule of the format
// (huggingface/safetensors, README, "Format") is refused with a message of its own, and what the format
// allows is read. test_attack_shards.cpp has the index of shards, test_safetensors.cpp the ordinary cases.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/safetensors.h"
#include "safetensors_writer.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr const char* no_error = "(no error)";

// The 8 bytes of a header's length, then anything.
std::string with_length(uint64_t length, const std::string& rest) {
    std::string bytes;
    for (int shift = 0; shift < 64; shift += 8) bytes.push_back(static_cast<char>(length >> shift & 0xFF));
    return bytes + rest;
}

// A file in memory: hundreds of files on a disk would be what these tests wait for.
class MemoryFile {
  public:
    explicit MemoryFile(std::string_view bytes) : descriptor_(::memfd_create("x", MFD_CLOEXEC)) {
        size_t done = 0;
        while (done < bytes.size()) {
            const ssize_t put = ::write(descriptor_, bytes.data() + done, bytes.size() - done);
            REQUIRE(put > 0);
            done += static_cast<size_t>(put);
        }
    }
    ~MemoryFile() { ::close(descriptor_); }
    MemoryFile(const MemoryFile&) = delete;
    MemoryFile& operator=(const MemoryFile&) = delete;
    std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

  private:
    int descriptor_;
};

// What reading these bytes says after "PATH: ".
std::string message_of_bytes(std::string_view bytes) {
    const MemoryFile memory(bytes);
    const std::string path = memory.path();
    const std::string message = error_of([&] { SafetensorsFile file(path); });
    if (message == no_error) return message;
    CHECK(message.starts_with(path));
    CHECK(message.size() < 1000);
    CHECK(printable(message, 1000) == message);
    const size_t colon = message.find(": ", path.size());
    return message.substr(colon + 2);
}
std::string message_of(const std::string& header, size_t n_data = 0) {
    return message_of_bytes(safetensors_bytes(header, std::string(n_data, '\0')));
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}
std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{\"a\":" + entry(dtype, shape, offsets) + "}";
}

}  // namespace

// ---- the length field ---------------------------------------------------------------------------

TEST_CASE("attack: file shorter than the length field") {
    for (size_t n = 0; n < 8; ++n)
        CHECK(message_of_bytes(std::string(n, '\0')) ==
              str("expected at least 8 bytes of safetensors header length, found ", n));
}
TEST_CASE("attack: header length zero") {
    CHECK(message_of_bytes(with_length(0, "{}")) ==
          "expected the safetensors header to begin with '{', found an empty one");
}
TEST_CASE("attack: header length one beyond the file") {
    CHECK(message_of_bytes(with_length(3, "{}")) ==
          "the safetensors header passes the end of the file: it needs 11 bytes, the file has 10");
    CHECK(message_of_bytes(with_length(2, "{}")) == no_error);
}
TEST_CASE("attack: header length over the cap, 2^63, and lengths that overflow when 8 is added") {
    for (const uint64_t length :
         {uint64_t{100'000'001}, uint64_t{1} << 32, (uint64_t{1} << 63) - 8, (uint64_t{1} << 63) - 1,
          uint64_t{1} << 63, UINT64_MAX - 8, UINT64_MAX - 7, UINT64_MAX - 1, UINT64_MAX})
        CHECK(message_of_bytes(with_length(length, "{}")) ==
              str("the safetensors header is too long: expected at most 100000000 bytes, found ", length));
    // At the cap the file is only too short.
    CHECK(message_of_bytes(with_length(100'000'000, "{}")) ==
          "the safetensors header passes the end of the file: it needs 100000008 bytes, the file has 10");
}
TEST_CASE("attack: header length that ends within the header") {
    const std::string header = tensor("U8", "[1]", "[0,1]");
    for (size_t n = 1; n < header.size(); ++n)
        CHECK(message_of_bytes(with_length(n, header + "x")).starts_with("not valid JSON at byte "));
}

// ---- the header's text --------------------------------------------------------------------------

TEST_CASE("attack: leading spaces, byte order mark, other first characters") {
    const std::pair<const char*, const char*> cases[] = {
        {" {}", " "}, {"\n{}", "\\x0a"}, {"\xEF\xBB\xBF{}", "\\xef"},
        {"[]", "["},  {"null", "n"},     {"\"{}\"", "\""}};
    for (const auto& [header, found] : cases)
        CHECK(message_of(header) ==
              str("expected the safetensors header to begin with '{', found '", found, "'"));
}
TEST_CASE("attack: trailing white space that is no space") {
    CHECK(message_of("{}" + std::string(1000, ' ')) == no_error);
    for (const char* tail : {"\n", " \t", "  \r", "\n "}) {
        const char last = std::string_view(tail).find_last_not_of(' ') == 0
                              ? tail[0]
                              : tail[std::string_view(tail).size() - 1];
        CHECK(message_of(std::string("{}") + tail) ==
              str("expected the safetensors header to end with '}' and spaces, found '",
                  printable(std::string_view(&last, 1)), "'"));
    }
}
TEST_CASE("attack: trailing bytes after the header's object") {
    for (const std::string& tail : {"x"s, "{}"s, ","s, "\0"s, "  \0"s, "}"s, "// c"s})
        CHECK(contains(message_of("{}" + tail), "not valid JSON at byte "));
}
TEST_CASE("attack: header that is not UTF-8, in a name, a value, the metadata") {
    for (const char* bytes : {"\xFF", "\xC0\x80", "\xED\xA0\x80", "\xF5\x80\x80\x80", "\xE2\x82"}) {
        CHECK(contains(message_of(str("{\"", bytes, "\":", entry("U8", "[0]", "[0,0]"), "}")),
                       "not valid JSON"));
        CHECK(contains(message_of(tensor(bytes, "[0]", "[0,0]")), "not valid JSON"));
        CHECK(contains(message_of(str("{\"__metadata__\":{\"k\":\"", bytes, "\"}}")), "not valid JSON"));
    }
    CHECK(contains(message_of("{\"\\ud800\":" + entry("U8", "[0]", "[0,0]") + "}"), "not valid JSON"));
}
TEST_CASE("attack: duplicate keys of tensors, of an entry, of the metadata, and spelled by escapes") {
    const std::string one = entry("U8", "[0]", "[0,0]");
    CHECK(message_of("{\"a\":" + one + ",\"a\":" + one + "}") == "key \"a\" occurs twice in one object");
    CHECK(message_of("{\"a\":" + one + ",\"\\u0061\":" + one + "}") ==
          "key \"a\" occurs twice in one object");
    CHECK(message_of("{\"__metadata__\":{},\"__metadata__\":{}}") ==
          "key \"__metadata__\" occurs twice in one object");
    CHECK(message_of("{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}") ==
          "key \"k\" occurs twice in one object");
    CHECK(message_of("{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"shape\":[0],\"data_offsets\":[0,0]}}") ==
          "key \"shape\" occurs twice in one object");
}
TEST_CASE("attack: nesting to 10^6 in a name's place") {
    for (const char* open : {"[", "{\"a\":"}) {
        std::string header = "{\"a\":";
        for (int i = 0; i < 1'000'000; ++i) header += open;
        CHECK(message_of(header) == "expected at most 64 levels of nesting, found more");
    }
}
TEST_CASE("attack: more values than memory should hold") {
    std::string header = "{\"a\":[0";
    for (int i = 0; i < 9'000'000; ++i) header += ",0";
    CHECK(message_of(header + "]}") == "expected at most 8388608 JSON values, found more");
}

// ---- an entry -----------------------------------------------------------------------------------

TEST_CASE("attack: entry that is no object") {
    for (const char* value : {"null", "1", "\"x\"", "[]", "true"})
        CHECK(
            message_of(str("{\"a\":", value, "}"))
                .starts_with("tensor \"a\": expected an object with dtype, shape and data_offsets, found "));
}
TEST_CASE("attack: entry with a key missing, null or unknown") {
    const std::pair<const char*, const char*> cases[] = {
        {"\"shape\":[0],\"data_offsets\":[0,0]", "expected the key \"dtype\", found none"},
        {"\"dtype\":\"U8\",\"data_offsets\":[0,0]", "expected the key \"shape\", found none"},
        {"\"dtype\":\"U8\",\"shape\":[0]", "expected the key \"data_offsets\", found none"},
        {"\"dtype\":null,\"shape\":[0],\"data_offsets\":[0,0]", "expected a string, found null"},
        {"\"dtype\":\"U8\",\"shape\":null,\"data_offsets\":[0,0]", "expected an array, found null"},
        {"\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":null", "expected an array, found null"},
        {"\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"Dtype\":1", "unknown key \"Dtype\""}};
    for (const auto& [fields, expected] : cases)
        CHECK(contains(message_of(str("{\"a\":{", fields, "}}")), expected));
}
TEST_CASE("attack: unknown dtype, another case, another type, a long one") {
    for (const char* dtype : {"F31", "f32", "", "F32 ", "float32", "F64 ", "I128"})
        CHECK(message_of(tensor(dtype, "[0]", "[0,0]")) ==
              str("tensor \"a\": unknown dtype \"", dtype, "\""));
    CHECK(message_of(tensor(std::string(100'000, 'F'), "[0]", "[0,0]")) ==
          "tensor \"a\": unknown dtype \"" + std::string(40, 'F') + "...\"");
}
TEST_CASE("attack: shape with a negative, fractional, huge or foreign extent") {
    for (const char* extent : {"-1", "-9223372036854775808", "1.0", "0.5", "1e0", "9223372036854775808",
                               "18446744073709551616", "\"1\"", "null", "true", "[]", "{}"})
        CHECK(contains(message_of(tensor("U8", str("[1,", extent, "]"), "[0,1]"), 1),
                       "key \"a.shape[1]\": expected an integer"));
    for (const char* shape : {"1", "{}", "\"[1]\"", "null"})
        CHECK(contains(message_of(tensor("U8", shape, "[0,1]"), 1), "key \"a.shape\": expected an array"));
}
TEST_CASE("attack: shape products that overflow, in values and in bits, and beside a zero") {
    const std::pair<const char*, const char*> cases[] = {{"U8", "[4294967296,4294967296]"},
                                                         {"U8", "[9223372036854775807,3]"},
                                                         {"F32", "[2305843009213693952]"},  // 2^61 values
                                                         {"F64", "[576460752303423488]"},   // 2^59 values
                                                         {"U8", "[4294967296,4294967296,0]"},
                                                         // 2^64 + 1 bits, which would pass for 1
                                                         {"U8", "[6700417,641,4294967296,4294967295]"}};
    for (const auto& [dtype, shape] : cases) {
        const std::string message = message_of(tensor(dtype, shape, "[0,0]"));
        CHECK_MESSAGE(contains(message, "tensor \"a\": the size of shape ["), message);
        CHECK_MESSAGE(message.ends_with(" overflows"), message);
    }
    // A zero that comes first keeps the product at zero: nothing overflows.
    CHECK(message_of(tensor("U8", "[0,4294967296,4294967296]", "[0,0]")) == no_error);
}
TEST_CASE("attack: too many dimensions") {
    const auto ones = [](int n) {
        std::string shape = "[1";
        for (int i = 1; i < n; ++i) shape += ",1";
        return shape + "]";
    };
    CHECK(message_of(tensor("U8", ones(64), "[0,1]"), 1) == no_error);
    CHECK(message_of(tensor("U8", ones(65), "[0,1]"), 1) ==
          "tensor \"a\": expected at most 64 dimensions, found 65");
    CHECK(message_of(tensor("U8", ones(1'000'000), "[0,1]"), 1) ==
          "tensor \"a\": expected at most 64 dimensions, found 1000000");
}
TEST_CASE("attack: size that shape and dtype do not give") {
    CHECK(message_of(tensor("F32", "[2]", "[0,7]"), 7) ==
          "tensor \"a\": shape [2] with dtype F32 needs 8 bytes, data_offsets give 7");
    CHECK(message_of(tensor("F32", "[2]", "[0,9]"), 9) ==
          "tensor \"a\": shape [2] with dtype F32 needs 8 bytes, data_offsets give 9");
    CHECK(message_of(tensor("U8", "[]", "[0,0]")) ==
          "tensor \"a\": shape [] with dtype U8 needs 1 bytes, data_offsets give 0");
    CHECK(message_of(tensor("U8", "[0]", "[0,1]"), 1) ==
          "tensor \"a\": shape [0] with dtype U8 needs 0 bytes, data_offsets give 1");
}
TEST_CASE("attack: values smaller than a byte that do not fill whole bytes") {
    CHECK(message_of(tensor("F4", "[2]", "[0,1]"), 1) == no_error);
    CHECK(message_of(tensor("F6_E2M3", "[4]", "[0,3]"), 3) == no_error);
    CHECK(message_of(tensor("F4", "[3]", "[0,2]"), 2) ==
          "tensor \"a\": shape [3] with dtype F4 does not fill whole bytes");
    CHECK(message_of(tensor("F6_E3M2", "[3]", "[0,2]"), 2) ==
          "tensor \"a\": shape [3] with dtype F6_E3M2 does not fill whole bytes");
    // A scalar of half a byte.
    CHECK(message_of(tensor("F4", "[]", "[0,1]"), 1) ==
          "tensor \"a\": shape [] with dtype F4 does not fill whole bytes");
}

// ---- offsets ------------------------------------------------------------------------------------

TEST_CASE("attack: offsets that are no pair of non-negative integers") {
    for (const char* offsets : {"[]", "[0]", "[0,1,1]"})
        CHECK(message_of(tensor("U8", "[1]", offsets), 1)
                  .starts_with("tensor \"a\": expected 2 data_offsets, found "));
    for (const char* offsets : {"[-1,0]", "[0,-1]", "[0,1.0]", "[0,1e0]", "[\"0\",1]", "[null,1]",
                                "[0,9223372036854775808]", "[18446744073709551615,0]"})
        CHECK(contains(message_of(tensor("U8", "[1]", offsets), 1), "key \"a.data_offsets["));
    for (const char* offsets : {"{}", "0", "\"0,1\"", "true"})
        CHECK(contains(message_of(tensor("U8", "[1]", offsets), 1),
                       "key \"a.data_offsets\": expected an array"));
}
TEST_CASE("attack: offsets reversed") {
    CHECK(message_of(tensor("U8", "[1]", "[1,0]"), 1) ==
          "tensor \"a\": data_offsets [1, 0] end before they begin");
}
TEST_CASE("attack: offsets out of range, by one and by all there is") {
    CHECK(message_of(tensor("U8", "[2]", "[0,2]"), 1) ==
          "tensor \"a\": data_offsets [0, 2] pass the end of the data, which has 1 bytes");
    CHECK(message_of(tensor("U8", "[1]", "[9223372036854775806,9223372036854775807]"), 1) ==
          "tensor \"a\": data_offsets [9223372036854775806, 9223372036854775807] pass the end of the data, "
          "which "
          "has 1 bytes");
}
TEST_CASE("attack: overlap by one byte, the whole, one within another, an empty one within another") {
    const auto two = [](const std::string& a, const std::string& b) {
        return "{\"a\":" + a + ",\"b\":" + b + "}";
    };
    const auto overlapping = [&](const std::string& a, const std::string& b, size_t n) {
        return message_of(two(a, b), n);
    };
    CHECK(overlapping(entry("U8", "[2]", "[0,2]"), entry("U8", "[2]", "[1,3]"), 3) ==
          "tensor \"a\" and tensor \"b\": overlapping data_offsets: expected 2, found 1");
    CHECK(overlapping(entry("U8", "[2]", "[0,2]"), entry("U8", "[2]", "[0,2]"), 2) ==
          "tensor \"a\" and tensor \"b\": overlapping data_offsets: expected 2, found 0");
    CHECK(overlapping(entry("U8", "[4]", "[0,4]"), entry("U8", "[1]", "[1,2]"), 4) ==
          "tensor \"a\" and tensor \"b\": overlapping data_offsets: expected 4, found 1");
    CHECK(overlapping(entry("U8", "[4]", "[0,4]"), entry("U8", "[0]", "[1,1]"), 4) ==
          "tensor \"a\" and tensor \"b\": overlapping data_offsets: expected 4, found 1");
    // At an end it overlaps nothing.
    CHECK(overlapping(entry("U8", "[4]", "[0,4]"), entry("U8", "[0]", "[4,4]"), 4) == no_error);
    CHECK(overlapping(entry("U8", "[4]", "[0,4]"), entry("U8", "[0]", "[0,0]"), 4) == no_error);
}
TEST_CASE("attack: holes before, between and after the tensors") {
    CHECK(message_of(tensor("U8", "[1]", "[1,2]"), 2) ==
          "tensor \"a\": a hole in the data: expected data_offsets to go on at 0, found 1");
    CHECK(message_of("{\"a\":" + entry("U8", "[1]", "[0,1]") + ",\"b\":" + entry("U8", "[1]", "[2,3]") + "}",
                     3) ==
          "tensor \"a\" and tensor \"b\": a hole in the data: expected data_offsets to go on at 1, found 2");
}
TEST_CASE("attack: data cut short by one byte, one byte too many, data without a tensor") {
    const std::string header = tensor("U8", "[4]", "[0,4]");
    CHECK(message_of(header, 4) == no_error);
    CHECK(message_of(header, 3) ==
          "tensor \"a\": data_offsets [0, 4] pass the end of the data, which has 3 bytes");
    CHECK(message_of(header, 5) == str("the tensors end at byte ", 8 + header.size() + 4,
                                       " but the file has ", 8 + header.size() + 5, " bytes"));
    CHECK(message_of("{}", 1) == "the tensors end at byte 10 but the file has 11 bytes");
    CHECK(message_of("{\"__metadata__\":{}}", 1) == "the tensors end at byte 27 but the file has 28 bytes");
}

// ---- metadata and names -------------------------------------------------------------------------

TEST_CASE("attack: metadata of another type, with values of another type, or shaped like a tensor") {
    for (const char* value : {"null", "1", "\"x\"", "[]"})
        CHECK(message_of(str("{\"__metadata__\":", value, "}"))
                  .starts_with("__metadata__: expected an object of strings, found "));
    for (const char* value : {"null", "1", "true", "[]", "{}"})
        CHECK(message_of(str("{\"__metadata__\":{\"k\":", value, "}}"))
                  .starts_with("__metadata__: key \"k\": expected a string, found "));
    CHECK(message_of("{\"__metadata__\":" + entry("U8", "[1]", "[0,1]") + "}", 1)
              .starts_with("__metadata__: key \"shape\": expected a string, found "));
}
TEST_CASE("attack: zero bytes, control characters and escape sequences in names") {
    // The format forbids no character of a name. They are read, told apart, and escaped where they are shown.
    const TempDir dir;
    const std::string header = R"({"a\u0000b":)" + entry("U8", "[1]", "[0,1]") + R"(,"a":)" +
                               entry("U8", "[1]", "[1,2]") + R"(,"\u001b[31m\n":)" +
                               entry("U8", "[1]", "[2,3]") + "}";
    const SafetensorsFile file(dir.write("x", safetensors_bytes(header, "123")));
    char byte = 0;
    REQUIRE(file.find("a\0b"s) != nullptr);
    file.read(*file.find("a\0b"s), 0, &byte, 1);
    CHECK(byte == '1');
    file.read(*file.find("a"), 0, &byte, 1);
    CHECK(byte == '2');
    CHECK(file.find("\x1b[31m\n") != nullptr);
    CHECK(message_of(R"({"\u001b[31m\n\u0000":5})")
              .starts_with("tensor \"\\x1b[31m\\x0a\\x00\": expected an object"));
}
TEST_CASE("attack: names of 1 MB, and an empty one") {
    const std::string name(1 << 20, 'n');
    const TempDir dir;
    const SafetensorsFile file(
        dir.write("x", safetensors_bytes("{\"" + name + "\":" + entry("U8", "[1]", "[0,1]") +
                                             ",\"\":" + entry("U8", "[0]", "[0,0]") + "}",
                                         "1")));
    CHECK(file.find(name) != nullptr);
    CHECK(file.find("") != nullptr);
    CHECK(message_of("{\"" + name + "\":5}") == "tensor \"" + std::string(120, 'n') +
                                                    "...\": expected an object with dtype, shape and "
                                                    "data_offsets, found an integer");
}
TEST_CASE("attack: a million tensors") {
    const auto header_of = [](int n) {
        std::string header = "{";
        for (int i = 0; i < n; ++i) {
            header += (i == 0 ? "\"" : ",\"") + std::to_string(i);
            header += R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
        }
        return header + "}";
    };
    const MemoryFile memory(safetensors_bytes(header_of(1'000'000), ""));
    const SafetensorsFile file(memory.path());
    CHECK(file.tensors().size() == 1'000'000);
    CHECK(file.find("999999") != nullptr);
}
TEST_CASE("attack: header over the cap, and at the cap") {
    std::string header = "{}" + std::string(100'000'000 - 2, ' ');
    CHECK(message_of(header) == no_error);
    header.push_back(' ');
    CHECK(message_of(header) ==
          "the safetensors header is too long: expected at most 100000000 bytes, found 100000001");
}
TEST_CASE("attack: sparse file of 1 TiB") {
    const TempDir dir;
    constexpr int64_t n = int64_t{1} << 40;
    const std::string header = tensor("U8", str("[", n, "]"), str("[0,", n, "]"));
    const std::string path = dir.write("x", safetensors_bytes(header, ""));
    if (::truncate(path.c_str(), static_cast<off_t>(8 + header.size()) + n) != 0 &&
        skip("this file system has no files of 1 TiB"))
        return;
    const SafetensorsFile file(path);
    char byte = 'x';
    file.read(file.tensors()[0], static_cast<uint64_t>(n) - 1, &byte, 1);
    CHECK(byte == '\0');
    CHECK(contains(error_of([&] { file.read(file.tensors()[0], static_cast<uint64_t>(n), &byte, 1); }),
                   "cannot read 1 bytes at 1099511627776"));
    // A header as long as the file says it is, of zeros: refused by its first byte.
    dir.write("x", with_length(100'000'000, ""));
    REQUIRE(::truncate(path.c_str(), n) == 0);
    CHECK(contains(error_of([&] { SafetensorsFile again(path); }), "begin with '{', found '\\x00'"));
}

// ---- the file itself ----------------------------------------------------------------------------

TEST_CASE("attack: directory, pipe, device, link to nothing, link to itself in the file's place") {
    const TempDir dir;
    CHECK(contains(error_of([&] { SafetensorsFile file(dir.path()); }),
                   "expected a regular file, found a directory"));
    REQUIRE(::mkfifo(dir.file("fifo").c_str(), 0600) == 0);
    CHECK(contains(error_of([&] { SafetensorsFile file(dir.file("fifo")); }), "found a pipe"));
    CHECK(contains(error_of([&] { SafetensorsFile file("/dev/zero"); }), "found a device"));
    std::filesystem::create_symlink("gone", dir.file("dangling"));
    CHECK(contains(error_of([&] { SafetensorsFile file(dir.file("dangling")); }), "No such file"));
    std::filesystem::create_symlink("loop", dir.file("loop"));
    CHECK(contains(error_of([&] { SafetensorsFile file(dir.file("loop")); }),
                   "Too many levels of symbolic links"));
    CHECK(contains(error_of([&] { WeightFiles::open(dir.file("loop")); }),
                   "Too many levels of symbolic links"));
}
TEST_CASE("attack: file cut, grown, or rewritten after it was opened") {
    const TempDir dir;
    const std::string bytes = safetensors_bytes(tensor("U8", "[100]", "[0,100]"), std::string(100, 'x'));
    const std::string path = dir.write("x", bytes);
    char place[100];
    {
        const SafetensorsFile file(path);
        REQUIRE(::truncate(path.c_str(), static_cast<off_t>(bytes.size() - 1)) == 0);
        CHECK(contains(error_of([&] { file.read(file.tensors()[0], 0, place, 100); }),
                       "the file was cut while in use"));
        // A part that is still there is not trusted either.
        CHECK(contains(error_of([&] { file.read(file.tensors()[0], 0, place, 1); }),
                       "the file changed while in use"));
    }
    dir.write("x", bytes);
    {
        const SafetensorsFile file(path);
        REQUIRE(::truncate(path.c_str(), static_cast<off_t>(bytes.size() + 1)) == 0);
        CHECK(contains(error_of([&] { file.read(file.tensors()[0], 0, place, 100); }),
                       "the file changed while in use"));
    }
    dir.write("x", bytes);
    std::filesystem::last_write_time(path, std::filesystem::last_write_time(path) - std::chrono::hours(1));
    {
        const SafetensorsFile file(path);
        dir.write("x", bytes);  // the same bytes again: still another file than the one that was checked
        CHECK(contains(error_of([&] { file.read(file.tensors()[0], 0, place, 100); }),
                       "the file was written to while in use"));
    }
}
TEST_CASE("attack: file removed or replaced after it was opened is read as it was") {
    const TempDir dir;
    const std::string bytes = safetensors_bytes(tensor("U8", "[4]", "[0,4]"), "good");
    const std::string path = dir.write("x", bytes);
    const SafetensorsFile file(path);
    dir.write("y", safetensors_bytes(tensor("U8", "[4]", "[0,4]"), "evil"));
    std::filesystem::rename(dir.file("y"), path);
    char place[4];
    file.read(file.tensors()[0], 0, place, 4);
    CHECK(std::string(place, 4) == "good");
    std::filesystem::remove(path);
    REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
    file.read(file.tensors()[0], 0, place, 4);
    CHECK(std::string(place, 4) == "good");
}
