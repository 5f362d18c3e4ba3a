// See http_client.h.
#include "remote/http_client.h"

#include <curl/curl.h>

#include <mutex>
#include <new>
#include <utility>

#include "base/check.h"
#include "io/file.h"

namespace refrag {
namespace {

void initialise_curl() {
    static std::once_flag once;
    static CURLcode result = CURLE_OK;
    std::call_once(once, [] { result = curl_global_init(CURL_GLOBAL_DEFAULT); });
    REFRAG_CHECK(result == CURLE_OK, Status::runtime, "libcurl: ", curl_easy_strerror(result));
}

void check_option(CURLcode code) {
    if (code == CURLE_OUT_OF_MEMORY) throw std::bad_alloc();
    REFRAG_CHECK(code == CURLE_OK, Status::runtime, "libcurl: ", curl_easy_strerror(code));
}

void check_multi(CURLMcode code) {
    if (code == CURLM_OUT_OF_MEMORY) throw std::bad_alloc();
    REFRAG_CHECK(code == CURLM_OK, Status::runtime, "libcurl: ", curl_multi_strerror(code));
}

struct FreeEasy {
    void operator()(CURL* handle) const { curl_easy_cleanup(handle); }
};
struct FreeList {
    void operator()(curl_slist* list) const { curl_slist_free_all(list); }
};
struct FreeMulti {
    void operator()(CURLM* handle) const { curl_multi_cleanup(handle); }
};

}  // namespace

struct HttpClient::Handles {
    std::unique_ptr<CURLM, FreeMulti> multi;
};

struct HttpClient::Running {
    Transfer transfer;
    CURLM* multi = nullptr;  // that it was added to
    bool* heard = nullptr;   // the client's
    std::unique_ptr<CURL, FreeEasy> easy;
    std::unique_ptr<curl_slist, FreeList> headers;
    char message[CURL_ERROR_SIZE] = {};

    ~Running() {
        if (multi != nullptr) curl_multi_remove_handle(multi, easy.get());
    }

    // Called by libcurl, which no exception may pass.
    static size_t take(char* bytes, size_t size, size_t n, void* user) noexcept {
        auto& running = *static_cast<Running*>(user);
        *running.heard = true;
        try {
            Transfer& transfer = running.transfer;
            if (transfer.status == 0) {
                long status = 0;
                curl_easy_getinfo(running.easy.get(), CURLINFO_RESPONSE_CODE, &status);
                transfer.status = static_cast<int>(status);
            }
            // A server may answer before it has read everything: until then libcurl reads on.
            curl_off_t sent = 0;
            curl_easy_getinfo(running.easy.get(), CURLINFO_SIZE_UPLOAD_T, &sent);
            if (!transfer.request.empty() && sent == static_cast<curl_off_t>(transfer.request.size()))
                std::string().swap(transfer.request);
            transfer.received.append(bytes, size * n);
        } catch (const std::bad_alloc&) {
            return 0;  // less than was given: the transfer fails
        }
        return size * n;
    }
};

void HttpClient::check_url(const std::string& url) {
    initialise_curl();
    const std::unique_ptr<CURLU, void (*)(CURLU*)> parsed(curl_url(), curl_url_cleanup);
    if (!parsed) throw std::bad_alloc();
    const bool valid = curl_url_set(parsed.get(), CURLUPART_URL, url.c_str(), 0) == CURLUE_OK &&
                       (url.starts_with("http://") || url.starts_with("https://"));
    REFRAG_CHECK(valid, Status::usage, "expected http://HOST:PORT/PATH or https://..., found \"",
                 printable(url), "\"");
}

HttpClient::HttpClient(HttpClientOptions options)
    : options_(std::move(options)), handles_(std::make_unique<Handles>()) {
    initialise_curl();
    handles_->multi.reset(curl_multi_init());
    if (!handles_->multi) throw std::bad_alloc();
}

HttpClient::~HttpClient() = default;

void HttpClient::start(uint64_t id, const std::string& url, std::string body) {
    auto running = std::make_unique<Running>();
    Transfer& transfer = running->transfer;
    running->heard = &heard_;
    transfer.url = url;
    transfer.request = std::move(body);
    running->easy.reset(curl_easy_init());
    CURL* easy = running->easy.get();
    if (easy == nullptr) throw std::bad_alloc();
    const auto header = [&](const std::string& line) {
        curl_slist* longer = curl_slist_append(running->headers.get(), line.c_str());
        if (longer == nullptr) throw std::bad_alloc();
        static_cast<void>(running->headers.release());  // it is part of `longer`
        running->headers.reset(longer);
    };
    if (!options_.key.empty()) header("Authorization: Bearer " + options_.key);
    check_option(curl_easy_setopt(easy, CURLOPT_URL, url.c_str()));
    check_option(curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https"));
    check_option(curl_easy_setopt(easy, CURLOPT_USERAGENT, "refrag/" REFRAG_VERSION));
    check_option(curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L));
    check_option(curl_easy_setopt(easy, CURLOPT_TCP_NODELAY, 1L));
    check_option(curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS,
                                  static_cast<long>(options_.connect_seconds * 1000.0)));
    check_option(curl_easy_setopt(easy, CURLOPT_LOW_SPEED_LIMIT, 1L));
    check_option(curl_easy_setopt(easy, CURLOPT_LOW_SPEED_TIME, static_cast<long>(options_.silent_seconds)));
    check_option(curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, running->message));
    check_option(curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, &Running::take));
    check_option(curl_easy_setopt(easy, CURLOPT_WRITEDATA, running.get()));
    check_option(curl_easy_setopt(easy, CURLOPT_PRIVATE, running.get()));
    if (!transfer.request.empty()) {
        header("Content-Type: application/json");
        header("Expect:");  // do not ask first whether the body is welcome
        check_option(curl_easy_setopt(easy, CURLOPT_POST, 1L));
        check_option(curl_easy_setopt(easy, CURLOPT_POSTFIELDSIZE_LARGE,
                                      static_cast<curl_off_t>(transfer.request.size())));
        check_option(curl_easy_setopt(easy, CURLOPT_POSTFIELDS, transfer.request.data()));
    }
    check_option(curl_easy_setopt(easy, CURLOPT_HTTPHEADER, running->headers.get()));
    Running& added = *(running_[id] = std::move(running));
    const CURLMcode code = curl_multi_add_handle(handles_->multi.get(), easy);
    if (code != CURLM_OK) running_.erase(id);
    check_multi(code);
    added.multi = handles_->multi.get();
}

void HttpClient::stop(uint64_t id) noexcept {
    running_.erase(id);
}

Transfer* HttpClient::find(uint64_t id) {
    const auto at = running_.find(id);
    return at == running_.end() ? nullptr : &at->second->transfer;
}

void HttpClient::wait(std::chrono::milliseconds most) {
    CURLM* multi = handles_->multi.get();
    heard_ = false;
    int n_running = 0;
    check_multi(curl_multi_perform(multi, &n_running));
    int n_left = 0;
    const auto take_ended = [&] {
        while (const CURLMsg* message = curl_multi_info_read(multi, &n_left)) {
            if (message->msg != CURLMSG_DONE) continue;
            heard_ = true;
            char* user = nullptr;
            curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &user);
            auto& running = *reinterpret_cast<Running*>(user);
            Transfer& transfer = running.transfer;
            transfer.ended = true;
            const CURLcode result = message->data.result;
            if (transfer.status == 0) {
                long status = 0;
                curl_easy_getinfo(message->easy_handle, CURLINFO_RESPONSE_CODE, &status);
                transfer.status = static_cast<int>(status);
            }
            if (result != CURLE_OK)
                transfer.failure = running.message[0] != '\0' ? running.message : curl_easy_strerror(result);
        }
    };
    take_ended();
    if (heard_ || most.count() == 0 || running_.empty()) return;
    check_multi(curl_multi_poll(multi, nullptr, 0, static_cast<int>(most.count()), nullptr));
    check_multi(curl_multi_perform(multi, &n_running));
    take_ended();
}

}  // namespace refrag
