// The command line described as plain data, read from the same CLI11 tree that parses it, and what is written
// from that description: shell completion and the manual page. Nothing here can drift from --help.
#pragma once

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace refrag {

struct CommandOption {
    std::vector<std::string> names;  // as typed, short ones first: "-m", "--model"; empty for a positional
    std::string positional;          // its name, for a positional
    std::string value;               // "DIR", "N", "auto|cpu|cuda"; empty for a flag
    std::string default_text;        // what --help shows after "=", or empty
    std::string environment;         // variable that stands in for it, or empty
    std::string description;
    bool required = false;
    bool repeatable = false;
    // The words that the value may be; empty where it is free.
    std::vector<std::string> choices() const;
    bool takes_path() const { return value == "FILE" || value == "DIR" || value == "PATH"; }
};

struct Command {
    std::string name;  // one word: "refrag", "run"
    std::string path;  // from the root: "refrag eval perplexity"
    std::string description;
    std::vector<CommandOption> options;
    std::vector<Command> commands;
};

// The tree below `app`; hidden options and commands (those without a group) are left out.
Command describe_commands(const CLI::App& app);

// A completion script for "bash", "zsh" or "fish". Status::usage for another shell.
std::string completion_script(const Command& root, const std::string& shell);

// The manual page refrag(1), in man(7) macros.
std::string manual_page(const Command& root);

}  // namespace refrag
