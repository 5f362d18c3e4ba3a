// The writing half of io/json.h: text goes out as it is appended; only the nesting's commas are remembered.
#include <charconv>
#include <cmath>

#include "base/check.h"
#include "base/utf8.h"
#include "io/json.h"

namespace refrag {

namespace {

void append_quoted(std::string& out, std::string_view text) {
    static constexpr char digits[] = "0123456789abcdef";
    out.push_back('"');
    size_t at = 0;
    while (at < text.size()) {
        const Utf8Step step = decode_utf8(text, at);
        if (step.code == '"' || step.code == '\\') {
            out.push_back('\\');
            out.push_back(static_cast<char>(step.code));
        } else if (step.code == '\n') {
            out += "\\n";
        } else if (step.code == '\t') {
            out += "\\t";
        } else if (step.code == '\r') {
            out += "\\r";
        } else if (step.code < 0x20 || step.code == 0x7F) {
            out += "\\u00";
            out.push_back(digits[step.code >> 4]);
            out.push_back(digits[step.code & 15]);
        } else {
            append_utf8(out, step.code);
        }
        at += step.bytes;
    }
    out.push_back('"');
}

template <typename T>
void append_number(std::string& out, T value) {
    if (!std::isfinite(value)) {
        out += "null";
        return;
    }
    char buffer[40];
    const auto result = std::to_chars(buffer, buffer + sizeof buffer, value);
    out.append(buffer, result.ptr);
}

}  // namespace

std::string json_quote(std::string_view text) {
    std::string out;
    append_quoted(out, text);
    return out;
}

void JsonWriter::new_line() {
    if (indent_ == 0) return;
    out_.push_back('\n');
    out_.append(has_members_.size() * static_cast<size_t>(indent_), ' ');
}

void JsonWriter::before_value() {
    if (after_key_) {
        after_key_ = false;
        return;
    }
    if (has_members_.empty()) return;
    if (has_members_.back()) out_ += indent_ == 0 ? ", " : ",";
    has_members_.back() = true;
    new_line();
}

JsonWriter& JsonWriter::open(char bracket) {
    before_value();
    out_.push_back(bracket);
    has_members_.push_back(false);
    return *this;
}

JsonWriter& JsonWriter::close(char bracket) {
    REFRAG_DCHECK(!has_members_.empty() && !after_key_);
    const bool members = has_members_.back();
    has_members_.pop_back();
    if (members) new_line();
    out_.push_back(bracket);
    return *this;
}

JsonWriter& JsonWriter::begin_object() {
    return open('{');
}
JsonWriter& JsonWriter::end_object() {
    return close('}');
}
JsonWriter& JsonWriter::begin_array() {
    return open('[');
}
JsonWriter& JsonWriter::end_array() {
    return close(']');
}

JsonWriter& JsonWriter::key(std::string_view name) {
    before_value();
    append_quoted(out_, name);
    out_ += ": ";
    after_key_ = true;
    return *this;
}

JsonWriter& JsonWriter::string(std::string_view value) {
    before_value();
    append_quoted(out_, value);
    return *this;
}

JsonWriter& JsonWriter::integer(int64_t value) {
    before_value();
    out_ += std::to_string(value);
    return *this;
}

JsonWriter& JsonWriter::number(double value) {
    before_value();
    append_number(out_, value);
    return *this;
}

JsonWriter& JsonWriter::number(float value) {
    before_value();
    append_number(out_, value);
    return *this;
}

JsonWriter& JsonWriter::boolean(bool value) {
    before_value();
    out_ += value ? "true" : "false";
    return *this;
}

JsonWriter& JsonWriter::null() {
    before_value();
    out_ += "null";
    return *this;
}

}  // namespace refrag
