// See failing.h. Counting is two atomic operations an allocation; nothing here allocates where memory is
// hooked.
#include "failing.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <new>

namespace {

std::atomic<bool> memory_armed{false};
std::atomic<bool> memory_from_then_on{false};
std::atomic<bool> memory_only_large{false};
std::atomic<bool> memory_failed{false};
std::atomic<int64_t> memory_at{0};
std::atomic<int64_t> memory_asked{0};
std::atomic<int64_t> memory_live{0};

bool allocation_fails(bool large, bool may_fail = false) {
    if (!memory_armed.load(std::memory_order_relaxed)) return false;
    if (!large && memory_only_large.load(std::memory_order_relaxed)) return false;
    const int64_t number = memory_asked.fetch_add(1) + 1;
    const int64_t at = memory_at.load();
    const bool fails = at > 0 && (number == at || (number > at && memory_from_then_on.load()));
    if (fails && !may_fail) memory_failed.store(true);
    return fails;
}

void* counted(void* block) {
    if (block != nullptr) memory_live.fetch_add(1, std::memory_order_relaxed);
    return block;
}
void* allocate(size_t bytes, bool may_fail = false) {
    return allocation_fails(false, may_fail) ? nullptr : counted(std::malloc(bytes == 0 ? 1 : bytes));
}
void* allocate_aligned(size_t bytes, std::align_val_t alignment, bool may_fail = false) {
    void* block = nullptr;
    if (allocation_fails(false, may_fail)) return nullptr;
    if (::posix_memalign(&block, static_cast<size_t>(alignment), bytes == 0 ? 1 : bytes) != 0) return nullptr;
    return counted(block);
}
void* or_throw(void* block) {
    if (block == nullptr) throw std::bad_alloc();
    return block;
}
void give_back(void* block) {
    if (block == nullptr) return;
    memory_live.fetch_sub(1, std::memory_order_relaxed);
    std::free(block);
}

}  // namespace

void* operator new(size_t bytes) {
    return or_throw(allocate(bytes));
}
void* operator new[](size_t bytes) {
    return or_throw(allocate(bytes));
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
    return allocate(bytes, true);
}
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept {
    return allocate(bytes, true);
}
void* operator new(size_t bytes, std::align_val_t alignment) {
    return or_throw(allocate_aligned(bytes, alignment));
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
    return or_throw(allocate_aligned(bytes, alignment));
}
void* operator new(size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return allocate_aligned(bytes, alignment, true);
}
void* operator new[](size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return allocate_aligned(bytes, alignment, true);
}
void operator delete(void* block) noexcept {
    give_back(block);
}
void operator delete[](void* block) noexcept {
    give_back(block);
}
void operator delete(void* block, size_t) noexcept {
    give_back(block);
}
void operator delete[](void* block, size_t) noexcept {
    give_back(block);
}
void operator delete(void* block, std::align_val_t) noexcept {
    give_back(block);
}
void operator delete[](void* block, std::align_val_t) noexcept {
    give_back(block);
}
void operator delete(void* block, size_t, std::align_val_t) noexcept {
    give_back(block);
}
void operator delete[](void* block, size_t, std::align_val_t) noexcept {
    give_back(block);
}
void operator delete(void* block, const std::nothrow_t&) noexcept {
    give_back(block);
}
void operator delete[](void* block, const std::nothrow_t&) noexcept {
    give_back(block);
}

// ---- the calls that the linker sends here --------------------------------------------------------

namespace {

std::mutex calls_mutex;
std::function<refrag_test::Fate(const refrag_test::SystemCall&)> calls_decide;
std::atomic<bool> calls_armed{false};
int64_t calls_number = 0;
thread_local bool calls_inside = false;

refrag_test::Fate fate_of(const char* name, const std::string& path) {
    const std::lock_guard<std::mutex> lock(calls_mutex);
    calls_inside = true;
    refrag_test::Fate fate;
    try {
        fate = calls_decide({name, path, ++calls_number});
    } catch (...) {
        std::abort();  // a test's mistake; it must not come out of a C function
    }
    calls_inside = false;
    return fate;
}
bool hooked() {
    return calls_armed.load() && !calls_inside;
}
std::string path_of(int descriptor) {
    char path[4096];
    const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
    const ssize_t n = ::readlink(link.c_str(), path, sizeof path);
    return n < 0 ? "" : std::string(path, static_cast<size_t>(n));
}
// Makes the call unless its fate is to fail.
template <typename Real>
auto unless_failing(const refrag_test::Fate& fate, Real&& real) {
    if (fate.error == 0) return real();
    errno = fate.error;
    return static_cast<decltype(real())>(-1);
}

}  // namespace

// The names are the linker's.
extern "C" {

void* __real_aligned_alloc(size_t alignment, size_t bytes);
int __real_open(const char* path, int flags, ...);
ssize_t __real_pread(int descriptor, void* buffer, size_t bytes, off_t offset);
ssize_t __real_read(int descriptor, void* buffer, size_t bytes);
ssize_t __real_write(int descriptor, const void* buffer, size_t bytes);
int __real_fstat(int descriptor, struct stat* info);
int __real_stat(const char* path, struct stat* info);
int __real_fsync(int descriptor);
int __real_fchmod(int descriptor, mode_t mode);
int __real_close(int descriptor);
int __real_rename(const char* from, const char* to);
char* __real_realpath(const char* path, char* resolved);

void* __wrap_aligned_alloc(size_t alignment, size_t bytes);
int __wrap_open(const char* path, int flags, ...);
ssize_t __wrap_pread(int descriptor, void* buffer, size_t bytes, off_t offset);
ssize_t __wrap_read(int descriptor, void* buffer, size_t bytes);
ssize_t __wrap_write(int descriptor, const void* buffer, size_t bytes);
int __wrap_fstat(int descriptor, struct stat* info);
int __wrap_stat(const char* path, struct stat* info);
int __wrap_fsync(int descriptor);
int __wrap_fchmod(int descriptor, mode_t mode);
int __wrap_close(int descriptor);
int __wrap_rename(const char* from, const char* to);
char* __wrap_realpath(const char* path, char* resolved);

void* __wrap_aligned_alloc(size_t alignment, size_t bytes) {
    return allocation_fails(true) ? nullptr : __real_aligned_alloc(alignment, bytes);
}

int __wrap_open(const char* path, int flags, ...) {
    mode_t mode = 0;
    if ((flags & O_CREAT) != 0) {
        va_list arguments;
        va_start(arguments, flags);
        mode = static_cast<mode_t>(va_arg(arguments, unsigned));
        va_end(arguments);
    }
    if (!hooked()) return __real_open(path, flags, mode);
    return unless_failing(fate_of("open", path), [&] { return __real_open(path, flags, mode); });
}

ssize_t __wrap_pread(int descriptor, void* buffer, size_t bytes, off_t offset) {
    if (!hooked()) return __real_pread(descriptor, buffer, bytes, offset);
    const auto fate = fate_of("pread", path_of(descriptor));
    return unless_failing(
        fate, [&] { return __real_pread(descriptor, buffer, std::min(bytes, fate.most_bytes), offset); });
}

ssize_t __wrap_read(int descriptor, void* buffer, size_t bytes) {
    if (!hooked()) return __real_read(descriptor, buffer, bytes);
    const auto fate = fate_of("read", path_of(descriptor));
    return unless_failing(fate,
                          [&] { return __real_read(descriptor, buffer, std::min(bytes, fate.most_bytes)); });
}

ssize_t __wrap_write(int descriptor, const void* buffer, size_t bytes) {
    if (!hooked()) return __real_write(descriptor, buffer, bytes);
    const auto fate = fate_of("write", path_of(descriptor));
    return unless_failing(fate,
                          [&] { return __real_write(descriptor, buffer, std::min(bytes, fate.most_bytes)); });
}

int __wrap_fstat(int descriptor, struct stat* info) {
    if (!hooked()) return __real_fstat(descriptor, info);
    return unless_failing(fate_of("fstat", path_of(descriptor)),
                          [&] { return __real_fstat(descriptor, info); });
}

int __wrap_stat(const char* path, struct stat* info) {
    if (!hooked()) return __real_stat(path, info);
    return unless_failing(fate_of("stat", path), [&] { return __real_stat(path, info); });
}

int __wrap_fsync(int descriptor) {
    if (!hooked()) return __real_fsync(descriptor);
    return unless_failing(fate_of("fsync", path_of(descriptor)), [&] { return __real_fsync(descriptor); });
}

int __wrap_fchmod(int descriptor, mode_t mode) {
    if (!hooked()) return __real_fchmod(descriptor, mode);
    return unless_failing(fate_of("fchmod", path_of(descriptor)),
                          [&] { return __real_fchmod(descriptor, mode); });
}

int __wrap_close(int descriptor) {
    if (!hooked()) return __real_close(descriptor);
    const auto fate = fate_of("close", path_of(descriptor));
    const int result = __real_close(descriptor);  // a close that fails has closed all the same
    return unless_failing(fate, [&] { return result; });
}

int __wrap_rename(const char* from, const char* to) {
    if (!hooked()) return __real_rename(from, to);
    return unless_failing(fate_of("rename", to), [&] { return __real_rename(from, to); });
}

char* __wrap_realpath(const char* path, char* resolved) {
    if (!hooked()) return __real_realpath(path, resolved);
    const auto fate = fate_of("realpath", path);
    if (fate.error == 0) return __real_realpath(path, resolved);
    errno = fate.error;
    return nullptr;
}

}  // extern "C"

namespace refrag_test {

FailingMemory::FailingMemory(int64_t n, bool from_then_on, Memory kind) {
    memory_at = n;
    memory_asked = 0;
    memory_failed = false;
    memory_from_then_on = from_then_on;
    memory_only_large = kind == Memory::large;
    memory_armed = true;
}
FailingMemory::~FailingMemory() {
    disarm();
}
void FailingMemory::disarm() {
    memory_armed = false;
}
int64_t FailingMemory::asked() const {
    return memory_asked;
}
bool FailingMemory::failed() const {
    return memory_failed;
}
int64_t live_allocations() {
    return memory_live;
}

FailingCalls::FailingCalls(std::function<Fate(const SystemCall&)> decide) {
    const std::lock_guard<std::mutex> lock(calls_mutex);
    calls_decide = std::move(decide);
    calls_number = 0;
    calls_armed = true;
}
FailingCalls::~FailingCalls() {
    calls_armed = false;
    const std::lock_guard<std::mutex> lock(calls_mutex);
    calls_decide = nullptr;
}
int64_t FailingCalls::calls() const {
    const std::lock_guard<std::mutex> lock(calls_mutex);
    return calls_number;
}

size_t open_descriptors() {
    size_t n = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++n;
    return n;
}

}  // namespace refrag_test
