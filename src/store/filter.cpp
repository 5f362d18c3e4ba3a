// See filter.h.
#include "store/filter.h"

#include <charconv>
#include <cmath>

#include "base/check.h"
#include "io/file.h"

namespace refrag {
namespace {

constexpr std::string_view kOperators = "=!<>";

std::string_view trimmed(std::string_view text) {
    while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
    while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
    return text;
}

FilterOp parse_op(std::string_view word, std::string_view text) {
    if (word == "=" || word == "==") return FilterOp::equal;
    if (word == "!=") return FilterOp::not_equal;
    if (word == "<") return FilterOp::less;
    if (word == "<=") return FilterOp::less_equal;
    if (word == ">") return FilterOp::greater;
    if (word == ">=") return FilterOp::greater_equal;
    fail(Status::usage, "--where ", printable(text, 60), ": expected =, !=, <, <=, > or >=, found \"", word,
         "\"");
}

}  // namespace

const char* filter_op_sql(FilterOp op) {
    switch (op) {
        case FilterOp::equal:
            return "=";
        case FilterOp::not_equal:
            return "<>";
        case FilterOp::less:
            return "<";
        case FilterOp::less_equal:
            return "<=";
        case FilterOp::greater:
            return ">";
        case FilterOp::greater_equal:
            return ">=";
    }
    return "=";
}

Condition parse_condition(std::string_view text) {
    const size_t at = text.find_first_of(kOperators);
    REFRAG_CHECK(at != std::string_view::npos, Status::usage, "--where ", printable(text, 60),
                 ": expected KEY OP VALUE (year>=2020)");
    const size_t end = std::min(text.find_first_not_of(kOperators, at), text.size());
    Condition condition;
    condition.op = parse_op(text.substr(at, end - at), text);
    std::string_view key = trimmed(text.substr(0, at));
    while (true) {
        const size_t dot = std::min(key.find('.'), key.size());
        const std::string_view name = key.substr(0, dot);
        REFRAG_CHECK(!name.empty() && name.find('"') == std::string_view::npos, Status::usage, "--where ",
                     printable(text, 60), ": expected a key, or keys joined by dots, before the operator");
        condition.key.emplace_back(name);
        if (dot == key.size()) break;
        key.remove_prefix(dot + 1);
    }
    const std::string_view value = trimmed(text.substr(end));
    double number = 0;
    const auto [stop, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (value.size() >= 2 && value.front() == '"' && value.back() == '"') {
        condition.value = std::string(value.substr(1, value.size() - 2));
    } else if (value == "true" || value == "false") {
        condition.value = value == "true";
    } else if (value == "null") {
        condition.value = nullptr;
    } else if (error == std::errc() && stop == value.data() + value.size() && std::isfinite(number)) {
        condition.value = number;
    } else {
        condition.value = std::string(value);
    }
    const bool ordered = condition.op != FilterOp::equal && condition.op != FilterOp::not_equal;
    const bool has_order = std::holds_alternative<double>(condition.value) ||
                           std::holds_alternative<std::string>(condition.value);
    REFRAG_CHECK(!ordered || has_order, Status::usage, "--where ", printable(text, 60),
                 ": expected a number or a text to compare with, found ", value);
    return condition;
}

}  // namespace refrag
