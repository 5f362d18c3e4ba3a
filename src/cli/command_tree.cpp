// See command_tree.h: the walk over CLI11's tree, and the two commands that print what is made from it.
#include "cli/command_tree.h"

#include <CLI/CLI.hpp>
#include <memory>

#include "cli/common.h"

namespace refrag {
namespace {

CommandOption describe_option(const CLI::Option& option) {
    CommandOption out;
    for (const std::string& name : option.get_snames()) out.names.push_back("-" + name);
    for (const std::string& name : option.get_lnames()) out.names.push_back("--" + name);
    if (out.names.empty()) out.positional = option.get_single_name();
    if (option.get_type_size() != 0) {
        // A validator adds its own words to the type name ("N:INT in [1 - 9]"): they are not for completion.
        const std::string type = option.get_type_name();
        out.value = type.substr(0, type.find(':'));
        out.default_text = option.get_default_str();
    }
    out.environment = option.get_envname();
    out.description = option.get_description();
    out.required = option.get_required();
    out.repeatable = option.get_items_expected_max() > 1;
    return out;
}

Command describe(const CLI::App& app, const std::string& parent) {
    Command out;
    out.name = app.get_name();
    out.path = parent.empty() ? out.name : parent + " " + out.name;
    out.description = app.get_description();
    for (const CLI::Option* option : app.get_options())
        if (!option->get_group().empty()) out.options.push_back(describe_option(*option));
    for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; }))
        if (!sub->get_group().empty()) out.commands.push_back(describe(*sub, out.path));
    return out;
}

}  // namespace

std::vector<std::string> CommandOption::choices() const {
    std::vector<std::string> words;
    if (value.find('|') == std::string::npos) return words;
    size_t begin = 0;
    while (begin <= value.size()) {
        const size_t end = std::min(value.find('|', begin), value.size());
        words.push_back(value.substr(begin, end - begin));
        begin = end + 1;
    }
    return words;
}

Command describe_commands(const CLI::App& app) {
    return describe(app, "");
}

void add_completion(CLI::App& app) {
    const auto shell = std::make_shared<std::string>();
    CLI::App& sub = *app.add_subcommand("completion", "Prints a completion script for a shell");
    sub.add_option("SHELL", *shell, "bash, zsh or fish: source <(refrag completion bash)")
        ->required()
        ->type_name("bash|zsh|fish");
    sub.final_callback([&app, shell] { write_stdout(completion_script(describe_commands(app), *shell)); });
}

void add_manual(CLI::App& app) {
    CLI::App& sub = *app.add_subcommand("man", "Prints the manual page: refrag man | man -l -");
    sub.final_callback([&app] { write_stdout(manual_page(describe_commands(app))); });
}

}  // namespace refrag
