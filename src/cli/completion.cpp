// Completion scripts. Each shell gets the whole tree as data in its own syntax, so that completing runs no
// refrag.
#include <string>
#include <vector>

#include "base/check.h"
#include "cli/command_tree.h"

namespace refrag {
namespace {

std::string join(const std::vector<std::string>& words, const char* between) {
    std::string out;
    for (const std::string& word : words) out += (out.empty() ? "" : between) + word;
    return out;
}

// 'text' for a shell, quotes in it included.
std::string quoted(const std::string& text) {
    std::string out = "'";
    for (const char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return out + "'";
}

std::string first_line(const std::string& text) {
    return text.substr(0, text.find('\n'));
}

// ---- bash -----------------------------------------------------------------------------------------------

// One line a command and one a value for the two case statements below.
void bash_cases(const Command& command, std::string& descend, std::string& values, std::string& words) {
    std::vector<std::string> known;
    for (const Command& sub : command.commands) known.push_back(sub.name);
    for (const CommandOption& option : command.options) {
        known.insert(known.end(), option.names.begin(), option.names.end());
        const std::vector<std::string> choices = option.choices();
        if (option.names.empty()) known.insert(known.end(), choices.begin(), choices.end());
        if (option.names.empty() || option.value.empty()) continue;
        std::vector<std::string> patterns;
        for (const std::string& name : option.names) patterns.push_back(quoted(command.path + " " + name));
        values += "        " + join(patterns, "|") + ") ";
        if (option.takes_path())
            values += option.value.starts_with("DIR") ? "kind=directory" : "kind=file";
        else
            values += "kind=words words=" + quoted(join(choices, " "));
        values += " ;;\n";
    }
    words += "        " + quoted(command.path) + ") words=" + quoted(join(known, " ")) + " ;;\n";
    for (const Command& sub : command.commands) {
        descend +=
            "            " + quoted(command.path + " " + sub.name) + ") path=" + quoted(sub.path) + " ;;\n";
        bash_cases(sub, descend, values, words);
    }
}

std::string bash_script(const Command& root) {
    std::string descend;
    std::string values;
    std::string words;
    bash_cases(root, descend, values, words);
    return "# bash completion for " + root.name + "; made by `" + root.name +
           " completion bash`.\n"
           "_" +
           root.name +
           "() {\n"
           "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}\n"
           "    local path=" +
           quoted(root.name) +
           " kind='' words='' i\n"
           "    # \"--option=value\" arrives as three words.\n"
           "    if [[ $current == '=' ]]; then current=''; fi\n"
           "    if [[ $previous == '=' && $COMP_CWORD -ge 2 ]]; then previous=${COMP_WORDS[COMP_CWORD-2]}; "
           "fi\n"
           "    for ((i = 1; i < COMP_CWORD; i++)); do\n"
           "        case \"$path ${COMP_WORDS[i]}\" in\n" +
           descend +
           "        esac\n"
           "    done\n"
           "    case \"$path $previous\" in\n" +
           values +
           "    esac\n"
           "    if [[ -z $kind ]]; then\n"
           "        kind=words\n"
           "        case \"$path\" in\n" +
           words +
           "        esac\n"
           "    fi\n"
           "    COMPREPLY=()\n"
           "    case $kind in\n"
           "        words) mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$current\") ;;\n"
           "        file) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- \"$current\") ;;\n"
           "        directory) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- \"$current\") "
           ";;\n"
           "    esac\n"
           "}\n"
           "complete -F _" +
           root.name + " " + root.name + "\n";
}

// ---- zsh ------------------------------------------------------------------------------------------------

// Text inside an _arguments specification: brackets and colons have meaning there.
std::string zsh_text(const std::string& text) {
    std::string out;
    for (const char c : first_line(text)) {
        if (c == '[' || c == ']' || c == ':' || c == '\\') out += '\\';
        out += c;
    }
    return out;
}

std::string zsh_action(const CommandOption& option) {
    if (option.value.starts_with("DIR")) return "_files -/";
    if (option.takes_path()) return "_files";
    const std::vector<std::string> choices = option.choices();
    return choices.empty() ? " " : "(" + join(choices, " ") + ")";
}

std::string zsh_function(const Command& command) {
    std::string name = "_" + command.path;
    for (char& c : name) c = c == ' ' ? '_' : c;
    std::string out = name + "() {\n";
    if (!command.commands.empty())
        out += "    local line state curcontext=$curcontext\n    local -a commands\n";
    out += "    _arguments -s -S" + std::string(command.commands.empty() ? "" : " -C");
    for (const CommandOption& option : command.options) {
        out += " \\\n        ";
        if (option.names.empty()) {
            out += quoted((option.required ? ":" : "::") + option.positional + ":" + zsh_action(option));
            continue;
        }
        const std::string tail =
            "[" + zsh_text(option.description) + "]" +
            (option.value.empty() ? "" : ":" + zsh_text(option.value) + ":" + zsh_action(option));
        const std::string exclusive = option.repeatable ? "*" : "(" + join(option.names, " ") + ")";
        out += option.names.size() == 1
                   ? quoted((option.repeatable ? "*" : "") + option.names[0] + tail)
                   : quoted(exclusive) + "{" + join(option.names, ",") + "}" + quoted(tail);
    }
    if (command.commands.empty()) return out + "\n}\n";
    out +=
        " \\\n        '1:command:->command' '*::argument:->argument'\n    case $state in\n        command)\n"
        "            commands=(\n";
    for (const Command& sub : command.commands)
        out += "                " + quoted(sub.name + ":" + zsh_text(sub.description)) + "\n";
    out +=
        "            )\n            _describe command commands ;;\n        argument)\n            case "
        "$line[1] in\n";
    for (const Command& sub : command.commands)
        out += "                " + sub.name + ") " + name + "_" + sub.name + " ;;\n";
    out += "            esac ;;\n    esac\n}\n";
    for (const Command& sub : command.commands) out += zsh_function(sub);
    return out;
}

std::string zsh_script(const Command& root) {
    // Autoloaded from a folder of $fpath the file is the function's body; sourced, it defines and registers.
    return "#compdef " + root.name + "\n# zsh completion for " + root.name + "; made by `" + root.name +
           " completion zsh`.\n" + zsh_function(root) + "if [[ $funcstack[1] == _" + root.name +
           " ]]; then\n    _" + root.name + " \"$@\"\nelse\n    compdef _" + root.name + " " + root.name +
           "\nfi\n";
}

// ---- fish -----------------------------------------------------------------------------------------------

void fish_lines(const Command& command, const std::string& seen, const std::string& program,
                std::string& out) {
    std::string none_of_the_subcommands;
    for (const Command& sub : command.commands) none_of_the_subcommands += " " + sub.name;
    const std::string here =
        seen + (command.commands.empty() ? ""
                                         : (seen.empty() ? "not __fish_seen_subcommand_from"
                                                         : "; and not __fish_seen_subcommand_from") +
                                               none_of_the_subcommands);
    const std::string begin = "complete -c " + program + " -n " + quoted(here);
    for (const Command& sub : command.commands)
        out += begin + " -f -a " + quoted(sub.name) + " -d " + quoted(first_line(sub.description)) + "\n";
    for (const CommandOption& option : command.options) {
        std::string line = begin;
        for (const std::string& name : option.names)
            line += name.starts_with("--") ? " -l " + name.substr(2) : " -s " + name.substr(1);
        if (!option.value.empty() && !option.names.empty()) line += option.takes_path() ? " -r -F" : " -x";
        const std::vector<std::string> choices = option.choices();
        if (!choices.empty()) line += " -a " + quoted(join(choices, " "));
        out += line + " -d " + quoted(first_line(option.description)) + "\n";
    }
    for (const Command& sub : command.commands)
        fish_lines(sub, seen + (seen.empty() ? "" : "; and ") + "__fish_seen_subcommand_from " + sub.name,
                   program, out);
}

std::string fish_script(const Command& root) {
    std::string out = "# fish completion for " + root.name + "; made by `" + root.name +
                      " completion fish`.\ncomplete -c " + root.name + " -f\n";
    fish_lines(root, "", root.name, out);
    return out;
}

}  // namespace

std::string completion_script(const Command& root, const std::string& shell) {
    if (shell == "bash") return bash_script(root);
    if (shell == "zsh") return zsh_script(root);
    if (shell == "fish") return fish_script(root);
    fail(Status::usage, "completion: expected bash, zsh or fish, found \"", shell, "\"");
}

}  // namespace refrag
