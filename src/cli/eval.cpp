// `refrag eval`: measures a model. What is measured is in the files of its subcommands.
#include "cli/eval.h"

#include <CLI/CLI.hpp>

#include "cli/common.h"

namespace refrag {

void add_eval(CLI::App& app) {
    CLI::App& eval = *app.add_subcommand("eval", "Measures a model");
    eval.require_subcommand(1);
    add_eval_perplexity(eval);
    add_eval_qa(eval);
}

}  // namespace refrag
