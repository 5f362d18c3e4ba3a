// A refusal in the form of OpenAI's API: {"error": {"message", "type", "param", "code"}}, and its status.
#pragma once

#include <exception>
#include <string>

#include "base/check.h"
#include "server/exchange.h"

namespace refrag {

struct ApiError {
    int status = 500;
    std::string message;
    std::string type;             // "invalid_request_error", ...
    std::string param;            // the field; "": null
    std::string code;             // "": null
    int retry_after_seconds = 0;  // 0: not said
};

// What is thrown while a request is read.
class ApiRefusal : public std::exception {
  public:
    explicit ApiRefusal(ApiError from) : error(std::move(from)) {}
    const char* what() const noexcept override { return error.message.c_str(); }
    ApiError error;
};

template <typename... Args>
[[noreturn]] void refuse_request(const std::string& param, const Args&... message) {
    throw ApiRefusal({400, str(message...), "invalid_request_error", param, ""});
}

// What became of a request that failed: 400 where it asked for what cannot be done, 502 where a
// decoder elsewhere failed, 500 where we did.
ApiError api_error_of(const Error& error);

// The same of what is being caught, whatever it is.
ApiError caught_error() noexcept;

std::string error_json(const ApiError& error);
void respond_error(Exchange& exchange, const ApiError& error);

}  // namespace refrag
