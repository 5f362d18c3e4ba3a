// What stands behind the handles of refrag.h, and the border at which exceptions become a status and a
// message.
#pragma once

#include <algorithm>
#include <cstddef>
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
#include "refrag/engine.h"
#include "refrag/model.h"
#include "refrag/passage.h"
#include "refrag/segment.h"

namespace refrag::api {

// A model with the device that it lies on.
struct Loaded {
    std::unique_ptr<Device> device;
    std::unique_ptr<Model> model;
};

// Thrown where a callback asks to stop.
struct Cancelled {};

inline void fill_error(refrag_error* error, refrag_status status, std::string_view message) noexcept {
    constexpr size_t at = offsetof(refrag_error, message);
    if (error == nullptr || error->struct_size <= at) return;
    error->status = status;
    const size_t n = std::min({message.size(), error->struct_size - at - 1, sizeof error->message - 1});
    std::memcpy(error->message, message.data(), n);
    error->message[n] = '\0';
}

inline refrag_status status_of(Status status) noexcept {
    switch (status) {
        case Status::runtime:
            return REFRAG_RUNTIME;
        case Status::usage:
            return REFRAG_USAGE;
        case Status::bad_input:
            return REFRAG_BAD_INPUT;
        case Status::out_of_memory:
            return REFRAG_OUT_OF_MEMORY;
    }
    return REFRAG_RUNTIME;
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

// The caller's options over the defaults: as much as the caller's version of the struct has.
template <typename Options>
Options options_of(const Options* given, void (*init)(Options*), const char* name) {
    Options options;
    init(&options);
    if (given == nullptr) return options;
    REFRAG_CHECK(given->struct_size > sizeof(size_t) && given->struct_size <= size_t{1} << 16, Status::usage,
                 name, ": expected struct_size as ", name, "_init sets it, found ", given->struct_size);
    std::memcpy(&options, given, std::min(given->struct_size, sizeof options));
    options.struct_size = sizeof options;
    return options;
}

// Fills in as much of a report as the caller's version of the struct has.
template <typename Info>
void give_info(Info* out, Info info, const char* name) {
    require(out, name);
    const size_t size = out->struct_size;
    REFRAG_CHECK(size > sizeof(size_t) && size <= size_t{1} << 16, Status::usage, name,
                 ": expected struct_size to be set, found ", size);
    info.struct_size = size;
    std::memcpy(out, &info, std::min(size, sizeof info));
}

// Copies as much as there is room for, and says how much there is.
template <typename Value>
void give_values(const Value* values, size_t n, Value* out, size_t capacity, size_t* n_out,
                 const char* name) {
    require(n_out, name);
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
          engine(*loaded->model, options),
          backend(loaded->model->device().make_backend()),
          arena(*backend) {}
    std::shared_ptr<const refrag::api::Loaded> loaded;  // outlives the rest
    refrag::Engine engine;
    std::unique_ptr<refrag::Backend> backend;  // for encoding alone
    refrag::Arena arena;
};

struct refrag_answer {
    refrag::Answer answer;
};
