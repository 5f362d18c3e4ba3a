// See write_behind.h.
#include "store/write_behind.h"

#include <utility>

namespace refrag {
namespace {

constexpr uint64_t kMostUnwrittenBytes = uint64_t{64} << 20;

}  // namespace

WriteBehind::~WriteBehind() {
    stop();
}

void WriteBehind::start() {
    thread_ = std::thread([this] { run(); });
}

void WriteBehind::stop() noexcept {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
}

std::optional<std::string> WriteBehind::find(const Sha256Digest& key) noexcept {
    try {
        {
            const std::lock_guard lock(mutex_);
            if (broken_) return std::nullopt;
            const auto found = unwritten_.find(key);
            if (found != unwritten_.end()) {
                if (!found->second.record) return std::nullopt;
                return *found->second.record;
            }
        }
        return look_up(key);
    } catch (const Error& error) {
        complain(error);
    } catch (const std::bad_alloc&) {
        // A miss.
    }
    return std::nullopt;
}

void WriteBehind::forget(const Sha256Digest& key) noexcept {
    try {
        add(key, nullptr);
    } catch (const std::bad_alloc&) {
        // The next one who finds it will.
    }
}

void WriteBehind::keep(const Sha256Digest& key, std::string record) noexcept {
    try {
        add(key, std::make_shared<const std::string>(std::move(record)));
    } catch (const std::bad_alloc&) {
        // Not kept.
    }
}

void WriteBehind::add(const Sha256Digest& key, std::shared_ptr<const std::string> record) {
    const uint64_t bytes = record ? record->size() : 0;
    {
        const std::lock_guard lock(mutex_);
        if (broken_ || unwritten_bytes_ + bytes > kMostUnwrittenBytes) return;
        waiting_.push_back({key, record});
        unwritten_[key] = {std::move(record), ++order_};
        unwritten_bytes_ += bytes;
    }
    changed_.notify_all();
}

void WriteBehind::flush() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return (waiting_.empty() && !writing_) || broken_; });
}

void WriteBehind::wake() noexcept {
    {
        const std::lock_guard lock(mutex_);
        woken_ = true;
    }
    changed_.notify_all();
}

void WriteBehind::run() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] { return stop_ || woken_ || !waiting_.empty(); });
        if (stop_ && waiting_.empty()) return;
        std::vector<Entry> entries;
        entries.swap(waiting_);
        const uint64_t last = order_;
        writing_ = true;
        woken_ = false;
        lock.unlock();
        try {
            write(entries);
        } catch (const Error& error) {
            complain(error);
        } catch (const std::bad_alloc&) {
            // Not kept.
        }
        lock.lock();
        writing_ = false;
        for (const Entry& entry : entries) {
            unwritten_bytes_ -= entry.record ? entry.record->size() : 0;
            const auto found = unwritten_.find(entry.key);
            if (found != unwritten_.end() && found->second.order <= last) unwritten_.erase(found);
        }
        changed_.notify_all();
        if (broken_) return;
    }
}

void WriteBehind::complain(const Error& error) noexcept {
    bool first = false;
    {
        const std::lock_guard lock(mutex_);
        first = !std::exchange(warned_, true);
        broken_ = broken_ || error.status() == Status::bad_input;
    }
    changed_.notify_all();
    try {
        if (first) warn(error.message() + ": going on without it");
    } catch (...) {
        // Nobody is told.
    }
}

void WriteBehind::recovered() noexcept {
    const std::lock_guard lock(mutex_);
    warned_ = false;
}

void WriteBehind::warn(const std::string& line) const {
    if (warn_) warn_(line);
}

bool WriteBehind::is_broken() const noexcept {
    const std::lock_guard lock(mutex_);
    return broken_;
}

}  // namespace refrag
