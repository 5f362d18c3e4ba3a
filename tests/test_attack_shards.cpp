// One case for each attack on the index of a sharded model, named after it: what the index promises and what
// the shards hold must agree in both directions, and no name leads out of the directory.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/safetensors.h"
#include "safetensors_writer.h"
#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr const char* no_error = "(no error)";

// A directory of two shards, "1" with tensor a and "2" with tensor b, and the index given.
class Shards {
  public:
    Shards() {
        write_safetensors(dir.file("1"), {{"a", "U8", {1}, "1"}});
        write_safetensors(dir.file("2"), {{"b", "U8", {1}, "2"}});
    }
    // What opening says after the index's path.
    std::string message(const std::string& index) const {
        const std::string path = dir.write("model.safetensors.index.json", index);
        std::string text = error_of([&] { WeightFiles::open(dir.path()); });
        return text.starts_with(path + ": ") ? text.substr(path.size() + 2) : text;
    }
    std::string map(const std::string& text) const { return message("{\"weight_map\":" + text + "}"); }

    const TempDir dir;
};

}  // namespace

TEST_CASE("attack: index that is no object, has no map, a map of another type, or an empty one") {
    const Shards shards;
    CHECK(shards.map(R"({"a":"1","b":"2"})") == no_error);
    CHECK(shards.message("[]").starts_with("expected an object, found an array"));
    CHECK(shards.message("{}") == "expected the key \"weight_map\", found none");
    for (const char* map : {"null", "[]", "\"1\"", "1"})
        CHECK(shards.map(map).starts_with("key \"weight_map\": expected an object, found "));
    CHECK(shards.map("{}") == "weight_map names no tensor");
    for (const char* shard : {"null", "1", "[\"1\"]", "{}"})
        CHECK(shards.map(str("{\"a\":", shard, "}"))
                  .starts_with("key \"weight_map.a\": expected a string, found "));
    CHECK(shards.map(R"({"a":"1","a":"2"})") == "key \"a\" occurs twice in one object");
}
TEST_CASE("attack: shard name that leaves the directory") {
    const Shards shards;
    for (const char* name :
         {"../1", "/etc/passwd", "sub/1", "./1", "1/", "..", ".", "", "a\\\\b", "1\\u0000x"})
        CHECK(shards.map(str("{\"a\":\"", name, "\"}"))
                  .starts_with(
                      "key \"weight_map.a\": expected a plain file name within the directory, found \""));
}
TEST_CASE("attack: shard that is a link") {
    // Followed, out of the directory too: that is how the usual download cache lays a model out. Whoever can
    // place links there can place files; what a *name in the index* may say is another matter (above).
    const Shards shards;
    const TempDir other;
    std::filesystem::rename(shards.dir.file("2"), other.file("blob"));
    std::filesystem::create_symlink(other.file("blob"), shards.dir.file("2"));
    CHECK(shards.map(R"({"a":"1","b":"2"})") == no_error);
    // But only to a regular file.
    std::filesystem::remove(shards.dir.file("2"));
    std::filesystem::create_symlink("/dev/zero", shards.dir.file("2"));
    CHECK(shards.map(R"({"a":"1","b":"2"})") ==
          shards.dir.file("2") + ": expected a regular file, found a device");
}
TEST_CASE("attack: shard missing, a directory, a pipe, not a safetensors file") {
    const Shards shards;
    CHECK(shards.map(R"({"a":"1","b":"3"})") ==
          shards.dir.file("3") + ": cannot be opened: No such file or directory");
    std::filesystem::create_directory(shards.dir.file("4"));
    CHECK(contains(shards.map(R"({"a":"1","b":"4"})"), "found a directory"));
    REQUIRE(::mkfifo(shards.dir.file("5").c_str(), 0600) == 0);
    CHECK(contains(shards.map(R"({"a":"1","b":"5"})"), "found a pipe"));
    shards.dir.write("6", "PK\x03\x04 not at all");
    CHECK(contains(shards.map(R"({"a":"1","b":"6"})"), "the safetensors header is too long"));
}
TEST_CASE("attack: index that names itself or the whole model as a shard") {
    const Shards shards;
    CHECK(shards.map(R"({"a":"model.safetensors.index.json"})")
              .starts_with("the safetensors header is too long"));
    std::filesystem::create_symlink("model.safetensors.index.json", shards.dir.file("7"));
    CHECK(contains(shards.map(R"({"a":"7"})"), "7: the safetensors header is too long"));
    std::filesystem::remove(shards.dir.file("1"));
    std::filesystem::create_symlink("1", shards.dir.file("1"));
    CHECK(contains(shards.map(R"({"a":"1"})"), "1: cannot be opened: Too many levels of symbolic links"));
}
TEST_CASE("attack: tensor in two shards, in another shard than the index says, in no map, in no shard") {
    const Shards shards;
    CHECK(shards.map(R"({"a":"2","b":"1"})") ==
          "weight_map puts tensor \"a\" into 2, which does not hold it");
    CHECK(shards.map(R"({"a":"1","b":"2","c":"2"})") ==
          "weight_map puts tensor \"c\" into 2, which does not hold it");
    write_safetensors(shards.dir.file("2"), {{"b", "U8", {1}, "2"}, {"c", "U8", {1}, "3"}});
    CHECK(shards.map(R"({"a":"1","b":"2"})") == no_error);
    CHECK(WeightFiles::open(shards.dir.path()).find("c") == nullptr);  // a stray
    write_safetensors(shards.dir.file("2"), {{"a", "U8", {1}, "2"}, {"b", "U8", {1}, "3"}});
    // The index decides which of two counts.
    CHECK(shards.map(R"({"a":"1","b":"2"})") == no_error);
    const auto value = [&] {
        const WeightFiles files = WeightFiles::open(shards.dir.path());
        char byte = 0;
        files.read(files.get("a"), &byte, 1);
        return byte;
    };
    CHECK(value() == '1');
    CHECK(shards.map(R"({"a":"2","b":"2"})") == no_error);
    CHECK(value() == '2');
    // One file under two names is two shards.
    std::filesystem::create_hard_link(shards.dir.file("1"), shards.dir.file("8"));
    CHECK(shards.map(R"({"a":"1","x":"8"})") ==
          "weight_map puts tensor \"x\" into 8, which does not hold it");
    CHECK(shards.map(R"({"a":"8"})") == no_error);
}
TEST_CASE("attack: more shards than files can be open") {
    const Shards shards;
    std::string map = "{\"a\":\"1\"";
    for (int i = 0; i < 100'000; ++i) map += str(",\"t", i, "\":\"s", i, "\"");
    CHECK(shards.map(map + "}") == shards.dir.file("s0") + ": cannot be opened: No such file or directory");
}
TEST_CASE("attack: index over the cap") {
    const Shards shards;
    shards.dir.write("model.safetensors.index.json", "{");
    const std::string path = shards.dir.file("model.safetensors.index.json");
    REQUIRE(::truncate(path.c_str(), 100'000'001) == 0);
    CHECK(error_of([&] { WeightFiles::open(shards.dir.path()); }) ==
          path + ": expected at most 100000000 bytes, found 100000001");
}
