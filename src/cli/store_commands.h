// The commands over a passage store: index, encode, ask, chat. Built where SQLite is there (store_*.cpp);
// else without_store.cpp has commands that say what is missing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace refrag {

struct IndexOptions;
struct RetrieveOptions;

// How passages are found, as the command line says it.
struct RetrieveFlags {
    int64_t top = 8;
    std::string retrieval;  // "": both, or bm25 where there are no vectors
    std::vector<std::string> where;
    std::string embedding;  // a JSON array, or a file with one
};

void add_index(CLI::App& app);
void add_encode(CLI::App& app);
void add_ask(CLI::App& app);
void add_chat(CLI::App& app);

// -k, --passage-tokens, --embeddings: how documents are cut and encoded.
void add_index_options(CLI::App& sub, IndexOptions& index, std::string& form);
// --top, --retrieve, --where, --embedding.
void add_retrieve_options(CLI::App& app, RetrieveFlags& flags);
// Status::usage for words that are none, Status::bad_input for an embedding that is none.
RetrieveOptions retrieve_options(const RetrieveFlags& flags);

}  // namespace refrag
