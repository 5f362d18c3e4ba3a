// Which room may include which: read from the sources themselves. Includes go down only, the networks know no
// device, the devices know no network, and every third-party header stays in the one room that wraps it.
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "support.h"

using namespace refrag;
using namespace refrag_test;

namespace {

using Names = std::set<std::string, std::less<>>;

// What each room may include besides itself. "api" is src/refrag.h and src/api/. Only api and cli make a
// backend, so only they may see cpu and cuda.
const std::map<std::string, Names, std::less<>>& allowed_rooms() {
    static const std::map<std::string, Names, std::less<>> rooms = {
        {"base", {}},
        {"io", {"base"}},
        {"text", {"base", "io"}},
        {"ops", {"base"}},
        {"cpu", {"base", "ops"}},
        {"cuda", {"base", "ops"}},
        {"models", {"base", "io", "text", "ops"}},
        {"refrag", {"base", "io", "text", "ops", "models"}},
        {"eval", {"base", "io", "text", "ops", "models", "refrag"}},
        {"bench", {"base", "io", "text", "ops", "models", "refrag"}},
        {"store", {"base", "io", "text", "ops", "models", "refrag"}},
        {"api", {"base", "io", "text", "ops", "models", "refrag", "store", "cpu", "cuda"}},
        {"server", {"base", "io", "text", "ops", "models", "refrag", "store", "api"}},
        {"remote", {"base", "io", "text", "ops", "models", "refrag"}},
        {"cli",
         {"base", "io", "text", "ops", "models", "refrag", "eval", "bench", "store", "cpu", "cuda", "api",
          "server", "remote"}},
    };
    return rooms;
}

// Third-party headers by how they begin, and the room that wraps them.
const std::map<std::string, std::string, std::less<>>& third_party() {
    static const std::map<std::string, std::string, std::less<>> headers = {
        {"nlohmann/", "io"},  {"utf8proc.h", "text"},     {"CLI/", "cli"},       {"sqlite3.h", "store"},
        {"editline/", "cli"}, {"microhttpd.h", "server"}, {"cu", "cuda"},        {"mma.h", "cuda"},
        {"nv", "cuda"},       {"libpq-fe.h", "store"},    {"hiredis/", "store"}, {"curl/", "remote"},
    };
    return headers;
}

// The C and POSIX headers, and the compilers' own headers of vector instructions.
bool is_system_header(std::string_view name) {
    static const Names names = {"assert.h",  "errno.h",  "fcntl.h",     "float.h",    "inttypes.h",
                                "limits.h",  "locale.h", "netdb.h",     "math.h",     "poll.h",
                                "pthread.h", "sched.h",  "signal.h",    "stdarg.h",   "stdbool.h",
                                "stddef.h",  "stdint.h", "stdio.h",     "stdlib.h",   "string.h",
                                "strings.h", "time.h",   "unistd.h",    "dlfcn.h",    "dirent.h",
                                "termios.h", "cpuid.h",  "immintrin.h", "arm_neon.h", "arm_bf16.h"};
    return names.contains(name) || name.starts_with("sys/") || name.starts_with("netinet/") ||
           name.starts_with("arpa/");
}

// "src/models/llama.cpp" -> "models"; files directly in src/ are the api.
std::string room_of(std::string_view path) {
    if (path.starts_with("cuda/")) return "cuda";
    path.remove_prefix(path.find('/') + 1);
    const size_t slash = path.find('/');
    return slash == std::string_view::npos ? "api" : std::string(path.substr(0, slash));
}

// The header that a line includes, with its opening quote or bracket; "" for any other line.
std::string included(std::string_view line) {
    const auto skip_blanks = [&] {
        while (!line.empty() && std::isspace(static_cast<unsigned char>(line.front()))) line.remove_prefix(1);
    };
    skip_blanks();
    if (!line.starts_with('#')) return "";
    line.remove_prefix(1);
    skip_blanks();
    if (!line.starts_with("include")) return "";
    line.remove_prefix(7);
    skip_blanks();
    if (line.empty() || (line.front() != '"' && line.front() != '<')) return "?" + std::string(line);
    const size_t end = line.find(line.front() == '"' ? '"' : '>', 1);
    return std::string(line.substr(0, end));
}

// A room and a line that stands in one of its files.
struct Planted {
    const char* room;
    const char* line;
};

// What is wrong with one line of a file of `room`; "" where nothing is.
std::string violation(const std::string& room, std::string_view line) {
    const std::string header = included(line);
    if (header.empty()) return "";
    const auto own = allowed_rooms().find(room);
    if (own == allowed_rooms().end()) return "unknown room " + room;
    const std::string name = header.substr(1);
    if (header[0] == '"') {
        const size_t slash = name.find('/');
        std::string target = slash == std::string::npos ? "api" : name.substr(0, slash);
        if (slash == std::string::npos && room == "cuda") target = "cuda";  // beside it in the same folder
        if (target == room || own->second.contains(target)) return "";
        return room + " may not include " + target;
    }
    if (header[0] != '<') return "an include of neither <...> nor \"...\"";
    // The C++ library's headers have neither a dot nor a slash.
    if (name.find_first_of("./") == std::string::npos || is_system_header(name)) return "";
    // From the back: of names that begin alike the longer one counts.
    for (auto at = third_party().rbegin(); at != third_party().rend(); ++at) {
        const auto& [begin, home] = *at;
        if (name.starts_with(begin)) {
            return home == room ? "" : room + " may not include <" + name + ">, which belongs to " + home;
        }
    }
    return "<" + name + "> is neither a system header nor a known dependency";
}

struct SourceFile {
    std::string path;  // from the repository's root
    std::string text;
};

std::vector<SourceFile> sources() {
    namespace fs = std::filesystem;
    static const Names kinds = {".h", ".cpp", ".inl", ".cu", ".cuh"};
    std::vector<SourceFile> files;
    for (const char* top : {"src", "cuda"}) {
        if (!is_directory(repo_path(top))) continue;
        for (const fs::directory_entry& entry : fs::recursive_directory_iterator(repo_path(top))) {
            if (!entry.is_regular_file() || !kinds.contains(entry.path().extension().string())) continue;
            const fs::path inside = fs::relative(entry.path(), repo_path(top));
            files.push_back(
                {str(top, "/", inside.generic_string()), read_file(entry.path().string(), 4 << 20)});
        }
    }
    std::sort(files.begin(), files.end(), [](const auto& a, const auto& b) { return a.path < b.path; });
    return files;
}

template <typename Visit>
void each_line(const std::string& text, Visit&& visit) {
    size_t begin = 0;
    for (size_t number = 1; begin < text.size(); ++number) {
        const size_t end = std::min(text.find('\n', begin), text.size());
        visit(number, std::string_view(text).substr(begin, end - begin));
        begin = end + 1;
    }
}

}  // namespace

TEST_CASE("layering: every include of src/ and cuda/ goes down, and third parties stay in their room") {
    size_t n_includes = 0;
    Names rooms;
    for (const SourceFile& file : sources()) {
        const std::string room = room_of(file.path);
        rooms.insert(room);
        each_line(file.text, [&](size_t number, std::string_view line) {
            n_includes += included(line).empty() ? 0 : 1;
            const std::string wrong = violation(room, line);
            CHECK_MESSAGE(wrong.empty(), file.path << ":" << number << ": " << wrong);
        });
    }
    // The walk did see the tree.
    CHECK(n_includes > 100);
    for (const char* room :
         {"base", "io", "text", "ops", "cpu", "models", "refrag", "eval", "bench", "cli"}) {
        CHECK_MESSAGE(rooms.contains(room), room);
    }
}

TEST_CASE("layering: a quoted include names a file that is there, by its room") {
    for (const SourceFile& file : sources()) {
        each_line(file.text, [&](size_t number, std::string_view line) {
            const std::string header = included(line);
            if (!header.starts_with('"')) return;
            const std::string name = header.substr(1);
            const bool there = is_file(repo_path("src/" + name)) || is_file(repo_path(name)) ||
                               (file.path.starts_with("cuda/") && is_file(repo_path("cuda/" + name)));
            CHECK_MESSAGE(there, file.path << ":" << number << ": " << name);
        });
    }
}

TEST_CASE("layering: a planted violation is caught") {
    const Planted bad[] = {{"models", "#include \"cpu/cpu_backend.h\""},
                           {"models", "#include \"cuda/cuda_backend.h\""},
                           {"models", "#include <nlohmann/json.hpp>"},
                           {"models", "  #  include \"refrag/session.h\""},
                           {"cpu", "#include \"models/llama.h\""},
                           {"cpu", "#include \"cuda/gemm.h\""},
                           {"cpu", "#include \"io/json.h\""},
                           {"cpu", "#include <utf8proc.h>"},
                           {"cpu", "#include <Eigen/Dense>"},
                           {"cuda", "#include \"cpu/cpu_backend.h\""},
                           {"cuda", "#include \"models/llama.h\""},
                           {"cuda", "#include <sqlite3.h>"},
                           {"base", "#include \"io/file.h\""},
                           {"base", "#include <CLI/CLI.hpp>"},
                           {"ops", "#include \"models/kv_cache.h\""},
                           {"ops", "#include <cuda_runtime.h>"},
                           {"io", "#include \"ops/backend.h\""},
                           {"text", "#include \"models/llama.h\""},
                           {"refrag", "#include \"cpu/cpu_backend.h\""},
                           {"refrag", "#include \"cuda/cuda_backend.h\""},
                           {"refrag", "#include \"store/passages.h\""},
                           {"refrag", "#include \"refrag.h\""},
                           {"refrag", "#include \"eval/perplexity.h\""},
                           {"eval", "#include \"bench/cost.h\""},
                           {"bench", "#include \"eval/statistics.h\""},
                           {"store", "#include \"refrag.h\""},
                           {"server", "#include \"cli/run.h\""},
                           {"server", "#include \"cpu/cpu_backend.h\""},
                           {"api", "#include \"server/http.h\""},
                           {"cli", "#include <sqlite3.h>"},
                           {"cli", "#include <libpq-fe.h>"},
                           {"refrag", "#include <hiredis/hiredis.h>"},
                           {"cli", "#include HEADER"},
                           {"attic", "#include <vector>"}};
    for (const Planted& p : bad) CHECK_MESSAGE(!violation(p.room, p.line).empty(), p.room << ": " << p.line);

    const Planted good[] = {{"models", "#include \"ops/backend.h\""},
                            {"models", "#include \"io/json.h\""},
                            {"io", "#include <nlohmann/json.hpp>"},
                            {"cpu", "#include <immintrin.h>"},
                            {"cpu", "#include \"cpu/kernels.h\""},
                            {"cpu", "// #include \"models/llama.h\""},
                            {"cuda", "#include \"launch.cuh\""},
                            {"cuda", "#include <cuda_runtime.h>"},
                            {"cli", "#include \"cpu/cpu_backend.h\""},
                            {"api", "#include \"refrag.h\""},
                            {"base", "#include <vector>"},
                            {"base", "int x = 1;"}};
    for (const Planted& p : good) CHECK_MESSAGE(violation(p.room, p.line).empty(), p.room << ": " << p.line);

    CHECK(room_of("src/models/llama.cpp") == "models");
    CHECK(room_of("src/api.cpp") == "api");
    CHECK(room_of("cuda/gemm.cu") == "cuda");
}
