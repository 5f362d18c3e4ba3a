// The commands of `refrag eval`, one file each.
#pragma once

namespace CLI {
class App;
}

namespace refrag {

void add_eval_perplexity(CLI::App& eval);
void add_eval_qa(CLI::App& eval);

}  // namespace refrag
