// See progress.h.
#include "cli/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

constexpr int kMostColumns = 100;  // a longer line is no easier to read
constexpr int kMostBar = 40;
constexpr int kLeastBar = 8;
constexpr double kEveryMs = 100.0;

int terminal_columns() {
    winsize size{};
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
    return size.ws_col;
}

// "1.2/2.7 GB": both in the unit of the total.
std::string byte_counts(int64_t done, int64_t total) {
    struct Unit {
        const char* name;
        double bytes;
    };
    static constexpr Unit units[] = {{"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"B", 1.0}};
    for (const Unit& unit : units) {
        if (static_cast<double>(total) < unit.bytes && unit.bytes > 1.0) continue;
        char text[64];
        std::snprintf(text, sizeof text, unit.bytes > 1.0 ? "%.1f/%.1f %s" : "%.0f/%.0f %s",
                      static_cast<double>(done) / unit.bytes, static_cast<double>(total) / unit.bytes,
                      unit.name);
        return text;
    }
    return {};
}

}  // namespace

std::string render_progress(const std::string& what, ProgressUnit unit, int64_t done, int64_t total,
                            int width) {
    const auto room = static_cast<size_t>(std::max(width, 1));
    if (total <= 0) return (what + " ...").substr(0, room);
    done = std::clamp<int64_t>(done, 0, total);
    const double share = static_cast<double>(done) / static_cast<double>(total);
    char percent[16];
    std::snprintf(percent, sizeof percent, "%3d%%", static_cast<int>(share * 100.0));
    const std::string counts = str(
        " ", percent, " ", unit == ProgressUnit::bytes ? byte_counts(done, total) : str(done, "/", total));
    // A long path's end says more than its beginning.
    const size_t most = room > counts.size() + kLeastBar + 6 ? room - counts.size() - kLeastBar - 3 : 0;
    if (most == 0) return std::string(percent).substr(0, room);
    const std::string name = what.size() <= most ? what : "..." + what.substr(what.size() - (most - 3));
    const size_t bar = std::min<size_t>(kMostBar, room - name.size() - counts.size() - 3);
    const auto filled = static_cast<size_t>(share * static_cast<double>(bar));
    return str(name, " [", std::string(filled, '#'), std::string(bar - filled, '.'), "]", counts);
}

std::string time_left(double elapsed_s, int64_t done, int64_t total) {
    if (elapsed_s < 3.0 || done <= 0 || done >= total || done < total / 100) return "";
    const double left = elapsed_s * static_cast<double>(total - done) / static_cast<double>(done);
    const int64_t seconds = std::llround(left);
    char text[48];
    if (seconds < 3600) {
        std::snprintf(text, sizeof text, "%d:%02d left", static_cast<int>(seconds / 60),
                      static_cast<int>(seconds % 60));
    } else {
        std::snprintf(text, sizeof text, "%lld:%02d:%02d left", static_cast<long long>(seconds / 3600),
                      static_cast<int>(seconds / 60 % 60), static_cast<int>(seconds % 60));
    }
    return text;
}

Progress::Progress(const std::string& what, ProgressUnit unit)
    : what_(printable(what)), unit_(unit), terminal_(isatty(STDERR_FILENO) != 0), begun_ms_(now_ms()) {
    if (terminal_) show(0, 0);
}

Progress::~Progress() {
    if (terminal_) std::fprintf(stderr, "\r%*s\r", static_cast<int>(shown_), "");
}

void Progress::update(int64_t done, int64_t total) {
    if (!terminal_) return;
    const double now = now_ms();
    if (now < next_ms_ && done < total) return;
    next_ms_ = now + kEveryMs;
    show(done, total);
}

std::function<void(uint64_t, uint64_t)> Progress::sink() {
    if (!terminal_) return {};
    return [this](uint64_t done, uint64_t total) {
        update(static_cast<int64_t>(done), static_cast<int64_t>(total));
    };
}

void Progress::show(int64_t done, int64_t total) {
    // One column less than there are: writing the last one would begin a new line.
    const int width = std::min(terminal_columns() - 1, kMostColumns);
    const std::string left = time_left((now_ms() - begun_ms_) / 1e3, done, total);
    const std::string line =
        render_progress(left.empty() ? what_ : what_ + ", " + left, unit_, done, total, width);
    // Blanks cover what a longer line left.
    const size_t left_over = shown_ > line.size() ? shown_ - line.size() : 0;
    std::fprintf(stderr, "\r%s%*s", line.c_str(), static_cast<int>(left_over), "");
    std::fflush(stderr);
    shown_ = line.size();
}

}  // namespace refrag
