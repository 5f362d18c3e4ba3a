// See api.h: routes, keys, cross-origin rules, and what takes no time.
#include "server/api.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "io/file.h"
#include "server/openapi.h"
#include "text/unicode.h"

namespace refrag {
namespace {

// In a time that does not depend on where they differ.
bool same_digest(const Sha256Digest& a, const Sha256Digest& b) {
    unsigned difference = 0;
    for (size_t i = 0; i < a.bytes.size(); ++i) difference |= static_cast<unsigned>(a.bytes[i] ^ b.bytes[i]);
    return difference == 0;
}

bool takes_body(std::string_view method) {
    return method == "POST" || method == "PUT";
}

std::string in_small_letters(std::string_view text) {
    std::string lower(text);
    for (char& c : lower) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    return lower;
}

bool is_json_type(std::string_view type) {
    std::string lower = in_small_letters(type.substr(0, type.find(';')));
    while (!lower.empty() && lower.back() == ' ') lower.pop_back();
    return lower == "application/json";
}

}  // namespace

int64_t Api::seconds_now() {
    return std::chrono::duration_cast<std::chrono::seconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
}

Api::Api(const Model& model, Scheduler& scheduler, PassageCache& cache, StoreFinder find, ApiOptions options)
    : model_(model),
      scheduler_(scheduler),
      cache_(cache),
      options_(std::move(options)),
      table_(options_.max_passages, options_.max_passage_bytes),
      sources_(model, cache, table_, std::move(find), options_.limits, options_.defaults.chunk_len),
      started_(seconds_now()) {
    for (const std::string& key : options_.api_keys) keys_.push_back(sha256(key));
    for (int32_t i = 0; i < options_.n_workers; ++i) workers_.emplace_back([this] { work(); });
}

Api::~Api() {
    stop();
}

void Api::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& worker : workers_)
        if (worker.joinable()) worker.join();
}

const std::vector<Api::Route>& Api::routes() {
    static const std::vector<Route> all = {
        {"GET", "/health", &Api::health, true, true},
        {"GET", "/ready", &Api::ready, true, true},
        {"GET", "/metrics", &Api::metrics, false, true},
        {"GET", "/openapi.json", &Api::openapi, true, true},
        {"GET", "/v1/models", &Api::models, false, true},
        {"GET", "/v1/models/", &Api::model, false, true},
        {"POST", "/v1/chat/completions", &Api::chat_completions, false, false},
        {"POST", "/v1/completions", &Api::completions, false, false},
        {"POST", "/v1/embeddings", &Api::embeddings, false, false},
        {"POST", "/v2/chat", &Api::cohere_chat, false, false},
        {"POST", "/tokenize", &Api::tokenize, false, false},
        {"GET", "/tokenizer_info", &Api::tokenizer_info, false, true},
        {"POST", "/detokenize", &Api::detokenize, false, false},
        {"GET", "/v1/passages", &Api::list_passages, false, false},
        {"PUT", "/v1/passages/", &Api::put_passage, false, false},
        {"GET", "/v1/passages/", &Api::get_passage, false, false},
        {"DELETE", "/v1/passages/", &Api::delete_passage, false, false},
    };
    return all;
}

std::vector<std::pair<std::string, std::string>> Api::paths() {
    std::vector<std::pair<std::string, std::string>> out;
    for (const Route& route : routes()) out.emplace_back(route.method, route.path);
    return out;
}

void Api::handle(const std::shared_ptr<Exchange>& exchange) {
    add_cors(*exchange);
    try {
        route(exchange);
    } catch (...) {
        respond_error(*exchange, caught_error());
    }
}

void Api::refuse(const std::shared_ptr<Exchange>& exchange, int status, const std::string& message) {
    add_cors(*exchange);
    exchange->on_status = [this](int code) { metrics_.count_response("-", code); };
    respond_error(*exchange,
                  {status, message, status >= 500 ? "server_error" : "invalid_request_error", "", ""});
}

void Api::route(const std::shared_ptr<Exchange>& exchange) {
    const HttpRequest& request = exchange->request;
    const bool is_head = request.method == "HEAD";
    const std::string_view method = is_head ? std::string_view("GET") : std::string_view(request.method);
    exchange->on_status = [this](int status) { metrics_.count_response("-", status); };
    if (!is_valid_utf8(request.path) || request.path.find("%00") != std::string::npos)
        refuse_request("", "the path: expected UTF-8 without a zero byte, found ",
                       printable(request.path, 100));
    std::string allowed;
    for (const Route& route : routes()) {
        const std::string_view path = route.path;
        const bool takes_rest = path.ends_with('/');
        const bool fits = takes_rest ? request.path.starts_with(path) && request.path.size() > path.size()
                                     : request.path == path;
        if (!fits) continue;
        if (method != route.method) {
            allowed += str(allowed.empty() ? "" : ", ", route.method);
            continue;
        }
        exchange->on_status = [this, path](int status) { metrics_.count_response(path, status); };
        if (!route.is_open && !may(request))
            throw ApiRefusal({401,
                              request.authorization.empty()
                                  ? "an API key is missing: Authorization: Bearer KEY"
                                  : "the API key is not one of this server's",
                              "authentication_error", "", "invalid_api_key"});
        if (takes_body(method) && !is_json_type(request.content_type))
            throw ApiRefusal(
                {415,
                 str("Content-Type: expected application/json, found ",
                     request.content_type.empty() ? "none" : printable(request.content_type, 60)),
                 "invalid_request_error", "", ""});
        const size_t at = takes_rest ? path.size() : request.path.size();
        if (route.at_once) return run(route, exchange, std::string_view(request.path).substr(at));
        if (draining_)
            throw ApiRefusal({503, "the server is shutting down", "server_error", "", "shutting_down", 5});
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (waiting_.size() >= options_.max_waiting)
                throw ApiRefusal({429, "too many requests wait to be read: try again later",
                                  "rate_limit_error", "", "queue_full", 1});
            waiting_.emplace_back([this, &route, exchange, at] {
                run(route, exchange, std::string_view(exchange->request.path).substr(at));
            });
        }
        changed_.notify_one();
        return;
    }
    if (!allowed.empty() && request.method == "OPTIONS") return preflight(*exchange, allowed);
    if (!allowed.empty()) {
        HttpHead head{405, "application/json", {{"Allow", allowed}}};
        return exchange->respond(
            std::move(head), error_json({405,
                                         str(printable(request.path, 100), ": expected ", allowed, ", found ",
                                             printable(request.method, 20)),
                                         "invalid_request_error", "", "method_not_allowed"}));
    }
    throw ApiRefusal({404, str(printable(request.path, 100), ": there is no such path"),
                      "invalid_request_error", "", "not_found"});
}

bool Api::may(const HttpRequest& request) const {
    if (keys_.empty()) return true;
    constexpr std::string_view scheme = "bearer ";
    const std::string_view given = request.authorization;
    if (in_small_letters(given.substr(0, scheme.size())) != scheme) return false;
    const Sha256Digest digest = sha256(given.substr(scheme.size()));
    bool found = false;
    for (const Sha256Digest& key : keys_) found |= same_digest(digest, key);
    return found;
}

// An origin that may read responses is named; nothing here ever goes by cookies, so no credentials are
// allowed with it.
void Api::add_cors(Exchange& exchange) const {
    exchange.common_headers.clear();
    const std::string& origin = exchange.request.origin;
    const std::vector<std::string>& allowed = options_.cors_origins;
    if (allowed.empty() || origin.empty()) return;
    const bool any = std::find(allowed.begin(), allowed.end(), "*") != allowed.end();
    if (!any && std::find(allowed.begin(), allowed.end(), origin) == allowed.end()) return;
    exchange.common_headers.emplace_back("Access-Control-Allow-Origin", any ? "*" : origin);
    if (!any) exchange.common_headers.emplace_back("Vary", "Origin");
}

void Api::preflight(Exchange& exchange, const std::string& methods) const {
    HttpHead head{204, "text/plain", {{"Allow", methods + ", OPTIONS"}}};
    if (!exchange.common_headers.empty()) {
        head.headers.emplace_back("Access-Control-Allow-Methods", methods);
        head.headers.emplace_back("Access-Control-Allow-Headers", "Authorization, Content-Type");
        head.headers.emplace_back("Access-Control-Max-Age", "600");
    }
    exchange.respond(std::move(head), "");
}

void Api::work() {
    while (true) {
        std::function<void()> task;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [&] { return stopping_ || !waiting_.empty(); });
            if (stopping_) return;
            task = std::move(waiting_.front());
            waiting_.pop_front();
        }
        task();
    }
}

void Api::run(const Route& route, const std::shared_ptr<Exchange>& exchange, std::string_view rest) {
    if (exchange->left()) return;
    try {
        (this->*route.handler)(exchange, rest);
    } catch (...) {
        respond_error(*exchange, caught_error());
    }
}

void Api::health(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    exchange->respond({}, R"({"status": "ok"})");
}

void Api::ready(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    if (draining_) return exchange->respond({.status = 503}, R"({"status": "shutting down"})");
    exchange->respond({}, R"({"status": "ready"})");
}

void Api::metrics(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    exchange->respond({200, "text/plain; version=0.0.4; charset=utf-8"},
                      metrics_.text(scheduler_.stats(), n_connections_(), table_.size(), cache_));
}

void Api::openapi(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    exchange->respond({}, openapi_json);
}

namespace {

ApiRefusal no_such_model(std::string_view name, const std::string& here) {
    return ApiRefusal(
        {404, str("the model \"", printable(name, 100), "\" does not exist: this server has \"", here, "\""),
         "invalid_request_error", "model", "model_not_found"});
}

void write_model(JsonWriter& json, const std::string& name, int64_t created, const Model& model) {
    json.begin_object();
    json.key("id").string(name);
    json.key("object").string("model");
    json.key("created").integer(created);
    json.key("owned_by").string("refrag");
    json.key("max_model_len").integer(model.window());
    json.key("chunk_len").integer(model.config().chunk_len);
    json.key("has_encoder").boolean(model.has_encoder());
    json.end_object();
}

}  // namespace

void Api::models(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    JsonWriter json;
    json.begin_object().key("object").string("list").key("data").begin_array();
    write_model(json, options_.model_name, started_, model_);
    json.end_array().end_object();
    exchange->respond({}, json.text());
}

void Api::model(const std::shared_ptr<Exchange>& exchange, std::string_view rest) {
    if (rest != options_.model_name) throw no_such_model(rest, options_.model_name);
    JsonWriter json;
    write_model(json, options_.model_name, started_, model_);
    exchange->respond({}, json.text());
}

void Api::check_model(BodyReader& body) const {
    const std::optional<std::string> name = body.text("model");
    if (!name || *name == options_.model_name) return;
    throw no_such_model(*name, options_.model_name);
}

CallInfo Api::call_info(const char* prefix, const CallOptions& call) const {
    static constexpr char digits[] = "0123456789abcdef";
    std::random_device device;
    CallInfo info;
    info.id = prefix;
    for (int i = 0; i < 3; ++i) {
        unsigned bits = device();
        for (int j = 0; j < 8; ++j, bits >>= 4) info.id.push_back(digits[bits & 15]);
    }
    info.model = options_.model_name;
    info.created = seconds_now();
    info.include_usage = call.include_usage;
    info.usage_so_far = call.usage_so_far;
    info.logprobs = call.answer.logprobs;
    return info;
}

std::optional<std::chrono::steady_clock::time_point> Api::deadline_of(const HttpRequest& request,
                                                                      const CallOptions& call) const {
    double seconds = call.seconds.value_or(0.0);
    if (options_.max_seconds > 0.0)
        seconds = seconds > 0.0 ? std::min(seconds, options_.max_seconds) : options_.max_seconds;
    if (seconds <= 0.0) return std::nullopt;
    return request.received + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                  std::chrono::duration<double>(seconds));
}

}  // namespace refrag
