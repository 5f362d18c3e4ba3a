// See postgres_filter.h.
#include "store/postgres_filter.h"

#include <array>
#include <charconv>

#include "base/utf8.h"

namespace refrag {
namespace {

// As the server takes a text: what is no UTF-8, and a zero byte, becomes U+FFFD.
std::string clean_text(std::string_view text) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
        const Utf8Step step = decode_utf8(text, at);
        append_utf8(out, step.code == 0 ? replacement_character : step.code);
        at += step.bytes;
    }
    return out;
}

std::string shortest(double value) {
    std::array<char, 40> digits{};
    const auto [end, error] = std::to_chars(digits.data(), digits.data() + digits.size(), value);
    return {digits.data(), error == std::errc() ? end : digits.data()};
}

// Names are looked up one by one: in a path (#>) a name of digits would mean an array's element too.
std::string field_of(const Condition& condition, PostgresParameters& parameters) {
    std::string field = "(d.fields";
    for (const std::string& name : condition.key) field += " -> " + parameters.add_text(clean_text(name));
    return field + ")";
}

// True, or false, or (of a missing key) null.
std::string compares(const Condition& condition, const char* op, PostgresParameters& parameters) {
    const std::string field = field_of(condition, parameters);
    if (const auto* text = std::get_if<std::string>(&condition.value)) {
        return str("(jsonb_typeof(", field, ") = 'string' AND (", field, " #>> '{}') COLLATE \"C\" ", op, " ",
                   parameters.add_text(clean_text(*text)), ")");
    }
    const auto* truth = std::get_if<bool>(&condition.value);
    const double number = truth != nullptr ? static_cast<double>(*truth) : std::get<double>(condition.value);
    const std::string value = parameters.add_text(shortest(number)) + "::numeric";
    // CASE, so that nothing but a number is read as one.
    return str("(CASE jsonb_typeof(", field, ") WHEN 'number' THEN (", field, " #>> '{}')::numeric ", op, " ",
               value, " WHEN 'boolean' THEN (CASE WHEN ", field, " = 'true' THEN 1 ELSE 0 END) ", op, " ",
               value, " ELSE false END)");
}

}  // namespace

std::string postgres_filter(const Filter& filter, PostgresParameters& parameters) {
    std::string sql;
    for (const Condition& condition : filter) {
        const bool is_not = condition.op == FilterOp::not_equal;
        sql += is_not ? " AND NOT " : " AND ";
        if (std::holds_alternative<std::nullptr_t>(condition.value)) {
            sql += "(coalesce(" + field_of(condition, parameters) + ", 'null') = 'null')";
        } else {
            const char* op = is_not ? "=" : filter_op_sql(condition.op);
            sql += "coalesce(" + compares(condition, op, parameters) + ", false)";
        }
    }
    return sql;
}

std::string postgres_fields(std::string_view metadata) {
    std::string out = clean_text(metadata);
    for (size_t at = 0; (at = out.find('\\', at)) != std::string::npos; at += 2)
        if (out.compare(at, 6, "\\u0000") == 0) out.replace(at, 6, "\\ufffd");
    return out;
}

}  // namespace refrag
