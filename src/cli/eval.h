// The commands of `refrag eval`, one file each, and what they share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/common.h"
#include "refrag/select.h"

namespace CLI {
class App;
}

namespace refrag {

class JsonWriter;

void add_eval_perplexity(CLI::App& eval);
void add_eval_qa(CLI::App& eval);

// What the rows of a table select by, as comma lists, and how prompts are put into words.
struct SelectionFlags {
    std::vector<std::string> policies;     // empty: the model's own
    std::vector<std::string> unexpanded;   // empty: the model's own
    std::vector<double> expand_fractions;  // empty: 0, or a plain decoder's own
    ChatFlags chat;
};

// -p, --policy, --unexpanded, --chat-template, --system.
void add_selection_options(CLI::App& app, SelectionFlags& flags);

// The lists in place. model: null before there is one; then a list that was not given is a model directory's.
// without_question: there is none for bm25 to read, so a plain decoder's own policy is `recent`.
template <typename Options>
void take_selections(const SelectionFlags& flags, const Model* model, bool without_question,
                     Options& options) {
    const bool plain = model != nullptr && !model->has_encoder();
    options.policies = flags.policies.empty() ? std::vector{!plain             ? SelectPolicy::model
                                                            : without_question ? SelectPolicy::recent
                                                                               : model->default_policy()}
                                              : parse_select_policies(flags.policies);
    options.unexpanded.clear();
    for (const std::string& word : flags.unexpanded) options.unexpanded.push_back(parse_unexpanded(word));
    if (flags.unexpanded.empty())
        options.unexpanded.push_back(plain ? model->default_unexpanded() : Unexpanded::compress);
    options.expand_fractions = flags.expand_fractions;
    if (flags.expand_fractions.empty())
        options.expand_fractions.push_back(plain ? model->config().expand_fraction : 0.0);
}

// A row's policy as it stands in tables.
std::optional<std::string> policy_cell(std::optional<SelectPolicy> policy);
std::optional<std::string> unexpanded_cell(std::optional<Unexpanded> unexpanded);

// A member of a JSON object, null where there is no value.
void json_optional(JsonWriter& json, const char* key, std::optional<int64_t> value);
void json_optional(JsonWriter& json, const char* key, std::optional<double> value);
void json_optional(JsonWriter& json, const char* key, const std::optional<std::string>& value);

}  // namespace refrag
