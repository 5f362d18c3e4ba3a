// Conditions on documents' metadata, as `--where` has them: KEY OP VALUE, all of which must hold.
//
//   lang=en   year>=2020   section.name!=Annex   score<0.5   title=War and Peace
//
// KEY is a name, or names joined by dots for objects within objects. OP is one of = != < <= > >=. VALUE is a
// number where it reads as one, true, false, null, or text; in double quotes it is text. A document without
// the key fulfils != alone.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace refrag {

enum class FilterOp { equal, not_equal, less, less_equal, greater, greater_equal };

const char* filter_op_sql(FilterOp op);

struct Condition {
    std::vector<std::string> key;
    FilterOp op = FilterOp::equal;
    std::variant<std::nullptr_t, bool, double, std::string> value;
};

using Filter = std::vector<Condition>;

// Status::usage naming what is wrong.
Condition parse_condition(std::string_view text);

}  // namespace refrag
