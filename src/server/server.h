// A server from its socket to its end: listens at once, says that it is loading, serves a model, drains,
// stops.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>

#include "server/api.h"
#include "server/http_server.h"
#include "server/scheduler.h"

namespace refrag {

class Server {
  public:
    // Listens from now on; until serve() every path but /health answers 503. Throws as HttpServer does.
    explicit Server(HttpOptions options);
    // Cuts off whoever still waits.
    ~Server();
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;

    // Serves this model, which must outlive the server, as `cache` must. Once.
    void serve(const Model& model, PassageCache& cache, StoreFinder find, const SchedulerOptions& scheduler,
               ApiOptions api);
    uint16_t port() const { return http_->port(); }
    SchedulerStats stats() const { return scheduler_->stats(); }

    // No new connections and no new work from now on.
    void drain();
    // Waits until no request is under way, or until then; whether none is.
    bool wait_idle(std::chrono::steady_clock::time_point until) const {
        return !scheduler_ || scheduler_->wait_idle(until);
    }

  private:
    void handle(const std::shared_ptr<Exchange>& exchange);

    std::unique_ptr<Scheduler> scheduler_;
    std::unique_ptr<Api> api_;
    std::atomic<Api*> ready_{nullptr};
    std::unique_ptr<HttpServer> http_;
};

}  // namespace refrag
