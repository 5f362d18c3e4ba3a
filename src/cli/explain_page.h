// One page that shows how answers came about: markup, style and script in this binary, the data as JSON
// beside them. It asks for nothing from anywhere: its policy forbids that, and any script but its own.
#pragma once

#include <string>
#include <string_view>

namespace refrag {

// Whether a file of this name is to be a page: it ends in .html or .htm, in capitals or not.
bool is_page_path(std::string_view path);

// `data`: a JSON object as explain_data() makes it. Its strings may hold anything.
std::string explain_page(std::string_view data);

}  // namespace refrag
