// --cache and what goes with it: passages that stay encoded after the process.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "refrag/passage_cache.h"

namespace CLI {
class App;
}

namespace refrag {

struct CacheOptions {
    std::string place;          // "": none
    std::string form = "bf16";  // how embeddings are kept
    int64_t size_mib = 4096;
};

void add_cache_options(CLI::App& app, CacheOptions& options);

// Opens the cache, if one is asked for; null where none is. Status::usage for a form that is none, and where
// this binary was built without SQLite.
std::shared_ptr<PassageKeeper> open_cache(const CacheOptions& options);

// Status::usage where this binary was built without SQLite; `what` wants it.
void require_store(const char* what);

}  // namespace refrag
