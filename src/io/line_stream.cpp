// See line_stream.h.
#include "io/line_stream.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "io/file.h"
#include "io/lines.h"
#include "io/posix.h"

namespace refrag {
namespace {

constexpr size_t kBlockBytes = size_t{1} << 20;
constexpr size_t kPeekBytes = 4096;

}  // namespace

LineStream::LineStream(const std::string& path) : name_(input_name(path)) {
    if (path == "-") {
        descriptor_ = STDIN_FILENO;
        return;
    }
    REFRAG_CHECK(!is_directory(path), Status::bad_input, printable(path),
                 ": expected a file, found a directory");
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    REFRAG_CHECK(descriptor_ >= 0, Status::bad_input, printable(path), ": cannot be opened (",
                 system_text(errno), ")");
    own_ = true;
    name_ = printable(path);
}

LineStream::~LineStream() {
    if (own_) ::close(descriptor_);
}

bool LineStream::fill() {
    if (ended_) return false;
    buffer_.erase(0, at_);
    searched_ -= at_;
    at_ = 0;
    const size_t had = buffer_.size();
    buffer_.resize(had + kBlockBytes);
    ssize_t n = 0;
    do {
        n = ::read(descriptor_, buffer_.data() + had, kBlockBytes);
    } while (n < 0 && errno == EINTR);
    const int error = errno;
    buffer_.resize(had + static_cast<size_t>(std::max<ssize_t>(n, 0)));
    REFRAG_CHECK(n >= 0, Status::runtime, name_, ": could not be read (", system_text(error), ")");
    read_ += static_cast<uint64_t>(n);
    ended_ = n == 0;
    return !ended_;
}

std::string_view LineStream::peek() {
    if (!begun_) {
        while (buffer_.size() < kPeekBytes && fill()) {
        }
        begun_ = true;
        const std::string_view form = foreign_form(buffer_);
        REFRAG_CHECK(form.empty(), Status::bad_input, name_, ": expected text in UTF-8, found ", form);
        at_ = buffer_.size() - without_byte_order_mark(buffer_).size();
        searched_ = at_;
    }
    return std::string_view(buffer_).substr(at_, kPeekBytes);
}

bool LineStream::next(std::string_view& line) {
    peek();
    size_t end = 0;
    while ((end = buffer_.find('\n', searched_)) == std::string::npos) {
        searched_ = buffer_.size();
        REFRAG_CHECK(buffer_.size() - at_ <= max_json_line_bytes, Status::bad_input, name_, ": line ",
                     number_ + 1, ": expected at most ", max_json_line_bytes, " bytes, found more");
        if (fill()) continue;
        if (at_ == buffer_.size()) return false;
        end = buffer_.size();
        break;
    }
    line = std::string_view(buffer_).substr(at_, end - at_);
    if (line.ends_with('\r')) line.remove_suffix(1);
    at_ = std::min(end + 1, buffer_.size());
    searched_ = at_;
    ++number_;
    return true;
}

}  // namespace refrag
