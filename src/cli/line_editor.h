// Lines that a user types: on a terminal with editing and a history that outlives the program (libedit, where
// it is built in), else as they come.
#pragma once

#include <optional>
#include <string>

namespace refrag {

class LineEditor {
  public:
    // history: a file; "": none. One that cannot be read or written is let be.
    explicit LineEditor(const std::string& history);
    ~LineEditor();
    LineEditor(const LineEditor&) = delete;
    LineEditor& operator=(const LineEditor&) = delete;

    // The next line; none at the end of input (Ctrl-D). A line that Ctrl-C ended is empty.
    std::optional<std::string> read(const std::string& prompt);
    bool is_terminal() const { return terminal_; }

  private:
    std::string history_;
    bool terminal_;
};

// The history's file: $XDG_STATE_HOME/refrag/chat_history, or ~/.local/state/...; "" without a home.
std::string chat_history_path();

}  // namespace refrag
