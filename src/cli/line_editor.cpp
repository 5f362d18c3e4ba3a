// See line_editor.h.
#include "cli/line_editor.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>

#ifdef REFRAG_WITH_LIBEDIT
#include <editline/readline.h>
#endif

namespace refrag {
namespace {

constexpr int kMostLines = 1000;  // of a history

}  // namespace

std::string chat_history_path() {
    const char* state = std::getenv("XDG_STATE_HOME");  // NOLINT(concurrency-mt-unsafe): nothing here sets it
    const char* home = std::getenv("HOME");             // NOLINT(concurrency-mt-unsafe): as above
    std::string dir;
    if (state != nullptr && *state == '/') {
        dir = state;
    } else if (home != nullptr && *home == '/') {
        dir = std::string(home) + "/.local/state";
    } else {
        return "";
    }
    return dir + "/refrag/chat_history";
}

LineEditor::LineEditor(const std::string& history)
    : history_(history), terminal_(isatty(STDIN_FILENO) != 0 && isatty(STDOUT_FILENO) != 0) {
#ifdef REFRAG_WITH_LIBEDIT
    if (!terminal_) return;
    using_history();
    stifle_history(kMostLines);
    if (!history_.empty()) read_history(history_.c_str());
#endif
}

LineEditor::~LineEditor() {
#ifdef REFRAG_WITH_LIBEDIT
    if (!terminal_ || history_.empty()) return;
    std::error_code ignored;
    std::filesystem::create_directories(std::filesystem::path(history_).parent_path(), ignored);
    const mode_t before = umask(077);  // what was asked is the user's own
    write_history(history_.c_str());
    umask(before);
#endif
}

std::optional<std::string> LineEditor::read(const std::string& prompt) {
#ifdef REFRAG_WITH_LIBEDIT
    if (terminal_) {
        errno = 0;
        char* line = readline(prompt.c_str());
        if (line == nullptr) {
            if (errno != EINTR) return std::nullopt;
            std::fputc('\n', stdout);
            return "";
        }
        std::string text = line;
        std::free(line);
        if (!text.empty()) add_history(text.c_str());
        return text;
    }
#endif
    if (terminal_) {
        std::fputs(prompt.c_str(), stdout);
        std::fflush(stdout);
    }
    std::string text;
    if (std::getline(std::cin, text)) return text;
    if (!terminal_ || std::cin.eof()) return std::nullopt;
    std::cin.clear();
    std::clearerr(stdin);
    return "";
}

}  // namespace refrag
