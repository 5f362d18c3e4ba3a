// Numbers on the command line, read as they are written: in decimal, whole or not at all, within their range.
// (CLI11 alone reads 010 as 8 and 0x10 as 16, and lets -1 wrap around to the largest unsigned number.)
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>
#include <string>

namespace refrag {

// An integer from min to max.
CLI::Validator whole_number(int64_t min, int64_t max);
inline CLI::Validator any_int32() {
    return whole_number(std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max());
}

// A number in decimal, with or without fraction and exponent; nan and inf only where there is no range.
CLI::Validator decimal_number();
CLI::Validator decimal_number(double min, double max);

// By the type of the option's value: any 32-bit integer, or any number.
inline CLI::Validator number_of(int32_t) {
    return any_int32();
}
inline CLI::Validator number_of(int64_t) {
    return whole_number(std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max());
}
inline CLI::Validator number_of(double) {
    return decimal_number();
}
inline CLI::Validator number_of(float) {
    return decimal_number();
}

// -s/--seed: 0 to 2^64 - 1, or -1 to draw one, which is then named on standard error.
CLI::Option* add_seed_option(CLI::App& app, uint64_t& seed, const std::string& description);

}  // namespace refrag
