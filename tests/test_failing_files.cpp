// Files that fail: every system call in turn, calls that are interrupted or move a few bytes only, and files
// that are cut, grown, replaced or rewritten while a model is being loaded from them. Always one error that
// names the file or the right result, never a signal, a leaked descriptor or a half-written file.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>

#include "failing.h"
#include "golden.h"
#include "refrag/session.h"
#include "safetensors_edit.h"

using namespace refrag;
using namespace refrag_test;

namespace {

constexpr const char* passages_text =
    "{\"id\": \"a\", \"text\": \"The old mill stands on a hill above the river.\"}\n";

// A copy of the tiny model beside a passage file; what a run of everything that touches files gives.
class Place {
  public:
    Place() {
        std::filesystem::copy(tiny_refrag_path(), model(), std::filesystem::copy_options::recursive);
        dir_.write("passages.jsonl", passages_text);
    }
    std::string path() const { return dir_.path(); }
    std::string model() const { return dir_.file("model"); }
    std::string result() const { return dir_.file("result.json"); }
    // Loads, answers, writes; the answer's ids.
    std::vector<int32_t> run() const {
        std::vector<Passage> passages;
        passages = read_passages(dir_.file("passages.jsonl"));
        const Model model_(cpu().device(), model());
        Session session(model_);
        AnswerOptions options;
        options.max_new_tokens = 3;
        const std::vector<int32_t> ids = session.answer(passages, "Where?", options).ids;
        write_file_atomic(result(), "whole");
        return ids;
    }
    // Files in the top directory: the model, the passages, perhaps the result; never a temporary one.
    size_t entries() const {
        return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(path()), {}));
    }

  private:
    TempDir dir_;
};

bool is_one_line(const std::string& message) {
    return !message.empty() && message != "(no error)" && message.find('\n') == std::string::npos;
}

}  // namespace

TEST_CASE("failing files: every call of a run fails in turn with EIO") {
    const Place place;
    const std::vector<int32_t> expected = place.run();
    std::filesystem::remove(place.result());
    const size_t descriptors = open_descriptors();
    std::map<std::string, int> kinds;
    for (int64_t n = 1;; ++n) {
        SystemCall failed{};
        std::string message;
        std::vector<int32_t> ids;
        bool reached = false;
        {
            const FailingCalls calls([&](const SystemCall& call) {
                if (call.number != n) return Fate::normal();
                failed = call;
                return Fate::fails(EIO);
            });
            message = error_of([&] { ids = place.run(); });
            reached = calls.calls() >= n;
        }
        CAPTURE(n);
        CAPTURE(failed.name);
        CAPTURE(failed.path);
        CAPTURE(message);
        REQUIRE(open_descriptors() == descriptors);
        if (!reached) {
            CHECK(message == "(no error)");
            break;
        }
        ++kinds[failed.name];
        const bool written = is_file(place.result());
        REQUIRE(place.entries() == (written ? 3 : 2));
        if (written) REQUIRE(read_file(place.result(), 100) == "whole");
        std::filesystem::remove(place.result());
        if (message == "(no error)") {
            // Closing what was only read may fail, and so may opening the result's directory to force the
            // rename to the disk, which some systems do not allow.
            REQUIRE((failed.name == std::string("close") || failed.path == place.path()));
            REQUIRE(written);
            REQUIRE(ids == expected);
            continue;
        }
        REQUIRE(is_one_line(message));
        REQUIRE(contains(message, "Input/output error"));
        // The file itself, or, for the temporary one, the file that it was to become or its directory.
        const bool temporary = contains(failed.path, ".refrag-");
        REQUIRE((contains(message, failed.path) || (temporary && (contains(message, place.result()) ||
                                                                  message.starts_with(place.path() + ":")))));
        // Only the directory's fsync comes after the rename.
        REQUIRE(written == (failed.name == std::string("fsync") && failed.path == place.path()));
    }
    for (const char* name : {"open", "fstat", "pread", "stat", "write", "fsync", "close", "rename"}) {
        CAPTURE(name);
        CHECK(kinds[name] > 0);  // the hooks are in place
    }
    CHECK(place.run() == expected);
}

TEST_CASE("failing files: a full disk and other errors of writing leave the old file as it was") {
    const TempDir dir;
    const std::string path = dir.write("x", "old");
    const std::string big(100'000, 'n');
    const std::pair<const char*, int> cases[] = {
        {"write", ENOSPC}, {"write", EDQUOT}, {"write", EFBIG},    {"fsync", ENOSPC}, {"fsync", EIO},
        {"close", EIO},    {"close", ENOSPC}, {"rename", EACCES},  {"fchmod", EPERM}, {"open", EROFS},
        {"open", EMFILE},  {"stat", EACCES},  {"realpath", ENOMEM}};
    const size_t descriptors = open_descriptors();
    for (const auto& [name, error] : cases) {
        CAPTURE(name);
        CAPTURE(error);
        bool hit = false;
        const std::string message = error_of([&] {
            const FailingCalls calls([&](const SystemCall& call) {
                if (hit || call.name != std::string(name)) return Fate::normal();
                hit = true;
                return Fate::fails(error);
            });
            write_file_atomic(path, big);
        });
        CHECK(hit);
        CHECK(is_one_line(message));
        CHECK(contains(message, dir.path()));
        CHECK(contains(message, std::generic_category().message(error)));
        CHECK(read_file(path, 10) == "old");
        CHECK(std::distance(std::filesystem::directory_iterator(dir.path()), {}) == 1);
    }
    // The disk fills in the middle.
    int64_t writes = 0;
    const std::string message = error_of([&] {
        const FailingCalls calls([&](const SystemCall& call) {
            if (call.name != std::string("write")) return Fate::normal();
            return ++writes == 3 ? Fate::fails(ENOSPC) : Fate::moves(1000);
        });
        write_file_atomic(path, big);
    });
    CHECK(message == path + ": writing failed: No space left on device");
    CHECK(read_file(path, 10) == "old");
    // A write that takes nothing and says so must not be tried for ever.
    CHECK(error_of([&] {
              const FailingCalls calls([&](const SystemCall& call) {
                  return call.name == std::string("write") ? Fate::moves(0) : Fate::normal();
              });
              write_file_atomic(path, big);
          }) == path + ": writing failed: no byte was taken");
    CHECK(open_descriptors() == descriptors);
}

TEST_CASE("failing files: interrupted calls are made again") {
    const Place place;
    const std::vector<int32_t> expected = place.run();
    // Every call is interrupted twice before it is let through, but close, which must not be made again.
    std::map<std::string, int64_t> interrupted;
    int turn = 0;
    std::vector<int32_t> ids;
    {
        const FailingCalls calls([&](const SystemCall& call) {
            const std::string name = call.name;
            if (name == "rename" || name == "realpath" || name == "fchmod" || name == "fstat")
                return Fate::normal();
            if (name == "close" || ++turn % 3 != 0) {
                ++interrupted[name];
                return Fate::fails(EINTR);
            }
            return Fate::normal();
        });
        ids = place.run();
    }
    CHECK(ids == expected);
    CHECK(read_file(place.result(), 100) == "whole");
    for (const char* name : {"open", "pread", "stat", "write", "fsync", "close"}) {
        CAPTURE(name);
        CHECK(interrupted[name] > 0);
    }
}

TEST_CASE("failing files: reads and writes that move a few bytes are continued") {
    const Place place;
    const std::vector<int32_t> expected = place.run();
    for (const size_t bytes : {size_t{61}, size_t{4097}}) {
        std::vector<int32_t> ids;
        {
            const FailingCalls calls([&](const SystemCall&) { return Fate::moves(bytes); });
            ids = place.run();
        }
        CHECK(ids == expected);
        CHECK(read_file(place.result(), 100) == "whole");
        CHECK(place.entries() == 3);
    }
    const FailingCalls calls([&](const SystemCall&) { return Fate::moves(1); });
    write_file_atomic(place.result(), "byte by byte");
    CHECK(read_file(place.result(), 100) == "byte by byte");
}

TEST_CASE("failing files: a file that cannot be looked at does not pass for one that is missing") {
    const Place place;
    // Without generation_config.json the model would load, and answers would end elsewhere.
    const std::string generation = place.model() + "/decoder/generation_config.json";
    for (const int error : {EIO, EACCES, ENOMEM}) {
        const FailingCalls calls([&](const SystemCall& call) {
            return call.path == generation && call.name == std::string("stat") ? Fate::fails(error)
                                                                               : Fate::normal();
        });
        CHECK(contains(error_of([&] { load_decoder_config(place.model() + "/decoder"); }),
                       generation + ": cannot be examined: "));
    }
    const FailingCalls calls([&](const SystemCall& call) {
        return call.path == generation ? Fate::fails(ENOENT) : Fate::normal();
    });
    CHECK_FALSE(is_file(generation));
    CHECK_NOTHROW(load_decoder_config(place.model() + "/decoder"));
}

// ---- files that change while a model is loaded ---------------------------------------------------

namespace {

// Loads the model, and just before its n-th read of `file` lets `change` happen to it. The message, and
// whether there was an n-th read.
std::pair<std::string, bool> load_while(const Place& place, const std::string& file, int64_t n,
                                        const std::function<void(const std::string&)>& change) {
    const std::string path = place.model() + "/" + file;
    int64_t reads = 0;
    const FailingCalls calls([&](const SystemCall& call) {
        if (call.name == std::string("pread") && call.path == path && ++reads == n) change(path);
        return Fate::normal();
    });
    std::string message = error_of([&] { const Model model(cpu().device(), place.model()); });
    return {std::move(message), reads >= n};
}

void write_in_place(const std::string& path, int64_t at, char byte) {
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(at);
    file.put(byte);
}

// So that a change just after copying is seen as one: file times move on every few milliseconds only.
void make_old(const std::string& path) {
    std::filesystem::last_write_time(path, std::filesystem::last_write_time(path) - std::chrono::hours(1));
}

constexpr const char* weight_files[] = {"decoder/model.safetensors", "encoder/model.safetensors",
                                        "projector.safetensors", "policy.safetensors"};

}  // namespace

TEST_CASE("changing files: weights cut short while they are loaded") {
    for (const char* file : weight_files) {
        for (int64_t n = 1; n <= 5; n += 2) {
            const Place place;
            const std::string path = place.model() + "/" + file;
            const auto size = static_cast<off_t>(std::filesystem::file_size(path));
            const auto [message, reached] = load_while(place, file, n, [&](const std::string& name) {
                REQUIRE(::truncate(name.c_str(), n == 1 ? 4 : size - 1) == 0);
            });
            CAPTURE(n);
            REQUIRE(reached);
            CHECK_MESSAGE(message.starts_with(path + ": the file "), message);
            CHECK_MESSAGE(
                (contains(message, "cut while in use") || contains(message, "changed while in use")),
                message);
        }
    }
}

TEST_CASE("changing files: weights that grow or are rewritten while they are loaded") {
    for (const char* file : weight_files) {
        for (int64_t n = 1; n <= 5; n += 4) {
            const Place place;
            const std::string path = place.model() + "/" + file;
            make_old(path);
            const auto size = static_cast<int64_t>(std::filesystem::file_size(path));
            CHECK(
                load_while(place, file, n, [&](const std::string& name) { write_in_place(name, size, 'x'); })
                    .first ==
                str(path, ": the file changed while in use: expected ", size, " bytes, found ", size + 1));
            const Place other;
            const std::string other_path = other.model() + "/" + file;
            make_old(other_path);
            // Header and data no longer belong together, though the size is the same.
            CHECK(load_while(other, file, n, [&](const std::string& name) {
                      write_in_place(name, size - 1, '\x7f');
                  }).first == other_path + ": the file was written to while in use");
        }
    }
}

TEST_CASE("changing files: weights replaced by another file are read to the end as they were") {
    // Replacing by renaming leaves the open file whole: the old one is loaded, never a mixture.
    for (const char* file : weight_files) {
        const Place place;
        const std::string path = place.model() + "/" + file;
        for (const bool same_size : {true, false}) {
            const auto [message, reached] = load_while(place, file, 3, [&](const std::string& name) {
                const std::string bytes = read_file(name, 1 << 24);
                std::ofstream(name + ".new", std::ios::binary)
                    << std::string(bytes.size() + (same_size ? 0 : 1), 'x');
                std::filesystem::rename(name + ".new", name);
            });
            CHECK(reached);
            CHECK(message == "(no error)");
            // The next load sees the new one.
            CHECK(contains(error_of([&] { const Model model(cpu().device(), place.model()); }), path));
            std::filesystem::copy_file(tiny_refrag_path() + "/" + file, path,
                                       std::filesystem::copy_options::overwrite_existing);
        }
    }
}

TEST_CASE("changing files: between being found and being opened") {
    const std::function<void(const std::string&)> changes[] = {
        [](const std::string& path) { std::filesystem::remove(path); },
        [](const std::string& path) {
            std::filesystem::remove(path);
            std::filesystem::create_directory(path);
        },
        [](const std::string& path) {
            std::filesystem::remove(path);
            REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
        },
        [](const std::string& path) {
            std::filesystem::remove(path);
            std::filesystem::create_symlink(path, path);
        },
        [](const std::string& path) { std::filesystem::resize_file(path, 0); },
        [](const std::string& path) { std::filesystem::resize_file(path, 7); },
        [](const std::string& path) {
            std::filesystem::resize_file(path, std::filesystem::file_size(path) - 3);
        }};
    for (const char* file : {"decoder/model.safetensors", "policy.safetensors", "decoder/tokenizer.json",
                             "decoder/generation_config.json", "refrag.json"}) {
        for (const auto& change : changes) {
            const Place place;
            const std::string path = place.model() + "/" + file;
            bool changed = false;
            std::string message;
            {
                const FailingCalls calls([&](const SystemCall& call) {
                    if (!changed && call.name == std::string("open") && call.path == path) {
                        changed = true;
                        change(path);
                    }
                    return Fate::normal();
                });
                message = error_of([&] { const Model model(cpu().device(), place.model()); });
            }
            CHECK(changed);
            CHECK(is_one_line(message));
            CHECK_MESSAGE(contains(message, path), message);
        }
    }
}

TEST_CASE("changing files: JSON and passages cut or rewritten while they are read") {
    const Place place;
    const std::string files[] = {place.model() + "/refrag.json", place.model() + "/decoder/config.json",
                                 place.model() + "/decoder/tokenizer.json",
                                 place.model() + "/decoder/generation_config.json",
                                 place.path() + "/passages.jsonl"};
    for (const std::string& path : files) {
        const std::string bytes = read_file(path, 1 << 24);
        for (const bool cut : {true, false}) {
            std::ofstream(path, std::ios::binary) << bytes << std::flush;
            make_old(path);
            std::string message;
            {
                const FailingCalls calls([&](const SystemCall& call) {
                    if (call.name == std::string("pread") && call.path == path) {
                        if (cut)
                            std::filesystem::resize_file(path, bytes.size() / 2);
                        else
                            write_in_place(path, 0, ' ');
                    }
                    return Fate::normal();
                });
                message = error_of([&] { place.run(); });
            }
            CHECK_MESSAGE(
                message.starts_with(path + ": the file was " +
                                    (cut ? "cut while in use: expected " : "written to while in use")),
                message);
        }
        std::ofstream(path, std::ios::binary) << bytes;
    }
}
