// Failures on demand, for the tests that let every allocation and every system call fail in turn. The test
// binary replaces operator new and delete, and the linker sends aligned_alloc and the file calls of
// src/io/file.cpp through failing.cpp (--wrap in the Makefile): the library itself knows nothing of it. With
// nothing armed everything goes on to the real function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace refrag_test {

// ---- memory -------------------------------------------------------------------------------------

enum class Memory {
    all,   // operator new in every form, and aligned_alloc
    large  // aligned_alloc alone: what the CPU backend keeps weights, caches and scratch in
};

// From its making to its end the n-th allocation (counted from 1, over all threads) fails; with
// `from_then_on` every later one too. n = 0 only counts. One at a time.
class FailingMemory {
  public:
    explicit FailingMemory(int64_t n, bool from_then_on = false, Memory kind = Memory::all);
    ~FailingMemory();
    FailingMemory(const FailingMemory&) = delete;
    FailingMemory& operator=(const FailingMemory&) = delete;
    // Allocations asked for since it was armed; stays readable after disarm().
    int64_t asked() const;
    // Whether one failed that could not be done without (operator new(std::nothrow) says that it can:
    // std::stable_sort asks so).
    bool failed() const;
    // Ends it early, so that what a test does next is not touched.
    void disarm();
};

// Blocks from operator new that were not given back yet.
int64_t live_allocations();

// ---- system calls -------------------------------------------------------------------------------

// One call of open, pread, read, write, fstat, stat, fsync, fchmod, close, rename or realpath.
struct SystemCall {
    const char* name;
    std::string path;  // of the file it is about
    int64_t number;    // counted from 1 since the handler was set
};

// What becomes of it.
struct Fate {
    int error = 0;                 // not 0: the call is not made, and fails with this errno
    size_t most_bytes = SIZE_MAX;  // reads and writes move at most this many
    static Fate normal() { return {}; }
    static Fate fails(int error) { return {error, SIZE_MAX}; }
    static Fate moves(size_t bytes) { return {0, bytes}; }
};

// From its making to its end `decide` is asked about every call; it may also do something to the file first.
// Calls that it makes itself are not hooked. One at a time.
class FailingCalls {
  public:
    explicit FailingCalls(std::function<Fate(const SystemCall&)> decide);
    ~FailingCalls();
    FailingCalls(const FailingCalls&) = delete;
    FailingCalls& operator=(const FailingCalls&) = delete;
    int64_t calls() const;
};

// Descriptors this process has open.
size_t open_descriptors();

}  // namespace refrag_test
