// What stands for the commands over a passage store in a build without SQLite.
#include <CLI/CLI.hpp>

#include "cli/cache_options.h"
#include "cli/store_commands.h"

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

}  // namespace refrag
