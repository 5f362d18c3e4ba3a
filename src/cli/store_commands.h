// The commands over a passage store: index, encode, ask, chat. Built where SQLite is there (store_*.cpp);
// else without_store.cpp has commands that say what is missing.
#pragma once

#include <string>

namespace CLI {
class App;
}

namespace refrag {

struct IndexOptions;

void add_index(CLI::App& app);
void add_encode(CLI::App& app);
void add_ask(CLI::App& app);

// -k, --passage-tokens, --embeddings: how documents are cut and encoded.
void add_index_options(CLI::App& app, IndexOptions& index, std::string& form);

}  // namespace refrag
