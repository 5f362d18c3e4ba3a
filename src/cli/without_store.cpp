// What stands for the commands over a passage store in a build without SQLite.
#include <CLI/CLI.hpp>

#include "base/check.h"
#include "cli/cache_options.h"
#include "cli/serve.h"

namespace refrag {
namespace {

void add_missing(CLI::App& app, const char* name) {
    CLI::App& sub = *app.add_subcommand(name, "Not in this build: it wants SQLite (libsqlite3-dev)");
    sub.allow_extras();
    sub.final_callback([name] { require_store(name); });
}

}  // namespace

void add_index(CLI::App& app) {
    add_missing(app, "index");
}
void add_encode(CLI::App& app) {
    add_missing(app, "encode");
}
void add_ask(CLI::App& app) {
    add_missing(app, "ask");
}
void add_chat(CLI::App& app) {
    add_missing(app, "chat");
}

void add_served_store_options(CLI::App& app, ServedStore& store) {
    app.add_option("--store", store.place, "Not in this build: it wants SQLite (libsqlite3-dev)")
        ->type_name("STORE");
}
OpenStore open_served_store(const ServedStore& store) {
    if (!store.place.empty()) require_store("--store");
    return {};
}

}  // namespace refrag
