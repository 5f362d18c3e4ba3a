// A progress bar on standard error for long work: loading, sweeps, evaluations. Silent unless standard error
// is a terminal. One line that rewrites itself within the terminal's width, with no control character but
// carriage return, and that is gone at the end.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace refrag {

enum class ProgressUnit { items, bytes };

// The bar's line, at most `width` columns (counting bytes; `what` is cut from its front if need be):
// "loading model [######........]  43% 1.2/2.7 GB". Without room for a bar the percentage alone. total <= 0:
// "what ...".
std::string render_progress(const std::string& what, ProgressUnit unit, int64_t done, int64_t total,
                            int width);

// "2:05 left" or "1:02:05 left", from the time that `done` of `total` took; "" before that says anything
// (three seconds, one percent).
std::string time_left(double elapsed_s, int64_t done, int64_t total);

class Progress {
  public:
    explicit Progress(const std::string& what, ProgressUnit unit = ProgressUnit::items);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;
    // Rewrites the line, at most ten times a second but for the end.
    void update(int64_t done, int64_t total);
    // update() as a function, for as long as this lives; empty where nobody would see it.
    std::function<void(uint64_t done, uint64_t total)> sink();

  private:
    void show(int64_t done, int64_t total);

    std::string what_;
    ProgressUnit unit_;
    bool terminal_;
    size_t shown_ = 0;  // columns of the line on the terminal
    double begun_ms_ = 0.0;
    double next_ms_ = 0.0;
};

}  // namespace refrag
