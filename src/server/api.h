// The HTTP API: which path does what, who may, and what is refused. Requests are read and answered on worker
// threads; what computes goes through the scheduler.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/sha256.h"
#include "refrag/passage_cache.h"
#include "server/call.h"
#include "server/completion.h"
#include "server/exchange.h"
#include "server/metrics.h"
#include "server/passage_table.h"
#include "server/scheduler.h"
#include "server/sources.h"

namespace refrag {

struct ApiOptions {
    std::string model_name;
    std::vector<std::string> api_keys;      // empty: nobody is asked for one
    std::vector<std::string> cors_origins;  // "*": any
    AnswerOptions defaults;                 // what a request does not say
    SourceLimits limits;
    size_t max_passages = 100000;
    uint64_t max_passage_bytes = uint64_t{1} << 30;
    double max_seconds = 0.0;  // of a request, from its arrival; 0: no limit
    int32_t n_workers = 2;
    size_t max_waiting = 4096;  // requests that no worker has taken yet
};

class Api {
  public:
    // model, scheduler and cache must outlive it. find: empty where there is no store.
    Api(const Model& model, Scheduler& scheduler, PassageCache& cache, StoreFinder find, ApiOptions options);
    ~Api();
    Api(const Api&) = delete;
    Api& operator=(const Api&) = delete;

    // Returns soon; see HttpHandler.
    void handle(const std::shared_ptr<Exchange>& exchange);
    // See HttpRefusal.
    void refuse(const std::shared_ptr<Exchange>& exchange, int status, const std::string& message);
    // From now on new work is refused with 503, and /ready says so.
    void drain() { draining_ = true; }
    // Ends the workers; requests that none has taken are left alone.
    void stop();
    // Method and path of every route; a path that ends with '/' goes on with a name.
    static std::vector<std::pair<std::string, std::string>> paths();
    void set_connections(std::function<size_t()> count) { n_connections_ = std::move(count); }

  private:
    using Handler = void (Api::*)(const std::shared_ptr<Exchange>&, std::string_view rest);
    struct Route {
        const char* method;
        const char* path;  // ends with '/': whatever follows is `rest`
        Handler handler;
        bool is_open;  // needs no key
        bool at_once;  // on the connections' thread: takes no time, and answers while all workers are busy
    };
    static const std::vector<Route>& routes();
    void route(const std::shared_ptr<Exchange>& exchange);
    bool may(const HttpRequest& request) const;
    void add_cors(Exchange& exchange) const;
    void preflight(Exchange& exchange, const std::string& methods) const;
    void work();
    void run(const Route& route, const std::shared_ptr<Exchange>& exchange, std::string_view rest);

    void health(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void ready(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void metrics(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void openapi(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void models(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void model(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    // api_answers.cpp
    void chat_completions(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void completions(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void cohere_chat(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    // api_passages.cpp
    void embeddings(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void tokenize(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void tokenizer_info(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void detokenize(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void list_passages(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void put_passage(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void get_passage(const std::shared_ptr<Exchange>& exchange, std::string_view rest);
    void delete_passage(const std::shared_ptr<Exchange>& exchange, std::string_view rest);

    static int64_t seconds_now();  // since 1970
    // Encodes passages on the scheduler's thread, then `answer` there; an error is the exchange's.
    void encode(const std::shared_ptr<Exchange>& exchange,
                std::vector<std::shared_ptr<SharedPassage>> passages, std::function<void(Backend&)> answer);
    // The field "model": absent, or this one.
    void check_model(BodyReader& body) const;
    // A call's id and what its format needs to know.
    CallInfo call_info(const char* prefix, const CallOptions& call) const;
    std::optional<std::chrono::steady_clock::time_point> deadline_of(const HttpRequest& request,
                                                                     const CallOptions& call) const;
    // The choices of one conversation, n of them.
    void answer_chat(const std::shared_ptr<Exchange>& exchange, const Conversation& conversation,
                     Sources&& sources, const CallOptions& call, std::unique_ptr<AnswerFormat> format);

    const Model& model_;
    Scheduler& scheduler_;
    PassageCache& cache_;
    const ApiOptions options_;
    std::vector<Sha256Digest> keys_;
    PassageTable table_;
    const SourceReader sources_;
    Metrics metrics_;
    const int64_t started_;  // seconds since 1970
    std::function<size_t()> n_connections_ = [] { return size_t{0}; };
    std::atomic<bool> draining_{false};

    std::mutex mutex_;  // of the next three
    std::condition_variable changed_;
    std::deque<std::function<void()>> waiting_;
    bool stopping_ = false;
    std::vector<std::thread> workers_;  // last: they use all of the above
};

}  // namespace refrag
