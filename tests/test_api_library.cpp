// librefrag as it is built and installed: what the shared library exports, needs and runs when it is loaded,
// and programs in C99, C++20 and CMake that are built against it. The program is tests/api_example.c.
#include <doctest/doctest.h>

#include <elf.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>
#include <sstream>

#include "cli_test.h"
#include "refrag.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const std::string kNano = "weights_tools/refrag-nano";
constexpr const char* kAnswer = "734 km";

std::string build_dir() {
    return std::filesystem::path(binary()).parent_path().string();
}
// The shared library beside the binary, or "" and a word why not.
std::string shared_library() {
    const std::string path = build_dir() + "/librefrag.so";
    if (std::filesystem::exists(path)) return path;
    skip("no librefrag.so beside the binary (make shared)");
    return "";
}
bool is_sanitized() {
    return build_dir().find("san-") != std::string::npos;
}
bool has(const char* program) {
    const TempDir dir;
    return shell_run(dir, std::string("command -v ") + program).code == 0;
}
// What a command prints, which must go well.
std::string output_of(const TempDir& dir, const std::string& command) {
    const Ran ran = shell_run(dir, command);
    CAPTURE(command);
    CAPTURE(ran.out);
    CAPTURE(ran.err);
    REQUIRE(ran.code == 0);
    return ran.out;
}
// An ELF64 file's sections and symbols, as far as these tests read them.
class ElfFile {
  public:
    explicit ElfFile(const std::string& path) : bytes_(read_file(path, size_t{1} << 30)) {
        const auto head = at<Elf64_Ehdr>(0);
        REQUIRE(std::memcmp(head.e_ident, ELFMAG, SELFMAG) == 0);
        for (size_t i = 0; i < head.e_shnum; ++i)
            sections_.push_back(at<Elf64_Shdr>(head.e_shoff + i * sizeof(Elf64_Shdr)));
        names_ = sections_[head.e_shstrndx].sh_offset;
    }
    // Names of the functions that run when the file is loaded.
    std::vector<std::string> initializers() const {
        std::vector<std::string> out;
        for (const Elf64_Shdr& init : sections_) {
            if (init.sh_type != SHT_INIT_ARRAY) continue;
            // Each entry is an address that a relocation puts there.
            for (const Elf64_Shdr& section : sections_) {
                if (section.sh_type != SHT_RELA) continue;
                for (size_t i = 0; i < section.sh_size / sizeof(Elf64_Rela); ++i) {
                    const auto rela = at<Elf64_Rela>(section.sh_offset + i * sizeof(Elf64_Rela));
                    if (rela.r_offset >= init.sh_addr && rela.r_offset < init.sh_addr + init.sh_size)
                        out.push_back(function_at(static_cast<uint64_t>(rela.r_addend)));
                }
            }
            CHECK(out.size() == init.sh_size / sizeof(uint64_t));
        }
        return out;
    }

  private:
    template <typename T>
    T at(size_t offset) const {
        REQUIRE(offset + sizeof(T) <= bytes_.size());
        T out;
        std::memcpy(&out, bytes_.data() + offset, sizeof out);
        return out;
    }
    std::string function_at(uint64_t address) const {
        for (const Elf64_Shdr& table : sections_) {
            if (table.sh_type != SHT_SYMTAB) continue;
            for (size_t i = 0; i < table.sh_size / sizeof(Elf64_Sym); ++i) {
                const auto symbol = at<Elf64_Sym>(table.sh_offset + i * sizeof(Elf64_Sym));
                if (symbol.st_value == address && ELF64_ST_TYPE(symbol.st_info) == STT_FUNC)
                    return bytes_.data() + sections_[table.sh_link].sh_offset + symbol.st_name;
            }
        }
        return "unknown";
    }
    std::string bytes_;
    std::vector<Elf64_Shdr> sections_;
    size_t names_ = 0;
};

// The libraries that a file needs, of `readelf -d`; without what follows ".so".
std::set<std::string> names_needed(const std::string& dynamic) {
    std::set<std::string> out;
    for (size_t at = dynamic.find("(NEEDED)"); at != std::string::npos;
         at = dynamic.find("(NEEDED)", at + 1)) {
        const size_t begin = dynamic.find('[', at) + 1;
        const std::string name = dynamic.substr(begin, dynamic.find(']', begin) - begin);
        out.insert(name.substr(0, name.find(".so")));
    }
    return out;
}

// The Makefile in this build's configuration. What is built is not built again.
std::string make_command(const std::string& prefix, const std::string& target) {
    const std::string build = build_dir();
    const std::string library = build + "/librefrag.so." + refrag_version();
#ifdef REFRAG_WITH_CUDA
    const std::string cuda;
#else
    const std::string cuda = " CUDA=0";
#endif
    return "env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL make -s BUILD='" + build + "' PREFIX='" + prefix + "'" +
           cuda + " -o '" + build + "/refrag' -o '" + library + "' " + target;
}

void check_program(const TempDir& dir, const std::string& command) {
    CAPTURE(command);
    const Ran ran = shell_run(dir, command + " " + kNano);
    CHECK(ran.err == "");
    CHECK(ran.code == 0);
    CHECK(ran.out == kAnswer);
    const Ran wrong = shell_run(dir, command + " nowhere");
    CHECK(wrong.code == REFRAG_BAD_INPUT);
    CHECK(contains(wrong.err, "bad input: nowhere: expected a model directory"));
    CHECK(line_count(wrong.err) == 1);
}

// Of a line of `nm`: the last word, without a version.
std::set<std::string> symbols(const std::string& listed) {
    std::istringstream in(listed);
    std::set<std::string> out;
    for (std::string line; std::getline(in, line);) {
        const std::string name = line.substr(line.find_last_of(' ') + 1);
        out.insert(name.substr(0, name.find('@')));
    }
    return out;
}

}  // namespace

TEST_CASE("api library: the shared library exports the header's functions and nothing else") {
    const std::string library = shared_library();
    if (library.empty()) return;
    const TempDir dir;
    const std::set<std::string> exported = symbols(output_of(dir, "nm -D --defined-only " + library));
    std::set<std::string> declared;
    const std::string header = read_file("src/refrag.h", 1 << 20);
    for (size_t at = header.find("\nREFRAG_API "); at != std::string::npos;
         at = header.find("\nREFRAG_API ", at + 1)) {
        const size_t end = header.find('(', at);
        const size_t begin = header.find_last_of(" *", end) + 1;
        declared.insert(header.substr(begin, end - begin));
    }
    CHECK(declared.size() > 30);
    for (const std::string& name : exported) {
        CAPTURE(name);
        CHECK(declared.contains(name));
    }
    for (const std::string& name : declared) {
        CAPTURE(name);
        CHECK(exported.contains(name));
    }
}

TEST_CASE("api library: it needs no HTTP, SQL or terminal, and calls nothing that a host would notice") {
    const std::string library = shared_library();
    if (library.empty()) return;
    if (is_sanitized() && skip("a sanitizer's library has its own needs")) return;
    const TempDir dir;
    const std::string dynamic = output_of(dir, "readelf -dW " + library);
    const std::set<std::string> needed = names_needed(dynamic);
    CHECK(!needed.empty());
    for (const std::string& name : needed) {
        CAPTURE(name);
        const std::set<std::string> known = {"libutf8proc", "libstdc++",  "libm",
                                             "libgcc_s",    "libc",       "libdl",
                                             "librt",       "libpthread", "ld-linux-x86-64"};
        CHECK(known.contains(name));
    }
    CHECK(contains(dynamic, str("Library soname: [librefrag.so.", REFRAG_ABI_VERSION, "]")));
    // A version of the interface is a soname: links lead from it to the file.
    CHECK(std::filesystem::canonical(library).filename() == std::string("librefrag.so.") + refrag_version());
    CHECK(std::filesystem::exists(str(library, ".", REFRAG_ABI_VERSION)));

    if (!needed.contains("libstdc++") && skip("libstdc++ is linked in (STATIC=1), and calls what it likes"))
        return;
    // Ends no process, installs no handler, writes to no stream, changes nothing that is the process's.
    const std::set<std::string> called = symbols(output_of(dir, "nm -D --undefined-only " + library));
    CHECK(called.contains("pread"));
#ifndef REFRAG_WITH_CUDA  // NVIDIA's runtime comes along there
    for (const std::string name : {"exit",      "_exit",       "quick_exit",      "abort",
                                   "kill",      "raise",       "atexit",          "signal",
                                   "sigaction", "sigprocmask", "pthread_sigmask", "setlocale",
                                   "setenv",    "putenv",      "unsetenv",        "chdir",
                                   "umask",     "srand",       "stdout",          "stderr",
                                   "printf",    "fprintf",     "vfprintf",        "puts",
                                   "putchar",   "fwrite",      "fputs",           "perror",
                                   "_ZSt4cout", "_ZSt4cerr",   "_ZSt4clog",       "fork",
                                   "execve",    "system",      "setrlimit"}) {
        CAPTURE(name);
        CHECK(!called.contains(name));
        CHECK(!called.contains("__" + name + "_chk"));
    }
#endif
}

TEST_CASE("api library: nothing of ours runs when it is loaded") {
    const std::string library = shared_library();
    if (library.empty()) return;
    if (is_sanitized() && skip("a sanitizer has constructors")) return;
#ifdef REFRAG_WITH_CUDA
    if (skip("NVIDIA's runtime registers kernels when it is loaded")) return;
#endif
    const TempDir dir;
    if (!names_needed(output_of(dir, "readelf -dW " + library)).contains("libstdc++") &&
        skip("libstdc++ is linked in (STATIC=1), with its constructors"))
        return;
    // The compiler's own: crtbegin's, and libgcc's look at the instruction set.
    const std::set<std::string> compilers = {"frame_dummy", "__cpu_indicator_init", "init_cpu_features"};
    const ElfFile elf(library);
    const std::vector<std::string> found = elf.initializers();
    CHECK(!found.empty());
    for (const std::string& name : found) {
        CAPTURE(name);
        CHECK(compilers.contains(name));
    }
}

TEST_CASE(
    "api library: installed, C99, C++20 and CMake programs are built with it and run; uninstalled, it is "
    "gone") {
    if (shared_library().empty()) return;
    if (is_sanitized() && skip("programs without a sanitizer cannot load a library with one")) return;
    if (!has("make") && skip("no make")) return;
    const TempDir dir;
    const std::string prefix = dir.file("usr");
    output_of(dir, make_command(prefix, "install"));
    const std::set<std::string> installed = {"bin/refrag",
                                             "include/refrag.h",
                                             "lib/librefrag.a",
                                             "lib/librefrag.so",
                                             str("lib/librefrag.so.", REFRAG_ABI_VERSION),
                                             std::string("lib/librefrag.so.") + refrag_version(),
                                             "lib/pkgconfig/refrag.pc",
                                             "lib/cmake/refrag/refragConfig.cmake",
                                             "lib/cmake/refrag/refragConfigVersion.cmake"};
    for (const std::string& file : installed) {
        CAPTURE(file);
        CHECK(std::filesystem::exists(prefix + "/" + file));
    }

    const std::string warnings = " -Wall -Wextra -Wpedantic -Werror ";
    const std::string program = dir.file("program");
    const std::string pc = "$(PKG_CONFIG_PATH='" + prefix + "/lib/pkgconfig' pkg-config --cflags --libs ";
    const std::string languages[] = {"gcc -std=c99", "g++ -std=c++20 -x c++"};
    const bool has_pkg_config = has("pkg-config");
    if (has_pkg_config) {
        for (const std::string& compiler : languages) {
            output_of(dir, compiler + warnings + "tests/api_example.c -x none -o " + program + " " + pc +
                               "refrag) -Wl,-rpath,'" + prefix + "/lib'");
            CHECK(contains(output_of(dir, "readelf -dW " + program),
                           str("[librefrag.so.", REFRAG_ABI_VERSION, "]")));
            check_program(dir, program);
        }
        CHECK(
            output_of(dir, "PKG_CONFIG_PATH='" + prefix + "/lib/pkgconfig' pkg-config --modversion refrag") ==
            std::string(refrag_version()) + "\n");
    } else {
        skip("no pkg-config: programs without it alone");
        for (const std::string& compiler : languages) {
            output_of(dir, compiler + warnings + "tests/api_example.c -x none -o " + program + " -I" +
                               prefix + "/include -L" + prefix + "/lib -lrefrag -Wl,-rpath,'" + prefix +
                               "/lib'");
            check_program(dir, program);
        }
    }

    if (!has("cmake")) {
        skip("no cmake: its package is installed, and not used");
    } else {
        std::filesystem::create_directory(dir.file("project"));
        std::filesystem::copy_file("tests/api_example.c", dir.file("project/example.c"));
        dir.write("project/CMakeLists.txt", std::string("cmake_minimum_required(VERSION 3.16)\n"
                                                        "project(example C CXX)\n"
                                                        "find_package(refrag ") +
                                                refrag_version() +
                                                " REQUIRED)\n"
                                                "add_executable(shared example.c)\n"
                                                "target_link_libraries(shared refrag::refrag)\n"
                                                "add_executable(static example.c)\n"
                                                "target_link_libraries(static refrag::refrag_static)\n");
        output_of(dir, "cmake -S '" + dir.file("project") + "' -B '" + dir.file("made") +
                           "' -DCMAKE_PREFIX_PATH='" + prefix + "'");
        output_of(dir, "cmake --build '" + dir.file("made") + "'");
        check_program(dir, dir.file("made/shared"));
        check_program(dir, dir.file("made/static"));
        CHECK(contains(output_of(dir, "readelf -dW '" + dir.file("made/shared") + "'"), "[librefrag.so."));
        CHECK(!contains(output_of(dir, "readelf -dW '" + dir.file("made/static") + "'"), "[librefrag.so."));
    }

    // Without the shared library -lrefrag is the static one.
    for (const auto& entry : std::filesystem::directory_iterator(prefix + "/lib"))
        if (entry.path().filename().string().starts_with("librefrag.so"))
            std::filesystem::remove(entry.path());
    if (has_pkg_config) {
        output_of(dir, languages[0] + warnings + "tests/api_example.c -o " + program + " " + pc +
                           "--static refrag)");
        const std::string dynamic = output_of(dir, "readelf -dW " + program);
        for (const std::string name : {"librefrag", "sqlite", "libpq", "hiredis", "libedit", "microhttpd"}) {
            CAPTURE(name);
            CHECK(!contains(dynamic, name));
        }
        check_program(dir, program);
    }

    output_of(dir, make_command(prefix, "uninstall"));
    for (const auto& entry : std::filesystem::recursive_directory_iterator(prefix)) {
        CAPTURE(entry.path().string());
        CHECK(std::filesystem::is_directory(entry.path()));
    }
    CHECK(!std::filesystem::exists(prefix + "/lib/cmake/refrag"));
}
