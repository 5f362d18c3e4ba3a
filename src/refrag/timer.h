// Milliseconds on the host's steady clock.
#pragma once

#include <chrono>

namespace refrag {

inline double now_ms() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(now).count();
}

// Adds the time from its making to its end to a counter.
class StageTimer {
  public:
    explicit StageTimer(double& counter_ms) : counter_ms_(counter_ms), started_ms_(now_ms()) {}
    StageTimer(const StageTimer&) = delete;
    StageTimer& operator=(const StageTimer&) = delete;
    ~StageTimer() { counter_ms_ += now_ms() - started_ms_; }

  private:
    double& counter_ms_;
    double started_ms_;
};

}  // namespace refrag
