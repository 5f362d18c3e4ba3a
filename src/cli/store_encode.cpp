// `refrag encode`: documents in, encoded documents out, a line each; many processes on many machines can
// share a collection between them, and `refrag index --encoded` loads what they wrote.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "base/check.h"
#include "cli/common.h"
#include "cli/store_commands.h"
#include "io/file.h"
#include "store/documents.h"
#include "store/indexer.h"

namespace refrag {
namespace {

struct EncodeCommand {
    std::vector<std::string> files;
    std::string model_dir;
    DeviceOptions device;
    IndexOptions index;
    std::string form = "bf16";
    bool skip_bad = false;
};

void run_encode(EncodeCommand& command) {
    command.index.form = parse_embedding_form("--embeddings", command.form);
    command.index.on_bad = bad_lines_named(command.skip_bad);
    const std::vector<std::string> files =
        command.files.empty() ? std::vector<std::string>{"-"} : document_files(command.files);
    const std::unique_ptr<Device> device = make_device(command.device);
    const std::unique_ptr<Model> model = load_model(*device, command.model_dir, command.device);
    const Sha256Digest maker = stamp_of(*model, command.index).maker;
    Indexer indexer(
        [&](const std::vector<EncodedDocument>& batch) {
            for (const EncodedDocument& encoded : batch) write_stdout(encoded_line(encoded, maker) + "\n");
            flush_stdout();
        },
        *model, command.index);
    for (const std::string& file : files) indexer.add_file(file);
    indexer.finish();
}

}  // namespace

void add_encode(CLI::App& app) {
    const auto command = std::make_shared<EncodeCommand>();
    CLI::App& sub = *app.add_subcommand(
        "encode", "Encodes documents and writes them as lines, for `refrag index --encoded`");
    sub.add_option(
           "FILES", command->files,
           "As for `refrag index`; without them standard input, JSON Lines of {\"id\", \"title\", \"text\", "
           "\"metadata\", \"embedding\"}")
        ->type_name("FILES");
    add_model_option(sub, command->model_dir);
    add_index_options(sub, command->index, command->form);
    sub.add_flag("--skip-bad", command->skip_bad, "Name a line that cannot be encoded, and go on without it");
    add_device_options(sub, command->device);
    sub.final_callback([command] { run_encode(*command); });
}

}  // namespace refrag
