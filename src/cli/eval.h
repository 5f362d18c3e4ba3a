// The commands of `refrag eval`, one file each, and what they share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "refrag/select.h"

namespace CLI {
class App;
}

namespace refrag {

class JsonWriter;

void add_eval_perplexity(CLI::App& eval);
void add_eval_qa(CLI::App& eval);

// --policy as a comma list; the caller parses the words.
void add_policy_list_option(CLI::App& app, std::vector<std::string>& policies);

// A row's policy as it stands in tables.
std::optional<std::string> policy_cell(std::optional<SelectPolicy> policy);

// A member of a JSON object, null where there is no value.
void json_optional(JsonWriter& json, const char* key, std::optional<int64_t> value);
void json_optional(JsonWriter& json, const char* key, std::optional<double> value);
void json_optional(JsonWriter& json, const char* key, const std::optional<std::string>& value);

}  // namespace refrag
