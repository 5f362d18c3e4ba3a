// See body_reader.h.
#include "server/body_reader.h"

#include <algorithm>

#include "io/file.h"

namespace refrag {
namespace {

Json parse_body(std::string_view body) {
    try {
        const Json json = Json::parse(body, "the body");
        return json.as_object();
    } catch (const Error& error) {
        refuse_request("", error.message());
    }
}

}  // namespace

BodyReader::BodyReader(std::string_view body) : json_(parse_body(body)) {}

std::optional<Json> BodyReader::find(std::string_view key) {
    known_.emplace(key);
    return json_.find(key);
}

std::optional<int64_t> BodyReader::integer(std::string_view key, int64_t min, int64_t max) {
    const std::optional<Json> value = find(key);
    if (!value) return std::nullopt;
    return within(key, [&] {
        // Clients in JavaScript and Python send 16.0 as well.
        if (value->kind() == Json::Kind::number) {
            const double number = value->as_number();
            if (number >= -9e15 && number <= 9e15) {
                const auto whole = static_cast<int64_t>(number);
                if (number == static_cast<double>(whole) && whole >= min && whole <= max) return whole;
            }
        }
        return value->as_int(min, max);
    });
}

std::optional<double> BodyReader::number(std::string_view key, double min, double max) {
    const std::optional<Json> value = find(key);
    if (!value) return std::nullopt;
    return within(key, [&] { return value->as_number(min, max); });
}

std::optional<bool> BodyReader::boolean(std::string_view key) {
    const std::optional<Json> value = find(key);
    if (!value) return std::nullopt;
    return within(key, [&] { return value->as_bool(); });
}

std::optional<std::string> BodyReader::text(std::string_view key) {
    const std::optional<Json> value = find(key);
    if (!value) return std::nullopt;
    return within(key, [&] { return std::string(value->as_string()); });
}

void BodyReader::finish(std::span<const std::string_view> harmless) const {
    for (size_t i = 0; i < json_.size(); ++i) {
        const std::string_view key = json_.key_at(i);
        if (known_.contains(key) || json_.at(i).is_null()) continue;
        if (std::find(harmless.begin(), harmless.end(), key) != harmless.end()) continue;
        refuse_request(std::string(key), "\"", printable(std::string(key), 60),
                       "\" is not supported by this server");
    }
}

}  // namespace refrag
