// JSON files built from fields kept as text, so that a test can put anything anywhere; and checks of a
// number's range that no configuration test writes out again.
#pragma once

#include <cstdint>
#include <fstream>
#include <map>
#include <string>

#include "support.h"

namespace refrag_test {

// Key -> value as JSON text. In changes, "" takes the key away.
using Fields = std::map<std::string, std::string>;

inline Fields with(Fields fields, const Fields& changes) {
    for (const auto& [key, value] : changes) {
        if (value.empty()) {
            fields.erase(key);
        } else {
            fields[key] = value;
        }
    }
    return fields;
}

inline std::string json_of(const Fields& fields) {
    std::string text = "{";
    for (const auto& [key, value] : fields) {
        text += (text.size() == 1 ? "\"" : ", \"") + key + "\": " + value;
    }
    return text + "}";
}

// One JSON file, rewritten again and again in a directory of its own.
class ConfigFile {
  public:
    explicit ConfigFile(std::string name) : name_(std::move(name)) {}
    void write(const Fields& fields) const {
        std::ofstream file(path(), std::ios::trunc);
        file << json_of(fields) << "\n";
        REFRAG_CHECK(file.flush().good(), refrag::Status::runtime, "cannot write ", path());
    }
    const std::string& dir() const { return temp_.path(); }
    std::string path() const { return temp_.file(name_); }
    // How a message about a key begins.
    std::string key(const std::string& name) const { return path() + ": key \"" + name + "\""; }

  private:
    TempDir temp_;
    std::string name_;
};

// `error_of_changes` gives the message of loading with changed fields. `key` may be a path ("policy.dim") of
// which the last part is the field's name. `also` are changes that make room for the range's ends.
template <typename Error>
void check_integer_range(const ConfigFile& file, const std::string& key, int64_t min, int64_t max,
                         Error&& error_of_changes, const Fields& also = {}) {
    const std::string field = key.substr(key.rfind('.') + 1);
    const auto message = [&](int64_t value) {
        return error_of_changes(with(also, {{field, std::to_string(value)}}));
    };
    for (const int64_t inside : {min, max}) {
        CHECK_MESSAGE(message(inside) == "(no error)", key << " = " << inside << ": " << message(inside));
    }
    for (const int64_t outside : {min - 1, max + 1}) {
        const std::string text = message(outside);
        const bool named = contains(text, file.key(key) + ": expected") &&
                           contains(text, "found " + std::to_string(outside));
        CHECK_MESSAGE(named, key << " = " << outside << ": " << text);
    }
}

// Four values: below the range, its two ends, above it.
template <typename Error>
void check_number_range(const ConfigFile& file, const std::string& key, const std::string (&values)[4],
                        Error&& error_of_changes) {
    const std::string field = key.substr(key.rfind('.') + 1);
    for (size_t i = 0; i < 4; ++i) {
        const std::string text = error_of_changes(Fields{{field, values[i]}});
        const bool inside = i == 1 || i == 2;
        const bool right =
            inside ? text == "(no error)" : contains(text, file.key(key) + ": expected a number");
        CHECK_MESSAGE(right, key << " = " << values[i] << ": " << text);
    }
}

}  // namespace refrag_test
