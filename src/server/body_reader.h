// A request's JSON object, read field by field: the field that is wrong is named, and a field that nobody
// asked for is refused unless it is known to be harmless.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "io/json.h"
#include "server/api_error.h"

namespace refrag {

class BodyReader {
  public:
    // ApiRefusal unless it is a JSON object.
    explicit BodyReader(std::string_view body);

    // Each: nothing where the field is absent or null. ApiRefusal with the field's name where it is of
    // another kind or beyond its range.
    std::optional<Json> find(std::string_view key);
    std::optional<int64_t> integer(std::string_view key, int64_t min, int64_t max);
    std::optional<double> number(std::string_view key, double min, double max);
    std::optional<bool> boolean(std::string_view key);
    std::optional<std::string> text(std::string_view key);

    // The same for what stands deeper: runs `read`, and what it throws names `key`.
    template <typename Read>
    auto within(std::string_view key, Read&& read) {
        try {
            return std::forward<Read>(read)();
        } catch (const Error& error) {
            refuse_request(std::string(key), error.message());
        }
    }

    // ApiRefusal naming a field that is there and is neither asked for so far nor among these.
    void finish(std::span<const std::string_view> harmless) const;

  private:
    Json json_;
    std::set<std::string, std::less<>> known_;
};

}  // namespace refrag
