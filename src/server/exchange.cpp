// See exchange.h.
#include "server/exchange.h"

namespace refrag {

void Exchange::respond(HttpHead head, std::string body) {
    std::function<void()> forget;  // what it holds is let go of without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    if (begun_) return;
    if (on_status) on_status(head.status);
    head_ = std::move(head);
    out_ = std::move(body);
    begun_ = ended_ = true;
    forget.swap(leave_);
    wake();
}

bool Exchange::begin(HttpHead head) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (begun_ || left_) return !left_;
    if (on_status) on_status(head.status);
    head_ = std::move(head);
    begun_ = true;
    wake();
    return true;
}

bool Exchange::write(std::string_view piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (left_ || ended_) return false;
    out_.append(piece);
    wake();
    return true;
}

void Exchange::end() {
    std::function<void()> forget;
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    forget.swap(leave_);
    wake();
}

bool Exchange::begun() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return begun_;
}

bool Exchange::left() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return left_;
}

void Exchange::on_leave(std::function<void()> leave) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (ended_) return;
        if (!left_) {
            leave_ = std::move(leave);
            return;
        }
    }
    leave();
}

void Exchange::client_left() {
    std::function<void()> leave;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (left_) return;
        left_ = true;
        leave.swap(leave_);
        wake();
    }
    if (leave) leave();
}

}  // namespace refrag
