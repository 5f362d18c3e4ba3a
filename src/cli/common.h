// What the subcommands share: options that choose model and device, checked output.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cli/device.h"
#include "cli/progress.h"
#include "io/lines.h"
#include "ops/backend.h"
#include "refrag/model.h"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace refrag {

// How prompts are put into words, as the command line says it.
struct ChatFlags {
    std::string format;  // "": the model's own
    std::string system;
    bool has_system = false;
};

// -m/--model (required, or REFRAG_MODEL).
void add_model_option(CLI::App& app, std::string& model_dir);
// The same for a command that works without a model too; "": none given.
void add_optional_model_option(CLI::App& app, std::string& model_dir);
// --policy and --unexpanded; the caller parses the words, "" being the model's own.
CLI::Option* add_policy_option(CLI::App& app, std::string& policy);
CLI::Option* add_unexpanded_option(CLI::App& app, std::string& unexpanded);
// --chat-template, --system.
void add_chat_options(CLI::App& app, ChatFlags& flags);
// Status::usage for a word that is no format.
ChatOptions chat_options(const ChatFlags& flags);
// Loads a model directory, with a progress bar on a terminal. A chat template of no known format is said on
// standard error.
std::unique_ptr<Model> load_model(Device& device, const std::string& dir, const DeviceOptions& options,
                                  const ChatOptions& chat = {},
                                  std::shared_ptr<const RemoteDecoder> remote = nullptr);

// With --skip-bad: a line that is refused is named on standard error, and left out. Else empty.
BadLine bad_lines_named(bool skip_bad);

// Keys of a file, one a line; at least one. Lines that begin with # are left out.
std::vector<std::string> read_keys(const std::string& path);

// Writes to standard output and throws Status::runtime when it cannot take it (a full disk, a closed pipe).
void write_stdout(std::string_view text);
void flush_stdout();

// write_output, after what standard output still holds.
void write_result(const std::string& path, std::string_view text);
// Several things to write, each tried whatever became of those before: what was computed is shown even where
// a file cannot be written. Throws the first Error; further ones go to standard error.
void write_each(std::initializer_list<std::function<void()>> writes);

// The subcommands; each adds itself to the application and runs when the command line is parsed.
void add_run(CLI::App& app);
void add_eval(CLI::App& app);
void add_bench(CLI::App& app);
void add_inspect(CLI::App& app);
void add_serve(CLI::App& app);
void add_completion(CLI::App& app);
void add_manual(CLI::App& app);

// The whole command line, as main() runs it; returns the exit code. Never throws.
int run_command_line(int argc, const char* const* argv);

}  // namespace refrag
