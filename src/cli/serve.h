// `refrag serve`, and the passage store that it may answer from, which is another part of the build.
#pragma once

#include <functional>
#include <string>

#include "cli/store_commands.h"
#include "server/sources.h"

namespace refrag {

struct ServedStore {
    std::string place;  // "": none
    RetrieveFlags retrieve;
};

// A store that is open, before its model is loaded.
struct OpenStore {
    int32_t chunk_len = 0;                          // 0: there is none
    std::function<StoreFinder(const Model&)> open;  // empty: there is none
};

// --store, and how passages are found in it.
void add_served_store_options(CLI::App& app, ServedStore& store);
// Status::usage where this build has no stores and one is asked for.
OpenStore open_served_store(const ServedStore& store);

}  // namespace refrag
