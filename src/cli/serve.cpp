// `refrag serve`: the HTTP API over one model, until SIGINT or SIGTERM.
#include <sys/resource.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "base/check.h"
#include "cli/numbers.h"
#include "cli/run.h"
#include "cli/serve.h"
#include "io/file.h"
#include "server/server.h"

namespace refrag {
namespace {

struct ServeCommand {
    RunOptions run;
    HttpOptions http;
    int32_t port = 8080;
    int32_t queue = 64;
    double step_ms = 50.0;
    double drain_seconds = 30.0;
    double request_seconds = 0.0;
    double head_seconds = 60.0;
    double body_seconds = 60.0;
    int64_t max_body_mib = 16;
    int64_t max_documents = 1024;
    int64_t max_chunks = 65536;
    int64_t max_passages = 100000;
    std::string alias;
    std::string key_file;
    ApiOptions api;
    ServedStore store;
};

// Connections and files beyond the soft limit's usual 1024.
void raise_descriptor_limit() {
    rlimit limit = {};
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

bool is_loopback(const std::string& host) {
    return host == "localhost" || host == "::1" || host.rfind("127.", 0) == 0;
}

std::string name_of_model(const std::string& path) {
    std::error_code error;
    const std::filesystem::path absolute = std::filesystem::absolute(path, error).lexically_normal();
    const std::filesystem::path name =
        absolute.has_filename() ? absolute.filename() : absolute.parent_path().filename();
    return name.empty() ? "refrag" : name.string();
}

// The signals that end the server, taken by the main thread alone.
class EndSignals {
  public:
    EndSignals() {
        sigemptyset(&set_);
        sigaddset(&set_, SIGINT);
        sigaddset(&set_, SIGTERM);
        pthread_sigmask(SIG_BLOCK, &set_, &old_);
        std::signal(SIGPIPE, SIG_IGN);
    }
    ~EndSignals() { pthread_sigmask(SIG_SETMASK, &old_, nullptr); }
    EndSignals(const EndSignals&) = delete;
    EndSignals& operator=(const EndSignals&) = delete;

    // Waits for one, for so long at most; whether one came.
    bool wait(std::chrono::milliseconds most) const {
        const timespec time{static_cast<time_t>(most.count() / 1000),
                            static_cast<long>(most.count() % 1000) * 1000000};
        return sigtimedwait(&set_, nullptr, &time) > 0;
    }

  private:
    sigset_t set_ = {};
    sigset_t old_ = {};
};

// While the model is loaded nobody looks for a signal, and nothing is under way that it could break: one ends
// the process. The signals are blocked in every thread.
class EndsWhileLoading {
  public:
    explicit EndsWhileLoading(const EndSignals& signals)
        : thread_([this, &signals] {
              while (!loaded_) {
                  if (!signals.wait(std::chrono::milliseconds(20))) continue;
                  std::fputs("refrag: shutting down: the model was still being loaded\n", stderr);
                  std::_Exit(0);
              }
          }) {}
    ~EndsWhileLoading() {
        loaded_ = true;
        thread_.join();
    }
    EndsWhileLoading(const EndsWhileLoading&) = delete;
    EndsWhileLoading& operator=(const EndsWhileLoading&) = delete;

  private:
    std::atomic<bool> loaded_{false};
    std::thread thread_;
};

std::string shown_host(const std::string& host) {
    return host.find(':') == std::string::npos ? host : "[" + host + "]";
}

void serve(ServeCommand& command) {
    // Everything that can be refused without the model is refused before it is loaded.
    if (!command.key_file.empty()) {
        for (std::string& key : read_keys(command.key_file)) command.api.api_keys.push_back(std::move(key));
    }
    for (const std::string& key : command.api.api_keys)
        REFRAG_CHECK(!key.empty(), Status::usage, "--api-key: expected a key, found an empty one");
    RunOptions& run = command.run;
    const OpenStore store = open_served_store(command.store);
    if (store.chunk_len > 0) {
        REFRAG_CHECK(run.chunk_len == 0 || run.chunk_len == store.chunk_len, Status::usage, "-k ",
                     run.chunk_len, ": the store's passages are cut into chunks of ", store.chunk_len);
        run.chunk_len = store.chunk_len;
    }
    command.api.defaults = checked_answer_options(run);
    raise_descriptor_limit();
    const EndSignals signals;
    command.http.port = static_cast<uint16_t>(command.port);
    command.http.max_body_bytes = static_cast<size_t>(command.max_body_mib) << 20;
    const auto ms = [](double seconds) {
        return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000.0));
    };
    command.http.head_time = ms(command.head_seconds);
    command.http.body_time = ms(command.body_seconds);
    // They outlive the server, which is made first, so that a port that is taken is said at once.
    std::unique_ptr<Device> device;
    std::unique_ptr<Model> model;
    std::unique_ptr<PassageCache> cache;
    StoreFinder find;
    Server server(command.http);
    std::optional<EndsWhileLoading> loading(std::in_place, signals);
    const std::shared_ptr<PassageKeeper> keeper = open_cache(run.cache);
    device = make_device(run.device);
    model = load_run_model(*device, run, command.api.defaults);
    warn_chunk_len(*model, run.chunk_len);
    cache = std::make_unique<PassageCache>(default_passage_cache_bytes, keeper);
    if (store.open) find = store.open(*model);
    SchedulerOptions scheduler;
    scheduler.engine = {
        .n_slots = run.parallel, .max_context = run.context, .prefix_cache = !run.no_prefix_cache};
    scheduler.max_queue = static_cast<size_t>(command.queue);
    scheduler.step_ms = command.step_ms;
    ApiOptions& api = command.api;
    api.model_name = command.alias.empty() ? name_of_model(run.model_dir) : command.alias;
    api.max_seconds = command.request_seconds;
    api.limits = {static_cast<size_t>(command.max_documents), static_cast<size_t>(command.max_chunks)};
    api.max_passages = static_cast<size_t>(command.max_passages);
    if (!is_loopback(command.http.host) && api.api_keys.empty())
        std::fprintf(stderr,
                     "refrag: warning: listening on %s without an API key: whoever reaches it may use it "
                     "(--api-key-file)\n",
                     command.http.host.c_str());
    loading.reset();
    server.serve(*model, *cache, find, scheduler, api);
    std::fprintf(stderr, "refrag: serving %s on http://%s:%d | %d slots, %lld positions each | %s\n",
                 api.model_name.c_str(), shown_host(command.http.host).c_str(), server.port(), run.parallel,
                 static_cast<long long>(run.context == 0 ? model->window() : run.context),
                 device->description().c_str());
    while (!signals.wait(std::chrono::milliseconds(1000))) {
    }
    server.drain();
    std::fprintf(stderr, "refrag: shutting down: what is under way has %g s to end (again: at once)\n",
                 command.drain_seconds);
    const auto until = std::chrono::steady_clock::now() + ms(command.drain_seconds);
    while (!server.wait_idle(
        std::min(until, std::chrono::steady_clock::now() + std::chrono::milliseconds(50)))) {
        if (std::chrono::steady_clock::now() >= until || signals.wait(std::chrono::milliseconds(0))) break;
    }
    // What has been written is given a moment to reach its readers.
    signals.wait(std::chrono::milliseconds(100));
}

void add_listening_options(CLI::App& sub, ServeCommand& command) {
    const char* group = "Listening";
    sub.add_option("--host", command.http.host, "Address to listen on; 0.0.0.0: all of IPv4, ::: all of IPv6")
        ->group(group)
        ->capture_default_str()
        ->type_name("HOST");
    sub.add_option("--port", command.port, "Port; 0: any that is free, which is said")
        ->group(group)
        ->capture_default_str()
        ->transform(whole_number(0, 65535))
        ->type_name("PORT");
    add_texts(sub, "--api-key", command.api.api_keys,
              "Ask for this key (Authorization: Bearer KEY); may be given several times; "
              "others see it in the list of processes, but not what is in --api-key-file")
        ->group(group);
    sub.add_option("--api-key-file", command.key_file, "Ask for one of the keys in this file, one a line")
        ->group(group)
        ->type_name("FILE");
    add_texts(sub, "--cors", command.api.cors_origins,
              "Let pages of this origin (https://host) read responses; *: any; may be given several times")
        ->group(group);
    sub.add_option("-a,--alias", command.alias, "The model's name in the API (default: its directory's)")
        ->group(group)
        ->type_name("NAME");
}

void add_limit_options(CLI::App& sub, ServeCommand& command) {
    const char* group = "Limits";
    const auto whole = [&](const char* name, auto& value, int64_t min, int64_t max, const char* type,
                           const char* description) {
        sub.add_option(name, value, description)
            ->group(group)
            ->capture_default_str()
            ->transform(whole_number(min, max))
            ->type_name(type);
    };
    const auto seconds = [&](const char* name, double& value, double min, const char* description) {
        sub.add_option(name, value, description)
            ->group(group)
            ->capture_default_str()
            ->transform(decimal_number(min, 86400.0))
            ->type_name("S");
    };
    whole("--parallel", command.run.parallel, 1, max_parallel, "N",
          "Requests that run at a time (slots); may be written -np");
    whole("--queue", command.queue, 0, 1000000, "N",
          "Requests that wait beside those; more are answered 429");
    sub.add_option("--step-ms", command.step_ms,
                   "How long reading prompts may keep answers under way from their next token")
        ->group(group)
        ->capture_default_str()
        ->transform(decimal_number(1.0, 60000.0))
        ->type_name("MS");
    seconds("--request-seconds", command.request_seconds, 0.0,
            "A request's time, from its arrival to its answer's end; 0: no limit");
    seconds("--drain-seconds", command.drain_seconds, 0.0,
            "After SIGTERM: how long requests under way may take to end");
    seconds("--header-seconds", command.head_seconds, 0.1, "A connection's time to send a request's header");
    seconds("--body-seconds", command.body_seconds, 0.1, "And its body");
    whole("--max-connections", command.http.max_connections, 1, 1000000, "N", "Connections at a time");
    whole("--max-body", command.max_body_mib, 1, 4096, "MIB", "A request's body");
    whole("--max-documents", command.max_documents, 1, 1000000, "N", "Passages of a request");
    whole("--max-chunks", command.max_chunks, 1, int64_t{1} << 30, "N", "Chunks of a request");
    whole("--max-passages", command.max_passages, 0, int64_t{1} << 30, "N",
          "Passages kept by id (/v1/passages)");
}

}  // namespace

void add_serve(CLI::App& app) {
    const auto command = std::make_shared<ServeCommand>();
    command->run.answer.max_new_tokens = -1;
    CLI::App& sub = *app.add_subcommand(
        "serve", "Serves the HTTP API: OpenAI's, with documents as Cohere and vLLM have them");
    add_model_option(sub, command->run.model_dir);
    add_listening_options(sub, *command);
    add_limit_options(sub, *command);
    add_served_store_options(sub, command->store);
    sub.add_option("-k,--chunk-len", command->run.chunk_len,
                   "Decoder tokens to a chunk (default: the store's, or the model's)")
        ->group("Compression")
        ->transform(whole_number(1, 4096))
        ->type_name("K");
    add_expansion_options(sub, command->run);
    add_generation_options(sub, command->run);
    add_cache_options(sub, command->run.cache);
    add_sampling_options(sub, command->run.answer.sampler);
    add_chat_options(sub, command->run.chat);
    add_decoder_options(sub, command->run.decoder);
    add_device_options(sub, command->run.device);
    sub.footer(
        "Options of compression, generation and sampling are what a request does not say itself.\n"
        "SIGTERM or SIGINT: no new work, what is under way ends; a second one: at once.");
    sub.final_callback([command] { serve(*command); });
}

}  // namespace refrag
