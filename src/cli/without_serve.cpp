// What stands for `refrag serve` in a build without libmicrohttpd.
#include <CLI/CLI.hpp>

#include "base/check.h"
#include "cli/common.h"

namespace refrag {

void add_serve(CLI::App& app) {
    CLI::App& sub =
        *app.add_subcommand("serve", "Not in this build: it wants libmicrohttpd (libmicrohttpd-dev)");
    sub.allow_extras();
    sub.final_callback([] {
        fail(Status::usage,
             "serve: this refrag was built without libmicrohttpd: install libmicrohttpd-dev and build again");
    });
}

}  // namespace refrag
