// The command line as a whole: subcommands, exit codes, and the border where exceptions end.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "cli/arguments.h"
#include "cli/common.h"
#include "cli/store_commands.h"
#include "cli/tokenize.h"

namespace refrag {
namespace {

int exit_code(Status status) {
    switch (status) {
        case Status::usage:
            return 2;
        case Status::bad_input:
            return 3;
        case Status::runtime:
        case Status::too_long:
        case Status::out_of_memory:
        case Status::unavailable:
            break;
    }
    return 1;
}

}  // namespace

int run_command_line(int argc, const char* const* argv) {
    try {
        CLI::App app{
            "refrag: answers questions from passages by compressing them into chunk embeddings (REFRAG)\n"};
        app.name("refrag");
        app.set_version_flag("--version", "refrag " REFRAG_VERSION);
        app.require_subcommand(1);
        app.failure_message([](const CLI::App*, const CLI::Error& error) {
            return str("refrag: ", error.what(), " (see --help)\n");
        });
        app.footer(
            "Exit codes: 0 done, 1 failed at run time, 2 wrong usage, 3 bad input file.\n"
            "Each command has its own --help.");
        add_run(app);
        add_ask(app);
        add_chat(app);
        add_serve(app);
        add_index(app);
        add_encode(app);
        add_eval(app);
        add_bench(app);
        add_inspect(app);
        add_tokenize(app);
        add_completion(app);
        add_manual(app);
        std::vector<std::string> arguments =
            checked_arguments(app, std::vector<std::string>(argv + std::min(argc, 1), argv + argc));
        std::reverse(arguments.begin(), arguments.end());  // as CLI11 takes a vector
        try {
            app.parse(std::move(arguments));
        } catch (const CLI::ExtrasError&) {
            fail(Status::usage, unexpected_arguments(app), " (see --help)");
        } catch (const CLI::ParseError& error) {
            // --help and --version come this way too, with code 0.
            return app.exit(error) == 0 ? 0 : 2;
        }
        flush_stdout();
        return 0;
    } catch (const Error& error) {
        std::cout.flush();
        std::fprintf(stderr, "refrag: %s\n", error.what());
        return exit_code(error.status());
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "refrag: out of memory\n");
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "refrag: %s\n", error.what());
        return 1;
    }
}

}  // namespace refrag
