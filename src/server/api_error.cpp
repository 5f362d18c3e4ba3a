// See api_error.h.
#include "server/api_error.h"

#include <new>

#include "io/json.h"
#include "refrag/engine_job.h"

namespace refrag {

ApiError api_error_of(const Error& error) {
    switch (error.status()) {
        case Status::too_long:
            return {400, error.message(), "invalid_request_error", "", "context_length_exceeded"};
        case Status::usage:
        case Status::bad_input:
            return {400, error.message(), "invalid_request_error", "", ""};
        case Status::out_of_memory:
            return {503, error.message(), "server_error", "", "out_of_memory"};
        case Status::unavailable:
            return {502, error.message(), "server_error", "", "decoder_unavailable"};
        case Status::runtime:
            break;
    }
    return {500, error.message(), "server_error", "", ""};
}

ApiError caught_error() noexcept {
    const std::exception_ptr caught = std::current_exception();
    try {
        try {
            std::rethrow_exception(caught);
        } catch (const ApiRefusal& refusal) {
            return refusal.error;
        } catch (...) {
            return api_error_of(error_from(caught));
        }
    } catch (const std::bad_alloc&) {
        // Each short enough for a string that asks for no memory.
        return {503, "out of memory", "server_error", "", "out_of_memory"};
    }
}

std::string error_json(const ApiError& error) {
    JsonWriter json;
    json.begin_object();
    // Cohere's clients read the message here.
    json.key("message").string(error.message);
    json.key("error").begin_object();
    json.key("message").string(error.message);
    json.key("type").string(error.type);
    const auto or_null = [&](const char* key, const std::string& value) {
        json.key(key);
        if (value.empty()) {
            json.null();
        } else {
            json.string(value);
        }
    };
    or_null("param", error.param);
    or_null("code", error.code);
    json.end_object().end_object();
    return json.text();
}

void respond_error(Exchange& exchange, const ApiError& error) {
    HttpHead head{.status = error.status};
    if (error.retry_after_seconds > 0)
        head.headers.emplace_back("Retry-After", std::to_string(error.retry_after_seconds));
    if (error.status == 401) head.headers.emplace_back("WWW-Authenticate", "Bearer");
    exchange.respond(std::move(head), error_json(error));
}

}  // namespace refrag
