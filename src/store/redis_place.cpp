// How a Redis server is named: see redis_cache.h.
#include <charconv>
#include <optional>
#include <span>

#include "base/check.h"
#include "io/file.h"
#include "store/redis_cache.h"

namespace refrag {
namespace {

// None of it is shown, because any of it may be a part of the password.
[[noreturn]] void fail_place(const char* why) {
    fail(Status::usage,
         "--cache: expected redis://[[user]:password@]host[:port][/database][?ttl=SECONDS] or "
         "unix:///path[?db=N&ttl=SECONDS], found ",
         why);
}

int64_t number_in(std::string_view text, int64_t most, const char* why) {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 0 || value > most)
        fail_place(why);
    return value;
}

std::string decoded(std::string_view text) {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '%') {
            out += text[i];
            continue;
        }
        unsigned byte = 0;
        const std::string_view digits = text.substr(i + 1, 2);
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), byte, 16);
        if (digits.size() != 2 || error != std::errc() || end != digits.data() + 2)
            fail_place("a % that two hexadecimal digits do not follow");
        out += static_cast<char>(byte);
        i += 2;
    }
    return out;
}

constexpr std::string_view kNetwork[] = {"redis://", "valkey://"};
constexpr std::string_view kSockets[] = {"unix://", "redis+unix://", "valkey+unix://"};

bool take(std::string_view& place, std::span<const std::string_view> schemes) {
    for (const std::string_view scheme : schemes) {
        if (!place.starts_with(scheme)) continue;
        place.remove_prefix(scheme.size());
        return true;
    }
    return false;
}

// The part behind the last `mark`, taken away; none where there is no mark.
std::optional<std::string_view> take_behind(std::string_view& text, char mark) {
    const size_t at = text.rfind(mark);
    if (at == std::string_view::npos) return std::nullopt;
    const std::string_view behind = text.substr(at + 1);
    text = text.substr(0, at);
    return behind;
}

void read_options(std::string_view options, RedisPlace& out) {
    while (!options.empty()) {
        const size_t end = std::min(options.find('&'), options.size());
        const std::string_view option = options.substr(0, end);
        options.remove_prefix(std::min(end + 1, options.size()));
        if (option.starts_with("ttl=")) {
            out.ttl_seconds =
                number_in(option.substr(4), int64_t{1} << 32, "a ttl that is no number of seconds");
        } else if (option.starts_with("db=")) {
            out.database = number_in(option.substr(3), 1 << 20, "a database that is no number");
        } else {
            fail_place("an option other than ttl and db");
        }
    }
}

}  // namespace

RedisPlace parse_redis_place(std::string_view place) {
    RedisPlace out;
    std::string_view rest = place;
    const bool is_socket = take(rest, kSockets);
    if (!is_socket && !take(rest, kNetwork))
        fail_place("another scheme (TLS wants a tunnel before the server)");
    // A password may hold what divides the rest; its @ is the last one before the path.
    const size_t path = is_socket ? rest.find('/') : rest.find('/', rest.rfind('@') + 1);
    if (const size_t at = rest.substr(0, path).rfind('@'); at != std::string_view::npos) {
        const std::string_view login = rest.substr(0, at);
        const size_t colon = std::min(login.find(':'), login.size());
        out.user = decoded(login.substr(0, colon));
        if (colon < login.size()) out.password = decoded(login.substr(colon + 1));
        rest.remove_prefix(at + 1);
    }
    if (const auto options = take_behind(rest, '?')) read_options(*options, out);
    if (is_socket) {
        out.socket = decoded(rest);
        if (!out.socket.starts_with('/')) fail_place("no path that begins with /");
        out.name = "unix://" + out.socket + (out.database != 0 ? str("?db=", out.database) : "");
    } else {
        if (const auto database = take_behind(rest, '/'); database && !database->empty())
            out.database = number_in(*database, 1 << 20, "a database that is no number");
        // [::1]:6379 is IPv6.
        const size_t colon = rest.find(':', rest.find(']') == std::string_view::npos ? 0 : rest.find(']'));
        if (colon != std::string_view::npos) {
            out.port = static_cast<int>(number_in(rest.substr(colon + 1), 65535, "a port that is none"));
            rest = rest.substr(0, colon);
        }
        if (rest.starts_with('[') && rest.ends_with(']')) rest = rest.substr(1, rest.size() - 2);
        out.host = decoded(rest);
        if (out.host.empty()) fail_place("no host");
        out.name = str("redis://", out.host, ":", out.port, "/", out.database);
    }
    out.name = printable(out.name);
    return out;
}

}  // namespace refrag
