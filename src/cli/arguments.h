// A look at the command line before CLI11 parses it: what CLI11 would take for something else is refused in
// true words, and the one alias of two letters is spelled out.
#pragma once

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace refrag {

// The arguments for CLI11, in their order. Where an option's name stands, -np becomes --parallel; an option's
// value is let be, whatever it looks like. Status::usage for a command that is missing or unknown, naming
// those there are and the nearest, and for a long option with one dash ("-ngl 99", which CLI11 reads as -n
// with the value "gl").
std::vector<std::string> checked_arguments(const CLI::App& root, const std::vector<std::string>& arguments);

// "unexpected argument --tmep: did you mean --temp?", for what CLI11 found no place for.
std::string unexpected_arguments(const CLI::App& root);

}  // namespace refrag
