// `refrag eval`: measures a model. What is measured is in the files of its subcommands; here is what they
// share.
#include "cli/eval.h"

#include <CLI/CLI.hpp>

#include "cli/common.h"
#include "cli/numbers.h"
#include "io/json.h"

namespace refrag {

void add_eval(CLI::App& app) {
    CLI::App& eval = *app.add_subcommand("eval", "Measures a model");
    eval.require_subcommand(1);
    add_eval_perplexity(eval);
    add_eval_qa(eval);
}

void add_selection_options(CLI::App& app, SelectionFlags& flags) {
    app.add_option("-p,--expand-fraction", flags.expand_fractions,
                   "Comma list of shares of chunks expanded (default: 0; without an encoder 0.25)")
        ->delimiter(',')
        ->transform(decimal_number(0.0, 1.0))
        ->type_name("LIST");
    app.add_option(
           "--policy", flags.policies,
           "Comma list of " + select_policy_names(", ") +
               ": which chunks are expanded (default: model; without an encoder bm25, or recent where there "
               "is no question). None and all overrule -p; at -p 0 the first has the only row. Rows of "
               "further "
               "ones are compared with the first's, pair by pair: mean difference, half width of its 95% "
               "interval")
        ->delimiter(',')
        ->type_name("LIST");
    app.add_option("--unexpanded", flags.unexpanded,
                   "Comma list of compress, drop: what becomes of the other chunks; rows for each (default: "
                   "compress; without an encoder drop)")
        ->delimiter(',')
        ->type_name("LIST");
    add_chat_options(app, flags.chat);
}

std::optional<std::string> unexpanded_cell(std::optional<Unexpanded> unexpanded) {
    if (!unexpanded) return std::nullopt;
    return unexpanded_name(*unexpanded);
}

std::optional<std::string> policy_cell(std::optional<SelectPolicy> policy) {
    if (!policy) return std::nullopt;
    return select_policy_name(*policy);
}

void json_optional(JsonWriter& json, const char* key, std::optional<int64_t> value) {
    json.key(key);
    if (value) {
        json.integer(*value);
    } else {
        json.null();
    }
}

void json_optional(JsonWriter& json, const char* key, std::optional<double> value) {
    json.key(key);
    if (value) {
        json.number(*value);
    } else {
        json.null();
    }
}

void json_optional(JsonWriter& json, const char* key, const std::optional<std::string>& value) {
    json.key(key);
    if (value) {
        json.string(*value);
    } else {
        json.null();
    }
}

}  // namespace refrag
