// See server.h.
#include "server/server.h"

#include <utility>

#include "server/api_error.h"

namespace refrag {

Server::Server(HttpOptions options)
    : http_(std::make_unique<HttpServer>(
          std::move(options), [this](const std::shared_ptr<Exchange>& exchange) { handle(exchange); },
          [this](const std::shared_ptr<Exchange>& exchange, int status, const std::string& message) {
              if (Api* api = ready_) return api->refuse(exchange, status, message);
              respond_error(*exchange, {status, message, "server_error", "", ""});
          })) {}

// In this order nobody writes to an exchange that is gone: first those who write end, then the connections.
Server::~Server() {
    if (api_) api_->stop();
    if (scheduler_) scheduler_->stop();
    http_.reset();
}

void Server::serve(const Model& model, PassageCache& cache, StoreFinder find,
                   const SchedulerOptions& scheduler, ApiOptions api) {
    scheduler_ = std::make_unique<Scheduler>(model, scheduler);
    api_ = std::make_unique<Api>(model, *scheduler_, cache, std::move(find), std::move(api));
    // Until the connections' thread has ended, whatever becomes of http_.
    api_->set_connections([http = http_.get()] { return http->n_connections(); });
    ready_ = api_.get();
}

void Server::drain() {
    http_->stop_listening();
    if (api_) api_->drain();
}

void Server::handle(const std::shared_ptr<Exchange>& exchange) {
    if (Api* api = ready_) return api->handle(exchange);
    if (exchange->request.path == "/health") return exchange->respond({}, R"({"status": "loading"})");
    respond_error(*exchange, {503, "the model is being loaded", "server_error", "", "loading", 1});
}

}  // namespace refrag
