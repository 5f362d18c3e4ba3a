// See interrupt.h.
#include "cli/interrupt.h"

namespace refrag {
namespace {

volatile std::sig_atomic_t last_signal = 0;

}  // namespace

Interrupt::Interrupt(bool once) {
    last_signal = 0;
    struct sigaction action = {};
    action.sa_handler = [](int signal) { last_signal = signal; };
    action.sa_flags = once ? static_cast<int>(SA_RESETHAND) : 0;
    sigaction(SIGINT, &action, &old_int_);
    sigaction(SIGTERM, &action, &old_term_);
}

Interrupt::~Interrupt() {
    sigaction(SIGINT, &old_int_, nullptr);
    sigaction(SIGTERM, &old_term_, nullptr);
}

bool Interrupt::asked() const {
    return last_signal != 0;
}

bool Interrupt::terminated() const {
    return last_signal == SIGTERM;
}

void Interrupt::forget() {
    if (last_signal != SIGTERM) last_signal = 0;
}

}  // namespace refrag
