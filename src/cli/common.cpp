// See common.h.
#include "cli/common.h"
#include "cli/numbers.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <optional>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "io/output.h"
#include "refrag/decoder_files.h"
#include "refrag/select.h"

namespace refrag {

namespace {

CLI::Option* add_model(CLI::App& app, std::string& model_dir) {
    return app
        .add_option(
            "-m,--model", model_dir,
            "Model directory (refrag.json, encoder/, decoder/, heads), or a plain decoder: a Hugging Face "
            "directory (config.json, *.safetensors, tokenizer.json) or a GGUF file, which has no encoder: "
            "then the defaults are --policy bm25 --unexpanded drop -k 16 -p 0.25")
        ->envname("REFRAG_MODEL")
        ->type_name("PATH");
}

}  // namespace

void add_model_option(CLI::App& app, std::string& model_dir) {
    add_model(app, model_dir)->required();
}

void add_optional_model_option(CLI::App& app, std::string& model_dir) {
    add_model(app, model_dir);
}

CLI::Option* add_policy_option(CLI::App& app, std::string& policy) {
    return app
        .add_option(
            "--policy", policy,
            "Which chunks are expanded; none and all overrule -p; bm25: those with the question's words; "
            "recent: the last (default: model, without an encoder bm25)")
        ->type_name(select_policy_names("|"));
}

CLI::Option* add_unexpanded_option(CLI::App& app, std::string& unexpanded) {
    return app
        .add_option(
            "--unexpanded", unexpanded,
            "Chunks that are not expanded take one position each, or are left out, and then nothing is "
            "encoded (default: compress, without an encoder drop)")
        ->type_name("compress|drop");
}

void add_chat_options(CLI::App& app, ChatFlags& flags) {
    app.add_option(
           "--chat-template", flags.format,
           "Format of the prompt (default: a model directory's own template; of a plain decoder what its "
           "chat_template is recognised as, else plain)")
        ->type_name(chat_format_names("|"));
    app.add_option_function<std::string>(
           "--system",
           [&flags](const std::string& text) {
               flags.system = text;
               flags.has_system = true;
           },
           "System message, before everything; empty: none, also where the chat template brings its own")
        ->type_name("TEXT");
}

ChatOptions chat_options(const ChatFlags& flags) {
    ChatOptions options;
    if (!flags.format.empty()) options.format = parse_chat_format(flags.format);
    if (flags.has_system) options.system = flags.system;
    return options;
}

std::unique_ptr<Model> load_model(Device& device, const std::string& dir, const DeviceOptions& options,
                                  const ChatOptions& chat, std::shared_ptr<const RemoteDecoder> remote) {
    const WeightFormat format = parse_weight_format("--weights", options.weights);
    Progress progress("loading " + dir, ProgressUnit::bytes);
    auto model = std::make_unique<Model>(device, dir, progress.sink(), format, chat, options.adapters,
                                         std::move(remote));
    if (model->chat_source() == ChatSource::unknown) {
        std::fprintf(stderr,
                     "refrag: warning: %s: its chat template is of no known format, prompts are plain; "
                     "--chat-template %s says which it is\n",
                     printable(dir).c_str(), chat_format_names("|").c_str());
    }
    for (const std::string& warning : model->decoder().warnings())
        std::fprintf(stderr, "refrag: warning: %s: %s\n", printable(decoder_path_of(dir)).c_str(),
                     warning.c_str());
    return model;
}

BadLine bad_lines_named(bool skip_bad) {
    if (!skip_bad) return {};
    return [](const Error& error) { std::fprintf(stderr, "refrag: warning: %s: left out\n", error.what()); };
}

std::vector<std::string> read_keys(const std::string& path) {
    std::vector<std::string> keys;
    const std::string text = read_input(path, uint64_t{1} << 20);
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find('\n', at), text.size());
        std::string key = text.substr(at, end - at);
        while (!key.empty() && (key.back() == '\r' || key.back() == ' ' || key.back() == '\t'))
            key.pop_back();
        if (!key.empty() && key.front() != '#') keys.push_back(std::move(key));
        at = end + 1;
    }
    REFRAG_CHECK(!keys.empty(), Status::bad_input, printable(path),
                 ": expected an API key on each line, found none");
    return keys;
}

void write_stdout(std::string_view text) {
    std::cout.write(text.data(), static_cast<std::streamsize>(text.size()));
    REFRAG_CHECK(std::cout.good(), Status::runtime, "standard output: could not write ", text.size(),
                 " bytes");
}

void flush_stdout() {
    std::cout.flush();
    REFRAG_CHECK(std::cout.good(), Status::runtime,
                 "standard output: could not write (disk full or closed?)");
}

void write_result(const std::string& path, std::string_view text) {
    flush_stdout();
    write_output(path, text);
}

void write_each(std::initializer_list<std::function<void()>> writes) {
    std::optional<Error> first;
    for (const auto& write : writes) {
        try {
            write();
        } catch (const Error& error) {
            if (first) std::fprintf(stderr, "refrag: %s\n", error.what());
            if (!first) first = error;
        }
    }
    if (first) throw Error(*first);
}

}  // namespace refrag
