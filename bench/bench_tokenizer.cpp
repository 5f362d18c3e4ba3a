// Speed of tokenizers on one thread: megabytes (10^6 bytes) of prose a second, both ways, and how time grows
// with the length of texts that are hard on purpose (one character over and over). Markdown tables on stdout.
//
// Encoding is the whole of it, byte spans included. Time is the thread's CPU time, the best of several
// repetitions, so other work on the machine disturbs little; the lengths of a hard text take turns, so that a
// slow spell of the machine meets all of them. A ratio well above 2 at a doubling of the length would mean
// that the time is not linear.
//
//   bench_tokenizer PROSE MAX_MEGABYTES TOKENIZER...
//     PROSE          a text file; its first megabyte is used
//     MAX_MEGABYTES  how long the hard texts get: 16 takes a minute or two for each tokenizer
//     TOKENIZER      tokenizer.json, or a directory that holds one
#include <malloc.h>
#include <time.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/check.h"
#include "io/file.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

using namespace refrag;

constexpr size_t megabyte = 1'000'000;

double cpu_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

template <typename Work>
double best_seconds(int repetitions, Work&& work) {
    double best = 1e30;
    for (int i = 0; i < repetitions; ++i) {
        const double start = cpu_seconds();
        work();
        best = std::min(best, cpu_seconds() - start);
    }
    return best;
}

// The first n bytes of a text, less a character that is cut.
std::string head(std::string text, size_t n) {
    if (text.size() > n) text.resize(n);
    while (!text.empty() && !is_valid_utf8(text.substr(text.size() - std::min<size_t>(text.size(), 8))))
        text.pop_back();
    return text;
}

void bench_prose(const std::string& prose, const std::vector<std::string>& paths) {
    std::printf("| tokenizer | load ms | tokens | bytes/token | encode MB/s | decode MB/s |\n");
    std::printf("|---|---|---|---|---|---|\n");
    for (const std::string& path : paths) {
        const double load = best_seconds(3, [&] { Tokenizer::from_file(path); });
        const Tokenizer tokenizer = Tokenizer::from_file(path);
        std::vector<int32_t> ids = tokenizer.encode_ids(prose);
        std::vector<Token> tokens;
        const double encode = best_seconds(9, [&] { tokens = tokenizer.encode(prose); });
        std::string text;
        const double decode = best_seconds(9, [&] { text = tokenizer.decode(ids, false); });
        const double mb = static_cast<double>(prose.size()) / megabyte;
        std::printf("| %s | %.0f | %zu | %.2f | %.1f | %.1f |\n", path.c_str(), load * 1e3, ids.size(),
                    static_cast<double>(prose.size()) / static_cast<double>(ids.size()), mb / encode,
                    static_cast<double>(text.size()) / megabyte / decode);
        std::fflush(stdout);
    }
}

struct Unit {
    const char* name;
    const char* text;
};
constexpr Unit units[] = {{"A", "A"},
                          {"^", "^"},
                          {"space", " "},
                          {"newline", "\n"},
                          {"space newline", " \n"},
                          {"digit", "7"},
                          {"CJK", "\xE4\xB8\xAD"},
                          {"mark", "\xCC\x81"},
                          {"two marks", "\xCC\x81\xCC\xA3"},
                          {"emoji", "\xF0\x9F\x98\x80"},
                          {"bad byte", "\xFF"},
                          {"a^ ", "a^ "}};

// time(2n) / time(n) from the first length to the last.
struct Growth {
    double first_seconds;
    double last_seconds;
    double mean;  // geometric
    double largest;
};

Growth growth_of(const Tokenizer& tokenizer, const char* unit, size_t max_megabytes) {
    std::vector<std::string> texts;
    for (size_t mb = 1; mb <= max_megabytes; mb *= 2) {
        std::string& text = texts.emplace_back();
        while (text.size() < mb * megabyte) text += unit;
    }
    std::vector<double> best(texts.size(), 1e30);
    for (int round = 0; round < 7; ++round)
        for (size_t i = 0; i < texts.size(); ++i)
            best[i] = std::min(best[i], best_seconds(1, [&] { tokenizer.encode(texts[i]); }));
    Growth growth{best.front(), best.back(), 0, 0};
    for (size_t i = 1; i < best.size(); ++i) growth.largest = std::max(growth.largest, best[i] / best[i - 1]);
    if (best.size() > 1)
        growth.mean = std::pow(best.back() / best.front(), 1 / static_cast<double>(best.size() - 1));
    return growth;
}

void bench_growth(size_t max_megabytes, const std::vector<std::string>& paths) {
    std::printf(
        "\nTime of 1 and of %zu MB (10^6 bytes) in ms; in brackets time(2n) / time(n) from 1 MB up to ",
        max_megabytes);
    std::printf("there: geometric mean, largest\n\n");
    std::printf("| tokenizer |");
    for (const Unit& unit : units) std::printf(" %s |", unit.name);
    std::printf("\n|---|");
    for (size_t i = 0; i < std::size(units); ++i) std::printf("---|");
    std::printf("\n");
    Growth worst{};
    for (const std::string& path : paths) {
        const Tokenizer tokenizer = Tokenizer::from_file(path);
        std::printf("| %s |", path.c_str());
        for (const Unit& unit : units) {
            const Growth growth = growth_of(tokenizer, unit.text, max_megabytes);
            std::printf(" %.0f, %.0f (%.2f, %.2f) |", growth.first_seconds * 1e3, growth.last_seconds * 1e3,
                        growth.mean, growth.largest);
            std::fflush(stdout);
            worst.first_seconds = std::max(worst.first_seconds, growth.first_seconds);
            worst.last_seconds = std::max(worst.last_seconds, growth.last_seconds);
            worst.mean = std::max(worst.mean, growth.mean);
            worst.largest = std::max(worst.largest, growth.largest);
        }
        std::printf("\n");
    }
    std::printf("\nThe largest of each: %.0f, %.0f (%.2f, %.2f)\n", worst.first_seconds * 1e3,
                worst.last_seconds * 1e3, worst.mean, worst.largest);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: bench_tokenizer PROSE MAX_MEGABYTES TOKENIZER...\n");
        return 2;
    }
    mallopt(M_MMAP_THRESHOLD, INT_MAX);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    try {
        const std::vector<std::string> paths(argv + 3, argv + argc);
        bench_prose(head(read_file(argv[1], 1u << 30), megabyte), paths);
        bench_growth(static_cast<size_t>(std::max(1, std::atoi(argv[2]))), paths);
    } catch (const Error& e) {
        std::fprintf(stderr, "bench_tokenizer: %s\n", e.what());
        return 1;
    }
    return 0;
}
