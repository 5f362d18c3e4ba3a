// What stands behind the handles of refrag.h, and the border at which exceptions become a status and a
// message.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/arena.h"
#include "base/check.h"
#include "refrag.h"
#include "refrag/model.h"
#include "refrag/passage.h"
#include "refrag/segment.h"
#include "refrag/session.h"

namespace refrag::api {

// A model with the device that it lies on.
struct Loaded {
    std::unique_ptr<Device> device;
    std::unique_ptr<Model> model;
};

// Thrown where a callback asks to stop.
struct Cancelled {};

// One line, cut where a character ends.
inline void fill_error(refrag_error* error, refrag_status status, std::string_view message) noexcept {
    constexpr size_t at = offsetof(refrag_error, message);
    if (error == nullptr || error->struct_size <= at) return;
    error->status = status;
    size_t n = std::min({message.size(), error->struct_size - at - 1, sizeof error->message - 1});
    const auto continues = [&](size_t i) { return (static_cast<unsigned char>(message[i]) & 0xC0U) == 0x80; };
    if (n < message.size())
        while (n > 0 && continues(n)) --n;
    for (size_t i = 0; i < n; ++i) {
        const auto c = static_cast<unsigned char>(message[i]);
        error->message[i] = c < 0x20 || c == 0x7F ? ' ' : message[i];
    }
    error->message[n] = '\0';
}

inline refrag_status status_of(Status status) noexcept {
    switch (status) {
        case Status::usage:
            return REFRAG_USAGE;
        case Status::bad_input:
            return REFRAG_BAD_INPUT;
        case Status::out_of_memory:
            return REFRAG_OUT_OF_MEMORY;
        default:  // whatever else fails, fails at run time
            return REFRAG_RUNTIME;
    }
}

// Runs `body`; whatever it throws ends here.
template <typename Body>
refrag_status guarded(refrag_error* error, Body&& body) noexcept {
    refrag_status status = REFRAG_RUNTIME;
    try {
        std::forward<Body>(body)();
        fill_error(error, REFRAG_OK, "");
        return REFRAG_OK;
    } catch (const Cancelled&) {
        status = REFRAG_CANCELLED;
        fill_error(error, status, "stopped by a callback");
    } catch (const Error& e) {
        status = status_of(e.status());
        fill_error(error, status, e.message());
    } catch (const std::bad_alloc&) {
        status = REFRAG_OUT_OF_MEMORY;
        fill_error(error, status, "out of memory");
    } catch (const std::exception& e) {
        fill_error(error, status, e.what());
    } catch (...) {
        fill_error(error, status, "an unknown failure");
    }
    return status;
}

inline void require(const void* pointer, const char* name) {
    REFRAG_CHECK(pointer != nullptr, Status::usage, name, ": expected an address, found NULL");
}

// A text of the caller's; NULL only where it is empty.
inline std::string_view text_of(const char* text, size_t n_bytes, const char* name) {
    if (n_bytes > 0) require(text, name);
    return n_bytes == 0 ? std::string_view() : std::string_view(text, n_bytes);
}

inline std::string or_default(const char* text, const char* fallback) {
    return text == nullptr ? fallback : text;
}

// Sizes of structs grow by whole fields of at most eight bytes, so no size ends within a field.
inline void check_struct_size(size_t size, const char* name) {
    REFRAG_CHECK(size > sizeof(size_t) && size <= size_t{1} << 16 && size % sizeof(size_t) == 0,
                 Status::usage, name, ": expected struct_size to be sizeof(", name, "), found ", size);
}

// Sets the defaults, as far as the caller's version of the struct goes; zeros where it goes further.
template <typename Options>
void give_defaults(Options* out, size_t struct_size, Options defaults) noexcept {
    if (out == nullptr || struct_size < sizeof(size_t)) return;
    defaults.struct_size = struct_size;
    std::memset(out, 0, struct_size);
    std::memcpy(out, &defaults, std::min(struct_size, sizeof defaults));
}

// The caller's options over the defaults: as much as the caller's version of the struct has. What a later
// version has beyond ours must not be set, for nobody here would heed it.
template <typename Options>
Options options_of(const Options* given, const Options& defaults, const char* name) {
    Options options = defaults;
    if (given == nullptr) return options;
    const size_t size = given->struct_size;
    check_struct_size(size, name);
    const char* bytes = reinterpret_cast<const char*>(given);
    for (size_t i = sizeof options; i < size; ++i)
        REFRAG_CHECK(bytes[i] == 0, Status::usage, name, ": expected the ", sizeof options,
                     " bytes that version ", REFRAG_VERSION, " knows, found byte ", i, " set");
    std::memcpy(&options, given, std::min(size, sizeof options));
    options.struct_size = sizeof options;
    return options;
}

// Fills in as much of a report as the caller's version of the struct has; zeros where it goes further.
template <typename Info>
void give_info(Info* out, Info info, const char* name) {
    require(out, name);
    const size_t size = out->struct_size;
    check_struct_size(size, name);
    info.struct_size = size;
    std::memset(out, 0, size);
    std::memcpy(out, &info, std::min(size, sizeof info));
}

// Copies as much as there is room for, and says how much there is.
template <typename Value>
void give_values(const Value* values, size_t n, Value* out, size_t capacity, size_t* n_out, const char* name,
                 const char* n_name) {
    require(n_out, n_name);
    if (capacity > 0) require(out, name);
    if (std::min(n, capacity) > 0) std::memcpy(out, values, std::min(n, capacity) * sizeof(Value));
    *n_out = n;
}

}  // namespace refrag::api

struct refrag_model {
    std::shared_ptr<const refrag::api::Loaded> loaded;
    const refrag::Model& model() const { return *loaded->model; }
};

struct refrag_passage {
    std::shared_ptr<const refrag::api::Loaded> loaded;
    std::shared_ptr<refrag::SharedPassage> passage;
};

struct refrag_request {
    std::shared_ptr<const refrag::api::Loaded> loaded;
    std::vector<refrag::Segment> segments;
};

struct refrag_session {
    refrag_session(std::shared_ptr<const refrag::api::Loaded> model, const refrag::EngineOptions& options)
        : loaded(std::move(model)),
          session(*loaded->model, options),
          backend(loaded->model->device().make_backend()),
          arena(*backend) {}
    std::shared_ptr<const refrag::api::Loaded> loaded;  // outlives the rest
    refrag::Session session;
    std::unique_ptr<refrag::Backend> backend;  // for encoding alone
    refrag::Arena arena;
    std::atomic_flag busy;
};

namespace refrag::api {

// Holds a session for one call. A second one, of another thread or of the first one's callback, is refused.
class InUse {
  public:
    explicit InUse(refrag_session* session) : session_(session) {
        require(session, "session");
        REFRAG_CHECK(!session->busy.test_and_set(std::memory_order_acquire), Status::usage,
                     "session: expected one call at a time, found a second one");
    }
    ~InUse() { session_->busy.clear(std::memory_order_release); }
    InUse(const InUse&) = delete;
    InUse& operator=(const InUse&) = delete;

  private:
    refrag_session* session_;
};

template <typename Handle>
void check_model(const Handle* handle, const std::shared_ptr<const Loaded>& loaded, const char* name,
                 const char* whose) {
    require(handle, name);
    REFRAG_CHECK(handle->loaded == loaded, Status::usage, name, ": expected one of the ", whose,
                 "'s model, found another model's");
}

}  // namespace refrag::api

struct refrag_answer {
    refrag::Answer answer;
};
