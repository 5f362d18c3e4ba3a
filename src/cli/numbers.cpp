// See numbers.h.
#include "cli/numbers.h"

#include <charconv>
#include <cstdio>
#include <optional>
#include <random>
#include <string_view>

#include "base/check.h"
#include "io/file.h"

namespace refrag {
namespace {

template <typename T>
std::optional<T> parse(std::string_view text) {
    if (text.starts_with('+')) text.remove_prefix(1);
    T value{};
    const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || result.ec != std::errc() || result.ptr != text.data() + text.size())
        return std::nullopt;
    return value;
}

std::string refusal(const std::string& expected, const std::string& found) {
    return str("expected ", expected, ", found \"", printable(found, 60), "\"");
}

CLI::Validator number_in(double min, double max, const std::string& range) {
    return CLI::Validator(
        [=](std::string& text) {
            const std::optional<double> value = parse<double>(text);
            if (range.empty()) return value ? std::string() : refusal("a number in decimal", text);
            // False for NaN.
            if (value && *value >= min && *value <= max) return std::string();
            return refusal("a number from " + range, text);
        },
        range);
}

// One that nobody can guess from the time of day.
uint64_t drawn_seed() {
    std::random_device device;
    return static_cast<uint64_t>(device()) << 32 | device();
}

}  // namespace

CLI::Validator whole_number(int64_t min, int64_t max) {
    const bool bounded = max < std::numeric_limits<int32_t>::max();
    const bool below = min > std::numeric_limits<int32_t>::min();
    const std::string range = bounded ? str(min, " to ", max) : below ? str(min, " or more") : "";
    return CLI::Validator(
        [=](std::string& text) {
            const std::optional<int64_t> value = parse<int64_t>(text);
            if (!value || *value < min || *value > max)
                return refusal(str("a whole number from ", min, " to ", max), text);
            text = std::to_string(*value);  // CLI11 takes a leading 0 for octal
            return std::string();
        },
        range);
}

CLI::Validator decimal_number() {
    return number_in(0.0, 0.0, "");
}

CLI::Validator decimal_number(double min, double max) {
    const bool bounded = max < std::numeric_limits<double>::max();
    return number_in(min, max, bounded ? str(min, " to ", max) : str(min, " upwards"));
}

CLI::Option* add_seed_option(CLI::App& app, uint64_t& seed, const std::string& description) {
    const auto read = [](std::string& text) {
        if (text == "-1") {
            text = std::to_string(drawn_seed());
            std::fprintf(stderr, "refrag: seed %s drawn for -s -1\n", text.c_str());
            return std::string();
        }
        const std::optional<uint64_t> value = parse<uint64_t>(text);
        if (!value) return refusal("a whole number from 0 to 18446744073709551615, or -1 to draw one", text);
        text = std::to_string(*value);
        return std::string();
    };
    return app.add_option("-s,--seed", seed, description + "; -1: drawn, and named")
        ->capture_default_str()
        ->transform(CLI::Validator(read, ""))
        ->type_name("N");
}

}  // namespace refrag
