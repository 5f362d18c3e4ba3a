// What the fuzz targets share: how a promise is checked and where their files lie.
#include "targets.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <stdexcept>
#include <system_error>

#include "base/check.h"
#include "io/file.h"

namespace refrag_fuzz {

void promise(bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("broken promise: ") + what);
}

bool refused(void (*read)(void*), void* context) {
    try {
        read(context);
        return false;
    } catch (const refrag::Error& error) {
        const std::string& message = error.message();
        promise(!message.empty(), "an error has a message");
        promise(message.size() < 4000, "an error's message is short");
        promise(refrag::printable(message, message.size()) == message,
                "an error's message is one printable line");
        promise(error.status() == refrag::Status::bad_input, "what is wrong in a file is bad input");
        return true;
    }
}

ScratchDir::ScratchDir() {
    const std::string base = std::filesystem::is_directory("/dev/shm")
                                 ? "/dev/shm"
                                 : std::filesystem::temp_directory_path().string();
    path_ = base + "/refrag_fuzz_XXXXXX";
    if (::mkdtemp(path_.data()) == nullptr) throw std::runtime_error("cannot make " + path_);
}

ScratchDir::~ScratchDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
}

void ScratchDir::write(const char* name, std::string_view bytes) const {
    const int descriptor = ::open(file(name).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (descriptor < 0) throw std::runtime_error("cannot open " + file(name));
    const ssize_t put = ::write(descriptor, bytes.data(), bytes.size());
    ::close(descriptor);
    if (put != static_cast<ssize_t>(bytes.size())) throw std::runtime_error("cannot write " + file(name));
}

void ScratchDir::remove(const char* name) const {
    ::unlink(file(name).c_str());
}

}  // namespace refrag_fuzz
