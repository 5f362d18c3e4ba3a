// See memory.h.
#include "base/memory.h"

#include <sys/resource.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <string_view>

namespace refrag {
namespace {

// A small file of the kernel's; empty where it cannot be read.
std::string text_of(const std::string& path) {
    std::string text;
    std::FILE* file = std::fopen(path.c_str(), "re");
    if (file == nullptr) return text;
    char part[4096];
    for (size_t n = 0; (n = std::fread(part, 1, sizeof part, file)) > 0 && text.size() < (1u << 20);)
        text.append(part, n);
    std::fclose(file);
    return text;
}

std::optional<uint64_t> number_at(std::string_view text) {
    text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{}) return std::nullopt;
    return value;
}

// The number after `name` at the beginning of a line.
std::optional<uint64_t> field(std::string_view text, std::string_view name) {
    for (size_t begin = 0; begin < text.size();) {
        const size_t end = std::min(text.find('\n', begin), text.size());
        const std::string_view line = text.substr(begin, end - begin);
        if (line.starts_with(name)) return number_at(line.substr(name.size()));
        begin = end + 1;
    }
    return std::nullopt;
}

// Of every group from `path` up to the root: each may have a limit.
uint64_t least_left(const std::string& root, std::string path, const char* limit, const char* current,
                    uint64_t least) {
    while (true) {
        const std::string dir = root + path + "/";
        const auto left =
            control_group_left(text_of(dir + limit), text_of(dir + current), text_of(dir + "memory.stat"));
        if (left) least = std::min(least, *left);
        if (path.empty()) return least;
        const size_t slash = path.rfind('/');
        path.resize(slash == std::string::npos ? 0 : slash);
    }
}

// The path of the group in a line of /proc/self/cgroup that contains `controllers`: "0::/user.slice".
std::string group_path(std::string_view text, std::string_view controllers) {
    for (size_t begin = 0; begin < text.size();) {
        const size_t end = std::min(text.find('\n', begin), text.size());
        const std::string_view line = text.substr(begin, end - begin);
        const size_t at = line.find(controllers);
        if (at != std::string_view::npos) {
            const std::string_view path = line.substr(at + controllers.size());
            return path == "/" ? std::string() : std::string(path);
        }
        begin = end + 1;
    }
    return {};
}

}  // namespace

std::optional<uint64_t> control_group_left(const std::string& limit, const std::string& current,
                                           const std::string& stat) {
    const std::optional<uint64_t> most = number_at(limit);
    const std::optional<uint64_t> now = number_at(current);
    // Version 1 writes "no limit" as a number close to 2^63.
    if (!most || !now || *most >= (uint64_t{1} << 62)) return std::nullopt;
    uint64_t cache = field(stat, "inactive_file ").value_or(0);
    cache = std::max(cache, field(stat, "total_inactive_file ").value_or(0));
    const uint64_t used = *now - std::min(*now, cache);
    return *most - std::min(*most, used);
}

uint64_t available_memory_bytes() {
    uint64_t least = UINT64_MAX;
    if (const auto kib = field(text_of("/proc/meminfo"), "MemAvailable:")) least = *kib * 1024;
    const std::string groups = text_of("/proc/self/cgroup");
    least = least_left("/sys/fs/cgroup", group_path(groups, "0::"), "memory.max", "memory.current", least);
    return least_left("/sys/fs/cgroup/memory", group_path(groups, ":memory:"), "memory.limit_in_bytes",
                      "memory.usage_in_bytes", least);
}

uint64_t peak_resident_bytes() {
    // Not getrusage alone: its figure outlives exec, so it may be that of a larger parent.
    if (const auto kib = field(text_of("/proc/self/status"), "VmHWM:")) return *kib * 1024;
    rusage usage{};
    if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
    return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace refrag
