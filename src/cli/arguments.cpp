// See arguments.h.
#include "cli/arguments.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>

#include "base/check.h"
#include "io/file.h"

namespace refrag {
namespace {

bool is_letter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

// Letters to insert, take out, replace or swap with their neighbour (Damerau and Levenshtein's distance).
size_t edits_between(const std::string& a, const std::string& b) {
    std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
    for (size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
    for (size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t other = a[i - 1] == b[j - 1] ? 0 : 1;
            d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + other});
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
        }
    }
    return d[a.size()][b.size()];
}

// ": did you mean X?" for the nearest of `known`, if one is near.
std::string suggestion(const std::string& found, const std::vector<std::string>& known) {
    if (found.size() > 64) return "";
    size_t least = 3;
    std::string nearest;
    for (const std::string& word : known) {
        const size_t edits = edits_between(found, word);
        if (edits >= least || edits >= word.size()) continue;
        least = edits;
        nearest = word;
    }
    return nearest.empty() ? "" : str(": did you mean ", nearest, "?");
}

std::vector<const CLI::App*> commands_of(const CLI::App& app) {
    return app.get_subcommands([](const CLI::App* sub) { return !sub->get_group().empty(); });
}

std::vector<std::string> command_names(const CLI::App& app) {
    std::vector<std::string> names;
    for (const CLI::App* sub : commands_of(app)) names.push_back(sub->get_name());
    return names;
}

std::vector<std::string> long_options(const CLI::App& app) {
    std::vector<std::string> names;
    for (const CLI::Option* option : app.get_options())
        for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    return names;
}

// By hand: looking an option up by its name ends the process when memory runs out.
const CLI::Option* find_option(const CLI::App& app, const std::string& name, bool is_long) {
    for (const CLI::Option* option : app.get_options()) {
        const auto& names = is_long ? option->get_lnames() : option->get_snames();
        if (std::find(names.begin(), names.end(), name) != names.end()) return option;
    }
    return nullptr;
}

bool takes_value(const CLI::Option* option) {
    return option != nullptr && option->get_items_expected_max() > 0;
}

std::string joined(const std::vector<std::string>& words, const char* between) {
    std::string text;
    for (const std::string& word : words) text += str(text.empty() ? "" : between, word);
    return text;
}

// "eval qa: ", how a message about a command begins; "" for the root.
std::string place_of(const CLI::App& app) {
    std::string path;
    for (const CLI::App* at = &app; at->get_parent() != nullptr; at = at->get_parent())
        path = str(at->get_name(), path.empty() ? "" : " ", path);
    return path.empty() ? path : path + ": ";
}

const CLI::App* find_command(const CLI::App& app, const std::string& name) {
    for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; }))
        if (sub->get_name() == name) return sub;
    return nullptr;
}

// The option's spelling for CLI11. Status::usage for a long option with one dash.
std::string checked_option(const CLI::App& app, const std::string& argument) {
    if (argument.starts_with("--") || argument.size() <= 2 || !is_letter(argument[2])) return argument;
    if (argument == "-np" && find_option(app, "parallel", true) != nullptr) return "--parallel";
    const std::string name = argument.substr(0, argument.find('='));
    const CLI::Option* one_letter = find_option(app, argument.substr(1, 1), false);
    const std::string value = argument.substr(2);
    std::string hint = suggestion("-" + name, long_options(app));
    if (hint.empty() && takes_value(one_letter))
        hint = str(" (-", argument[1], " takes its value after a space: -", argument[1], " ", value, ")");
    fail(Status::usage, place_of(app), "unknown option ", printable(name, 40), hint);
}

}  // namespace

std::vector<std::string> checked_arguments(const CLI::App& root, const std::vector<std::string>& arguments) {
    std::vector<std::string> out;
    const CLI::App* app = &root;
    bool is_value = false;
    bool needs_command = true;
    for (size_t i = 0; i < arguments.size(); ++i) {
        const std::string& argument = arguments[i];
        if (is_value || argument.size() < 2 || argument[0] != '-') {
            out.push_back(argument);
            if (!is_value && !commands_of(*app).empty()) {
                const CLI::App* command = find_command(*app, argument);
                REFRAG_CHECK(command != nullptr, Status::usage, place_of(*app), "unknown command \"",
                             printable(argument, 40), "\"", suggestion(argument, command_names(*app)),
                             " (expected ", joined(command_names(*app), ", "), ")");
                app = command;
            }
            is_value = false;
            continue;
        }
        if (argument == "--") {
            out.insert(out.end(), arguments.begin() + static_cast<std::ptrdiff_t>(i), arguments.end());
            break;
        }
        out.push_back(checked_option(*app, argument));
        const bool is_long = out.back().starts_with("--");
        const std::string name = out.back().substr(is_long ? 2 : 1);
        // --help and --version ask for no command.
        if (name == "help" || name == "h" || name == "version") needs_command = false;
        is_value = takes_value(find_option(*app, name, is_long));
    }
    REFRAG_CHECK(!needs_command || commands_of(*app).empty(), Status::usage, place_of(*app),
                 "expected a command: ", joined(command_names(*app), ", "));
    return out;
}

std::string unexpected_arguments(const CLI::App& root) {
    const CLI::App* app = &root;
    while (!app->get_subcommands().empty()) app = app->get_subcommands().front();
    std::vector<std::string> shown;
    std::string hint;
    for (const std::string& argument : app->remaining()) {
        shown.push_back(printable(argument, 60));
        if (hint.empty() && argument.starts_with("--"))
            hint = suggestion(argument.substr(0, argument.find('=')), long_options(*app));
    }
    return str(place_of(*app), "unexpected argument", shown.size() == 1 ? " " : "s ", joined(shown, " "),
               hint);
}

}  // namespace refrag
