// refrag(1) in man(7) macros: the commands and options from the tree, and the few things that --help has no
// place for.
#include <string>
#include <string_view>

#include "cli/command_tree.h"

namespace refrag {
namespace {

// Text for troff: backslashes and hyphens escaped, no line that begins with a control character.
std::string roff(std::string_view text) {
    std::string out;
    for (const char c : text) {
        const bool line_start = out.empty() || out.back() == '\n';
        if (line_start && (c == '.' || c == '\'')) out += "\\&";
        if (c == '\\')
            out += "\\e";
        else if (c == '-')
            out += "\\-";
        else
            out += c;
    }
    return out;
}

std::string bold(std::string_view text) {
    return "\\fB" + roff(text) + "\\fR";
}

std::string italic(std::string_view text) {
    return "\\fI" + roff(text) + "\\fR";
}

// ".TP", the option as it is typed, and what it does.
std::string option_entry(const CommandOption& option) {
    std::string tag = option.names.empty() ? italic(option.positional) : "";
    for (const std::string& name : option.names) tag += (tag.empty() ? "" : ", ") + bold(name);
    if (!option.value.empty() && !option.names.empty()) tag += " " + italic(option.value);
    std::string text = roff(option.description);
    if (!text.empty() && text.back() != '.') text += ".";
    if (option.required) text += " Required.";
    if (option.repeatable) text += " May be given several times.";
    if (!option.default_text.empty()) text += " Default: " + roff(option.default_text) + ".";
    if (!option.environment.empty()) text += " Environment: " + roff(option.environment) + ".";
    return ".TP\n" + tag + "\n" + text + "\n";
}

void command_entries(const Command& command, std::string& out) {
    if (command.commands.empty() || command.options.size() > 1) {
        out += ".SS " + roff(command.path) + "\n" + roff(command.description) + ".\n";
        for (const CommandOption& option : command.options)
            if (option.names.empty() || option.names.back() != "--help") out += option_entry(option);
    }
    for (const Command& sub : command.commands) command_entries(sub, out);
}

}  // namespace

std::string manual_page(const Command& root) {
    std::string out =
        ".\\\" Made by `refrag man` from the command line's own description.\n"
        ".TH REFRAG 1 \"\" \"refrag " REFRAG_VERSION
        "\" \"User Commands\"\n"
        ".SH NAME\nrefrag \\- answer questions from retrieved passages, compressed into chunk embeddings\n"
        ".SH SYNOPSIS\n";
    for (const Command& command : root.commands)
        out += ".B refrag " + roff(command.name) + "\n[\\fIoptions\\fR]\n.br\n";
    out +=
        ".SH DESCRIPTION\n"
        "Runs REFRAG (arXiv 2509.01092): passages are cut into chunks of k tokens, an encoder turns every "
        "chunk into\n"
        "one embedding, a policy network chooses which chunks are expanded back to tokens, and a LLaMA "
        "decoder reads\n"
        "the mixture and answers. The answer goes to standard output, progress (on a terminal) and a summary "
        "to\n"
        "standard error.\n.PP\n"
        "Every command has its own \\fB\\-\\-help\\fR.\n"
        ".SH COMMANDS\n";
    for (const Command& command : root.commands) command_entries(command, out);
    out +=
        ".SH EXIT STATUS\n"
        ".TP\n0\nDone.\n.TP\n1\nFailed at run time.\n.TP\n2\nWrong usage.\n.TP\n3\nBad input file.\n"
        ".SH ENVIRONMENT\n"
        ".TP\n.B REFRAG_MODEL\nThe model directory where \\fB\\-m\\fR is not given.\n"
        ".TP\n.B REFRAG_DEVICE\nThe device where \\fB\\-\\-device\\fR is not given.\n"
        ".TP\n.B REFRAG_CPU_INT8\n"
        "How products with 8-bit weights are computed: widen (weights widened to fp32), bf16 (weights and\n"
        "activations rounded to bf16) or vnni (activations rounded to 8 bits, dot products of bytes).\n"
        ".TP\n.B REFRAG_CPU_ISA\n"
        "scalar, avx2, avx512, avx512-bf16 or amx: the instructions to use, instead of the best for this "
        "CPU.\n"
        ".SH EXAMPLES\n"
        ".nf\n"
        "refrag run \\-m MODEL_DIR \\-\\-passages passages.jsonl \\-q \"When was the mill built?\"\n"
        "refrag inspect \\-m MODEL_DIR\n"
        "refrag eval perplexity \\-m MODEL_DIR \\-\\-text book.txt \\-k 8,16\n"
        ".fi\n";
    return out;
}

}  // namespace refrag
