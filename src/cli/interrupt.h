// Ctrl-C and SIGTERM as a question that work asks between its steps. The command line's alone: the library
// installs no handler.
#pragma once

#include <csignal>

namespace refrag {

// Installed while it lives. once: a second signal ends the process.
class Interrupt {
  public:
    explicit Interrupt(bool once);
    ~Interrupt();
    Interrupt(const Interrupt&) = delete;
    Interrupt& operator=(const Interrupt&) = delete;

    bool asked() const;
    bool terminated() const;  // by SIGTERM
    void forget();            // what was asked

  private:
    struct sigaction old_int_ = {};
    struct sigaction old_term_ = {};
};

}  // namespace refrag
