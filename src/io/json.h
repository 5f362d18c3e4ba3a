// JSON in and out: the one place that meets the JSON library. A document is parsed once into a flat,
// immutable tree; Json is a cheap handle into it, which keeps the document alive. Stricter than the grammar:
// at most 64 levels, no duplicate keys, valid UTF-8 only, nothing after the value, no number beyond a
// double's range. Every accessor names the file and the key path in its error, and shows a number as it is
// written in the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace refrag {

// An "id" as users write them.
using JsonId = std::variant<int64_t, std::string>;
std::string id_text(const JsonId& id);

class Json {
  public:
    enum class Kind : uint8_t { null, boolean, integer, number, string, array, object };

    static constexpr int64_t max_int = INT64_MAX;
    static constexpr int64_t min_int = INT64_MIN;
    static constexpr double max_number = 1.7976931348623157e308;

    // Parses `text`; `name` (usually the file's path) begins every message. Throws Error(bad_input).
    static Json parse(std::string_view text, const std::string& name);
    // Reads and parses a file of at most max_bytes.
    static Json parse_file(const std::string& path, uint64_t max_bytes = 64u << 20);

    Kind kind() const;
    const char* kind_name() const;  // "an object", "a string", ...
    bool is_null() const { return kind() == Kind::null; }
    bool is_object() const { return kind() == Kind::object; }
    bool is_array() const { return kind() == Kind::array; }
    bool is_string() const { return kind() == Kind::string; }
    bool is_bool() const { return kind() == Kind::boolean; }
    bool is_int() const { return kind() == Kind::integer; }
    // An integer or a number with fraction or exponent.
    bool is_number() const { return kind() == Kind::integer || kind() == Kind::number; }

    // The value itself; each throws where the kind or range is another. Views live as long as any handle
    // into the same document.
    int64_t as_int(int64_t min = min_int, int64_t max = max_int) const;
    double as_number(double min = -max_number, double max = max_number) const;
    std::string_view as_string() const;
    bool as_bool() const;
    const Json& as_object() const;  // *this, checked to be an object
    const Json& as_array() const;

    // Members of an object or elements of an array, in the file's order.
    size_t size() const;
    Json at(size_t index) const;                  // the element, or the member's value
    std::string_view key_at(size_t index) const;  // objects only

    // Objects. A lookup scans the members: for large maps iterate with key_at / at instead.
    bool has(std::string_view key) const;                  // present, null included
    std::optional<Json> find(std::string_view key) const;  // present and not null
    Json get(std::string_view key) const;  // present (null allowed), or an error naming the key

    int64_t get_int(std::string_view key, int64_t min = min_int, int64_t max = max_int) const;
    double get_number(std::string_view key, double min = -max_number, double max = max_number) const;
    std::string get_string(std::string_view key) const;
    bool get_bool(std::string_view key) const;
    Json get_object(std::string_view key) const;
    Json get_array(std::string_view key) const;

    // The same with a value for an absent or null key.
    int64_t get_int_or(std::string_view key, int64_t fallback, int64_t min = min_int,
                       int64_t max = max_int) const;
    double get_number_or(std::string_view key, double fallback, double min = -max_number,
                         double max = max_number) const;
    std::string get_string_or(std::string_view key, std::string_view fallback) const;
    bool get_bool_or(std::string_view key, bool fallback) const;
    // The member "id": a string or a whole number, which may be written 1.0. Empty where absent or null.
    std::optional<JsonId> find_id() const;

    // Strict objects: refuses the first key that is not in `allowed`, naming it and the allowed ones.
    void check_keys(std::initializer_list<std::string_view> allowed) const;
    void check_keys(std::span<const std::string_view> allowed) const;

    // `name: key "a.b[3]"`, or `name` alone for the root: how a message about this value begins.
    std::string where() const;
    // Throws Error(bad_input, where() + ": expected " + expected + ", found " + this value, shortened).
    [[noreturn]] void refuse(std::string_view expected) const;
    // The document's name as given to parse.
    const std::string& name() const;

  private:
    struct Document;
    struct Builder;
    Json(std::shared_ptr<const Document> document, uint32_t node)
        : document_(std::move(document)), node_(node) {}
    std::optional<uint32_t> find_node(std::string_view key) const;
    std::string describe() const;

    std::shared_ptr<const Document> document_;
    uint32_t node_ = 0;
};

// Writes JSON text piece by piece; commas are its business, the nesting is the caller's.
// Invalid UTF-8 in strings becomes U+FFFD; NaN and infinities become null; doubles are written with the
// fewest digits that read back as the same value.
class JsonWriter {
  public:
    // indent: spaces for each level, 0 for one line.
    explicit JsonWriter(int indent = 0) : indent_(indent) {}

    JsonWriter& begin_object();
    JsonWriter& end_object();
    JsonWriter& begin_array();
    JsonWriter& end_array();
    JsonWriter& key(std::string_view name);
    JsonWriter& string(std::string_view value);
    JsonWriter& integer(int64_t value);
    JsonWriter& number(double value);
    JsonWriter& number(float value);  // shortest for a float: 0.1f is written 0.1
    JsonWriter& boolean(bool value);
    JsonWriter& null();

    // The text so far, complete once every begin has its end.
    const std::string& text() const { return out_; }

  private:
    void before_value();
    void new_line();
    JsonWriter& open(char bracket);
    JsonWriter& close(char bracket);

    int indent_;
    std::string out_;
    std::vector<bool> has_members_;  // one entry a level: does it hold something already
    bool after_key_ = false;
};

// "text" with quotes and escapes, as JsonWriter writes it.
std::string json_quote(std::string_view text);

}  // namespace refrag
