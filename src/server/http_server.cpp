// See http_server.h.
#include "server/http_server.h"

#include <fcntl.h>
#include <microhttpd.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <list>
#include <thread>
#include <utility>

#include "base/check.h"
#include "io/posix.h"

namespace refrag {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t max_bodies = 16;  // of the largest size, at a time

// The exchange of a connection. Its response is read by libmicrohttpd's thread.
class ConnectionExchange final : public Exchange {
  public:
    ConnectionExchange(HttpRequest from, MHD_Connection* connection)
        : Exchange(std::move(from)), connection_(connection) {}

    // On the connections' thread, when there is nothing left to receive: answers, or suspends the connection
    // until there is an answer. MHD_NO closes the connection.
    MHD_Result go_on(std::shared_ptr<ConnectionExchange> self);
    // The connection is done with this request.
    void detach() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            connection_ = nullptr;
            suspended_ = false;
            if (begun_ && ended_ && n_sent_ == out_.size()) return;
        }
        client_left();
    }

  private:
    void wake() override {
        if (!suspended_) return;
        suspended_ = false;
        MHD_resume_connection(connection_);
    }
    void suspend() {
        suspended_ = true;
        MHD_suspend_connection(connection_);
    }
    ssize_t read(char* to, size_t capacity);

    MHD_Connection* connection_;  // under mutex_, as suspended_
    bool suspended_ = false;
};

struct ResponseDeleter {
    void operator()(MHD_Response* response) const { MHD_destroy_response(response); }
};
using Response = std::unique_ptr<MHD_Response, ResponseDeleter>;

ssize_t ConnectionExchange::read(char* to, size_t capacity) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (left_) return MHD_CONTENT_READER_END_WITH_ERROR;
    const size_t n = std::min(capacity, out_.size() - n_sent_);
    if (n > 0) {
        std::memcpy(to, out_.data() + n_sent_, n);
        n_sent_ += n;
        if (n_sent_ == out_.size()) {
            out_.clear();
            n_sent_ = 0;
        }
        return static_cast<ssize_t>(n);
    }
    if (ended_) return MHD_CONTENT_READER_END_OF_STREAM;
    suspend();
    return 0;
}

MHD_Result ConnectionExchange::go_on(std::shared_ptr<ConnectionExchange> self) {
    MHD_Connection* connection = nullptr;
    HttpHead head;
    std::string whole;
    bool is_whole = false;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (left_) return MHD_NO;
        if (!begun_) {
            suspend();
            return MHD_YES;
        }
        connection = connection_;
        head = std::move(head_);
        is_whole = ended_;
        if (is_whole) whole.swap(out_);
    }
    // Without the lock: libmicrohttpd holds one of its own here, and when it reads.
    Response response;
    if (is_whole) {
        response.reset(MHD_create_response_from_buffer(whole.size(), whole.data(), MHD_RESPMEM_MUST_COPY));
    } else {
        auto* held = new std::shared_ptr<ConnectionExchange>(std::move(self));
        response.reset(MHD_create_response_from_callback(
            MHD_SIZE_UNKNOWN, size_t{16} << 10,
            [](void* closure, uint64_t, char* to, size_t capacity) {
                return (*static_cast<std::shared_ptr<ConnectionExchange>*>(closure))->read(to, capacity);
            },
            held, [](void* closure) { delete static_cast<std::shared_ptr<ConnectionExchange>*>(closure); }));
        if (!response) delete held;
    }
    if (!response) return MHD_NO;
    MHD_add_response_header(response.get(), MHD_HTTP_HEADER_CONTENT_TYPE, head.content_type.c_str());
    for (const auto& headers : {common_headers, head.headers})
        for (const auto& [name, value] : headers)
            MHD_add_response_header(response.get(), name.c_str(), value.c_str());
    return MHD_queue_response(connection, static_cast<unsigned>(head.status), response.get());
}

// What a connection is at.
enum class Phase { head, body, work };

struct Connection {
    int descriptor = -1;
    Phase phase = Phase::head;
    Clock::time_point since;
    std::shared_ptr<ConnectionExchange> exchange;  // in Phase::work
};

// A request on its way in.
struct Incoming {
    HttpRequest request;
    size_t n_bytes = 0;
    size_t n_counted = 0;  // of the bytes that all bodies hold
    int refused = 0;       // a status: the rest of the body is read and thrown away
    std::shared_ptr<ConnectionExchange> exchange;
};

const char* header_of(MHD_Connection* connection, const char* name) {
    const char* value = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, name);
    return value == nullptr ? "" : value;
}

// The path of a target, which may be a whole URL (RFC 9112, section 3.2.2).
std::string path_of(std::string_view target) {
    for (const std::string_view scheme : {"http://", "https://"}) {
        if (!target.starts_with(scheme)) continue;
        const size_t slash = target.find('/', scheme.size());
        return slash == std::string_view::npos ? "/" : std::string(target.substr(slash));
    }
    return std::string(target);
}

// A zero byte would end the path early, and so name another one: a path with %00 stays as it was sent.
size_t unescape_path(void*, MHD_Connection*, char* text) {
    return std::strstr(text, "%00") != nullptr ? std::strlen(text) : MHD_http_unescape(text);
}

struct AddressesDeleter {
    void operator()(addrinfo* addresses) const { freeaddrinfo(addresses); }
};

// A socket that listens. Status::runtime.
int listen_on(const std::string& host, uint16_t port) {
    addrinfo hints = {};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE;
    addrinfo* found = nullptr;
    const int failed = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
    REFRAG_CHECK(failed == 0, Status::usage, "--host ", host, ": ", gai_strerror(failed));
    const std::unique_ptr<addrinfo, AddressesDeleter> addresses(found);
    int error = 0;
    for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
        const int made =
            socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, at->ai_protocol);
        if (made < 0) {
            error = errno;
            continue;
        }
        const int yes = 1;
        setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (bind(made, at->ai_addr, at->ai_addrlen) == 0 && listen(made, 1024) == 0) return made;
        error = errno;
        close(made);
    }
    fail(Status::runtime, "cannot listen on ", host, ":", port, ": ", system_text(error));
}

uint16_t port_of(int descriptor) {
    sockaddr_storage address = {};
    socklen_t size = sizeof address;
    char name[NI_MAXSERV] = "0";
    if (getsockname(descriptor, reinterpret_cast<sockaddr*>(&address), &size) == 0)
        getnameinfo(reinterpret_cast<sockaddr*>(&address), size, nullptr, 0, name, sizeof name,
                    NI_NUMERICSERV);
    return static_cast<uint16_t>(std::strtoul(name, nullptr, 10));
}

}  // namespace

struct HttpServer::State {
    State(HttpOptions with, HttpHandler handles, HttpRefusal refuses)
        : options(std::move(with)), handler(std::move(handles)), refusal(std::move(refuses)) {}

    static Connection* connection_of(MHD_Connection* connection) {
        const MHD_ConnectionInfo* info =
            MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
        return info == nullptr ? nullptr : static_cast<Connection*>(info->socket_context);
    }

    void set_phase(MHD_Connection* connection, Phase phase, std::shared_ptr<ConnectionExchange> exchange) {
        Connection* at = connection_of(connection);
        if (at == nullptr) return;
        const std::lock_guard<std::mutex> lock(mutex);
        at->phase = phase;
        at->since = Clock::now();
        at->exchange.swap(exchange);
    }

    void connection_changed(MHD_Connection* connection, void** context, MHD_ConnectionNotificationCode code) {
        std::shared_ptr<ConnectionExchange> forget;
        const std::lock_guard<std::mutex> lock(mutex);
        if (code == MHD_CONNECTION_NOTIFY_STARTED) {
            const MHD_ConnectionInfo* info =
                MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
            connections.push_back(
                {info == nullptr ? -1 : info->connect_fd, Phase::head, Clock::now(), nullptr});
            *context = &connections.back();
            return;
        }
        const auto at = std::find_if(connections.begin(), connections.end(),
                                     [&](const Connection& one) { return &one == *context; });
        if (at == connections.end()) return;
        forget.swap(at->exchange);
        connections.erase(at);
        *context = nullptr;
    }

    // libmicrohttpd calls it when the header has come, for each part of the body, and once more at its end.
    MHD_Result receive(MHD_Connection* connection, const char* path, const char* method, const char* data,
                       size_t* n_data, void** context) {
        auto* incoming = static_cast<Incoming*>(*context);
        if (incoming == nullptr) {
            auto made = std::make_unique<Incoming>();
            made->request.method = method;
            made->request.path = path_of(path);
            made->request.authorization = header_of(connection, MHD_HTTP_HEADER_AUTHORIZATION);
            made->request.content_type = header_of(connection, MHD_HTTP_HEADER_CONTENT_TYPE);
            made->request.origin = header_of(connection, MHD_HTTP_HEADER_ORIGIN);
            // Nothing is kept of a body that says itself that it is too large.
            if (std::strtoull(header_of(connection, MHD_HTTP_HEADER_CONTENT_LENGTH), nullptr, 10) >
                options.max_body_bytes)
                made->refused = MHD_HTTP_CONTENT_TOO_LARGE;
            set_phase(connection, Phase::body, nullptr);
            *context = made.release();
            return MHD_YES;
        }
        if (*n_data > 0) {
            take(*incoming, {data, *n_data});
            *n_data = 0;
            return MHD_YES;
        }
        if (!incoming->exchange) hand_over(*incoming, connection);
        return incoming->exchange->go_on(incoming->exchange);
    }

    void take(Incoming& incoming, std::string_view data) {
        incoming.n_bytes += data.size();
        if (incoming.refused != 0) return;
        if (incoming.n_bytes > options.max_body_bytes) {
            incoming.refused = MHD_HTTP_CONTENT_TOO_LARGE;
        } else if (body_bytes + data.size() > max_bodies * options.max_body_bytes) {
            incoming.refused = MHD_HTTP_SERVICE_UNAVAILABLE;
        }
        if (incoming.refused != 0) {
            uncount(incoming);
            std::string().swap(incoming.request.body);
            return;
        }
        incoming.request.body.append(data);
        body_bytes += data.size();
        incoming.n_counted += data.size();
    }

    void uncount(Incoming& incoming) {
        body_bytes -= incoming.n_counted;
        incoming.n_counted = 0;
    }

    void hand_over(Incoming& incoming, MHD_Connection* connection) {
        uncount(incoming);
        incoming.request.received = Clock::now();
        incoming.exchange = std::make_shared<ConnectionExchange>(std::move(incoming.request), connection);
        set_phase(connection, Phase::work, incoming.exchange);
        if (incoming.refused != 0) {
            refusal(incoming.exchange, incoming.refused,
                    incoming.refused == MHD_HTTP_CONTENT_TOO_LARGE
                        ? str("the body: expected at most ", options.max_body_bytes, " bytes, found ",
                              incoming.n_bytes)
                        : std::string("too many large requests are on their way: try again"));
            return;
        }
        try {
            handler(incoming.exchange);
        } catch (const std::bad_alloc&) {
            refusal(incoming.exchange, MHD_HTTP_SERVICE_UNAVAILABLE, "out of memory");
        } catch (const std::exception& error) {
            refusal(incoming.exchange, MHD_HTTP_INTERNAL_SERVER_ERROR, error.what());
        }
    }

    void completed(MHD_Connection* connection, void** context) {
        auto* incoming = static_cast<Incoming*>(*context);
        *context = nullptr;
        set_phase(connection, Phase::head, nullptr);
        if (incoming == nullptr) return;
        uncount(*incoming);
        if (incoming->exchange) incoming->exchange->detach();
        delete incoming;
    }

    // Until stopping: ends requests that take too long to come, and sees who has left.
    void look() {
        std::unique_lock<std::mutex> lock(mutex);
        while (!stopping) {
            stop.wait_for(lock, options.look_every);
            if (stopping) return;
            std::vector<std::shared_ptr<ConnectionExchange>> gone;
            try {
                gone = who_left();
            } catch (const std::bad_alloc&) {
                continue;  // the next look sees them
            }
            lock.unlock();
            for (const auto& exchange : gone) {
                try {
                    exchange->client_left();
                } catch (const std::bad_alloc&) {
                    // It is marked; whoever writes to it next sees that nobody reads.
                    continue;
                }
            }
            gone.clear();
            lock.lock();
        }
    }

    // Under mutex: no descriptor is closed, and so given to another connection, in the meantime.
    std::vector<std::shared_ptr<ConnectionExchange>> who_left() {
        const Clock::time_point now = Clock::now();
        std::vector<pollfd> working;
        std::vector<Connection*> of;
        for (Connection& at : connections) {
            if (at.phase == Phase::work) {
                working.push_back({at.descriptor, POLLRDHUP, 0});
                of.push_back(&at);
            } else if (now - at.since > (at.phase == Phase::head ? options.head_time : options.body_time)) {
                shutdown(at.descriptor, SHUT_RDWR);  // libmicrohttpd sees its end, and closes it
            }
        }
        std::vector<std::shared_ptr<ConnectionExchange>> gone;
        if (working.empty() || poll(working.data(), working.size(), 0) <= 0) return gone;
        for (size_t i = 0; i < working.size(); ++i) {
            if ((working[i].revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0 && of[i]->exchange)
                gone.push_back(of[i]->exchange);
        }
        return gone;
    }

    const HttpOptions options;
    const HttpHandler handler;
    const HttpRefusal refusal;
    MHD_Daemon* daemon = nullptr;
    int listening = -1;
    uint16_t port = 0;
    std::atomic<size_t> body_bytes{0};
    std::thread looking;

    mutable std::mutex mutex;  // of all that follows
    std::condition_variable stop;
    bool stopping = false;
    std::list<Connection> connections;  // the addresses are libmicrohttpd's socket contexts
};

HttpServer::HttpServer(HttpOptions options, HttpHandler handler, HttpRefusal refusal)
    : state_(std::make_unique<State>(std::move(options), std::move(handler), std::move(refusal))) {
    State& state = *state_;
    state.listening = listen_on(state.options.host, state.options.port);
    state.port = port_of(state.listening);
    // C callbacks: nothing may be thrown through libmicrohttpd.
    const MHD_AccessHandlerCallback receive = [](void* closure, MHD_Connection* connection, const char* path,
                                                 const char* method, const char*, const char* data,
                                                 size_t* n_data, void** context) {
        try {
            return static_cast<State*>(closure)->receive(connection, path, method, data, n_data, context);
        } catch (...) {
            return MHD_NO;
        }
    };
    const MHD_NotifyConnectionCallback changed = [](void* closure, MHD_Connection* connection, void** context,
                                                    MHD_ConnectionNotificationCode code) {
        try {
            static_cast<State*>(closure)->connection_changed(connection, context, code);
        } catch (...) {
            *context = nullptr;
        }
    };
    const MHD_RequestCompletedCallback completed = [](void* closure, MHD_Connection* connection,
                                                      void** context, MHD_RequestTerminationCode) {
        try {
            static_cast<State*>(closure)->completed(connection, context);
        } catch (...) {
            *context = nullptr;
        }
    };
    state.daemon = MHD_start_daemon(
        MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME, 0, nullptr, nullptr, receive, &state,
        MHD_OPTION_LISTEN_SOCKET, state.listening, MHD_OPTION_CONNECTION_LIMIT,
        static_cast<unsigned>(state.options.max_connections), MHD_OPTION_CONNECTION_MEMORY_LIMIT,
        state.options.max_header_bytes, MHD_OPTION_CONNECTION_TIMEOUT,
        static_cast<unsigned>(state.options.stalled_seconds), MHD_OPTION_NOTIFY_CONNECTION, changed, &state,
        MHD_OPTION_NOTIFY_COMPLETED, completed, &state, MHD_OPTION_UNESCAPE_CALLBACK, &unescape_path, nullptr,
        MHD_OPTION_END);
    REFRAG_CHECK(state.daemon != nullptr, Status::runtime,
                 "the HTTP server cannot be started: ", system_text(errno));
    state.looking = std::thread([&state] { state.look(); });
}

HttpServer::~HttpServer() {
    State& state = *state_;
    std::vector<std::shared_ptr<ConnectionExchange>> waiting;
    {
        const std::lock_guard<std::mutex> lock(state.mutex);
        state.stopping = true;
        for (const Connection& at : state.connections)
            if (at.exchange) waiting.push_back(at.exchange);
    }
    state.stop.notify_all();
    state.looking.join();
    // No connection may be suspended when the daemon stops.
    for (const auto& exchange : waiting) exchange->client_left();
    waiting.clear();
    MHD_stop_daemon(state.daemon);  // closes the socket that listens
}

uint16_t HttpServer::port() const {
    return state_->port;
}

size_t HttpServer::n_connections() const {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    return state_->connections.size();
}

void HttpServer::stop_listening() {
    if (state_->listening < 0) return;
    const MHD_socket quiesced = MHD_quiesce_daemon(state_->daemon);
    if (quiesced != MHD_INVALID_SOCKET) close(quiesced);
    state_->listening = -1;
}

}  // namespace refrag
