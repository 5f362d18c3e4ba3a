// See vllm_decoder.h.
#include "remote/vllm_decoder.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "io/json.h"
#include "remote/tensor_file.h"

namespace refrag {
namespace {

constexpr size_t kMaxEventBytes = size_t{64} << 20;  // of one event, and of a refusal
constexpr int64_t kMostNames = 10;                   // in a message

HttpClientOptions client_options(const VllmOptions& options) {
    return {.key = options.key, .silent_seconds = options.silent_seconds};
}

// What a server says of its refusal: {"error": {"message"}}, as vLLM has it, or the body's beginning.
std::string refusal_of(const Transfer& transfer) {
    try {
        const Json body = Json::parse(transfer.received, "response");
        if (const auto error = body.find("error")) {
            if (error->is_string()) return printable(error->as_string(), 500);
            return printable(error->get_string("message"), 500);
        }
        return printable(body.get_string("message"), 500);
    } catch (const Error&) {
        return printable(transfer.received, 200);
    }
}

[[noreturn]] void refuse_status(const std::string& name, const Transfer& transfer) {
    const std::string refusal = refusal_of(transfer);
    fail(Status::unavailable, name, ": HTTP ", transfer.status, refusal.empty() ? "" : ": ", refusal);
}

// The id in "token_id:5", as "return_tokens_as_token_ids" has it.
int32_t token_of(std::string_view name, const Json& place) {
    constexpr std::string_view prefix = "token_id:";
    int32_t id = -1;
    if (name.starts_with(prefix)) {
        const char* end = name.data() + name.size();
        const auto result = std::from_chars(name.data() + prefix.size(), end, id);
        if (result.ec != std::errc() || result.ptr != end) id = -1;
    }
    if (id < 0) place.refuse("\"token_id:N\"");
    return id;
}

double logprob_of(const Json& value) {
    // "-Infinity" is no JSON; vLLM writes -9999 for it.
    return value.as_number(-std::numeric_limits<double>::max(), 1.0);
}

// The n_top most likely of {"token_id:N": log-probability}.
TokenLogprobs logprobs_of(int32_t chosen, const Json& chosen_logprob, const Json& top, int32_t n_top) {
    TokenLogprobs out;
    out.chosen = {chosen, logprob_of(chosen_logprob)};
    for (size_t i = 0; i < top.size(); ++i)
        out.top.push_back({token_of(top.key_at(i), top), logprob_of(top.at(i))});
    std::sort(out.top.begin(), out.top.end(), [](const TokenLogprob& a, const TokenLogprob& b) {
        return a.logprob != b.logprob ? a.logprob > b.logprob : a.id < b.id;
    });
    if (std::ssize(out.top) > n_top) out.top.resize(static_cast<size_t>(n_top));
    return out;
}

class VllmAnswers final : public RemoteAnswers {
  public:
    VllmAnswers(const VllmOptions& options, std::string name)
        : options_(options), name_(std::move(name)), client_(client_options(options)) {}

    void start(uint64_t ticket, const RemotePrompt& prompt) override {
        const uint64_t bytes = base64_bytes(prompt.rows.size() * sizeof(uint16_t));
        REFRAG_CHECK(bytes <= options_.max_body_bytes, Status::too_long, "the prompt takes ", prompt.n_rows,
                     " decoder positions, which are ", bytes, " bytes as vectors, more than the ",
                     options_.max_body_bytes, " of --decoder-max-body");
        streams_[ticket].n_top = prompt.drawing.logprobs.value_or(-1);
        try {
            client_.start(ticket, options_.url + "/completions", body_of(prompt));
        } catch (...) {
            streams_.erase(ticket);
            throw;
        }
    }

    void stop(uint64_t ticket) noexcept override {
        client_.stop(ticket);
        streams_.erase(ticket);
    }

    void wait(std::chrono::milliseconds most) override { client_.wait(most); }

    RemoteNews take(uint64_t ticket) override {
        RemoteNews news;
        Transfer* transfer = client_.find(ticket);
        if (transfer == nullptr) return news;
        try {
            hear(*transfer, streams_[ticket], news);
        } catch (const Error& error) {
            news.ended = true;
            news.error = error.status() == Status::bad_input
                             ? Error(Status::unavailable, str(name_, ": ", error.message()))
                             : error;
        }
        return news;
    }

  private:
    struct Stream {
        int32_t n_top = -1;     // alternatives to tell of; -1: no log-probabilities
        size_t n_heard = 0;     // bytes of `received` that hold no whole event
        bool finished = false;  // a finish_reason has come
    };

    std::string body_of(const RemotePrompt& prompt) const;
    void hear(Transfer& transfer, Stream& stream, RemoteNews& news) const;
    void hear_event(std::string_view data, Stream& stream, RemoteNews& news) const;
    void hear_tokens(const Json& choice, const Stream& stream, RemoteNews& news) const;

    const VllmOptions options_;
    const std::string name_;
    HttpClient client_;
    std::unordered_map<uint64_t, Stream> streams_;
};

std::string VllmAnswers::body_of(const RemotePrompt& prompt) const {
    const SequenceRunner::Drawing& drawing = prompt.drawing;
    const SamplerOptions& sampler = drawing.sampler;
    JsonWriter json;
    json.begin_object();
    json.key("model").string(options_.model);
    if (prompt.rows.empty()) {
        json.key("prompt").begin_array();
        for (const int32_t id : prompt.ids) json.integer(id);
        json.end_array();
    }
    json.key("max_tokens").integer(prompt.max_new);
    json.key("temperature").number(sampler.temperature);
    json.key("top_p").number(sampler.top_p);
    json.key("top_k").integer(std::max(sampler.top_k, 0));
    json.key("min_p").number(sampler.min_p);
    json.key("presence_penalty").number(sampler.presence_penalty);
    json.key("frequency_penalty").number(sampler.frequency_penalty);
    // Its seeds have 64 bits with a sign.
    json.key("seed").integer(static_cast<int64_t>(sampler.seed & std::numeric_limits<int64_t>::max()));
    json.key("ignore_eos").boolean(drawing.ignore_eos);
    if (drawing.ignore_eos) {
        json.key("logit_bias").begin_object();
        for (const int32_t id : drawing.end_ids) json.key(std::to_string(id)).integer(-100);
        json.end_object();
    } else {
        json.key("stop_token_ids").begin_array();
        for (const int32_t id : drawing.end_ids) json.integer(id);
        json.end_array();
    }
    if (drawing.logprobs) {
        json.key("logprobs").integer(*drawing.logprobs);
        json.key("return_tokens_as_token_ids").boolean(true);
    }
    json.key("stream").boolean(true);
    json.key("return_token_ids").boolean(true);
    if (prompt.rows.empty()) {
        json.end_object();
        return json.text();
    }
    std::string body = json.text();
    body += ",\"prompt_embeds\":\"";
    add_base64(body, bf16_tensor_file(prompt.rows, prompt.n_rows, prompt.dim));
    body += "\"}";
    return body;
}

// Server-sent events: lines "data: ..." with a blank line after each.
void VllmAnswers::hear(Transfer& transfer, Stream& stream, RemoteNews& news) const {
    const bool answered = transfer.status == 200;
    REFRAG_CHECK(transfer.received.size() <= kMaxEventBytes, Status::unavailable, name_,
                 ": an event of more than ", kMaxEventBytes, " bytes");
    size_t begin = 0;
    while (answered && !news.ended) {
        const size_t end = transfer.received.find('\n', std::max(begin, stream.n_heard));
        if (end == std::string::npos) break;
        std::string_view line = std::string_view(transfer.received).substr(begin, end - begin);
        if (line.ends_with('\r')) line.remove_suffix(1);
        begin = end + 1;
        if (!line.starts_with("data:")) continue;
        line.remove_prefix(5);
        if (line.starts_with(' ')) line.remove_prefix(1);
        if (line == "[DONE]") {
            REFRAG_CHECK(stream.finished, Status::unavailable, name_,
                         ": the answer ended without a finish_reason");
            continue;
        }
        hear_event(line, stream, news);
    }
    if (answered) {
        transfer.received.erase(0, begin);
        stream.n_heard = transfer.received.size();
    }
    if (news.ended || !transfer.ended) return;
    if (transfer.status != 0 && !answered && transfer.failure.empty()) refuse_status(name_, transfer);
    REFRAG_CHECK(transfer.status != 0, Status::unavailable, name_,
                 ": no answer: ", transfer.failure.empty() ? "the connection was closed" : transfer.failure);
    fail(Status::unavailable, name_, ": the answer broke off: ",
         transfer.failure.empty() ? "the connection was closed" : transfer.failure);
}

void VllmAnswers::hear_event(std::string_view data, Stream& stream, RemoteNews& news) const {
    const Json event = Json::parse(data, "event");
    if (const auto error = event.find("error"))
        fail(Status::unavailable, name_, ": ",
             error->is_string() ? printable(error->as_string(), 500)
                                : printable(error->get_string("message"), 500));
    const Json choices = event.get_array("choices");
    if (choices.size() == 0 || stream.finished) return;  // usage
    const Json choice = choices.at(0);
    hear_tokens(choice, stream, news);
    const auto reason = choice.find("finish_reason");
    if (!reason) return;
    stream.finished = true;
    news.ended = true;
    const std::string_view word = reason->as_string();
    news.at_end = word == "stop";
    REFRAG_CHECK(word == "stop" || word == "length", Status::unavailable, name_,
                 ": the answer was given up: finish_reason \"", printable(word), "\"");
}

void VllmAnswers::hear_tokens(const Json& choice, const Stream& stream, RemoteNews& news) const {
    const auto ids = choice.find("token_ids");
    if (!ids) {
        // The last event may bring none.
        REFRAG_CHECK(choice.get_string_or("text", "").empty(), Status::unavailable, name_,
                     ": no \"token_ids\" come back: expected vLLM 0.10.2 or later");
        return;
    }
    std::optional<Json> values, top;
    if (stream.n_top >= 0 && ids->as_array().size() > 0) {
        const Json logprobs = choice.get_object("logprobs");
        values = logprobs.get_array("token_logprobs");
        top = logprobs.get_array("top_logprobs");
        if (values->size() != ids->size()) values->refuse(str("one for each of ", ids->size(), " tokens"));
        if (top->size() != ids->size()) top->refuse(str("one for each of ", ids->size(), " tokens"));
    }
    for (size_t i = 0; i < ids->as_array().size(); ++i) {
        RemoteToken token;
        token.id = static_cast<int32_t>(ids->at(i).as_int(0, std::numeric_limits<int32_t>::max()));
        if (values) token.logprobs = logprobs_of(token.id, values->at(i), top->at(i), stream.n_top);
        news.tokens.push_back(std::move(token));
    }
}

}  // namespace

VllmDecoder::VllmDecoder(VllmOptions options) : options_(std::move(options)) {
    while (options_.url.ends_with('/')) options_.url.pop_back();
    HttpClient::check_url(options_.url);
    HttpClientOptions http = client_options(options_);
    http.silent_seconds = std::min(http.silent_seconds, 30.0);
    HttpClient client(http);
    const std::string url = options_.url + "/models";
    client.start(0, url, "");
    const Transfer& transfer = *client.find(0);
    while (!transfer.ended) client.wait(std::chrono::milliseconds(100));
    REFRAG_CHECK(transfer.failure.empty(), Status::unavailable, url, ": ", transfer.failure);
    if (transfer.status != 200) refuse_status(url, transfer);
    try {
        const Json models = Json::parse(transfer.received, url).get_array("data");
        std::string names;
        for (size_t i = 0; i < models.size(); ++i) {
            const Json model = models.at(i);
            const std::string name = model.get_string("id");
            if (static_cast<int64_t>(i) < kMostNames)
                names += str(names.empty() ? "" : ", ", printable(name));
            if (name != options_.model && !(options_.model.empty() && models.size() == 1)) continue;
            options_.model = name;
            max_context_ = model.get_int("max_model_len", 1, std::numeric_limits<int32_t>::max());
        }
        REFRAG_CHECK(max_context_ > 0, Status::usage, url, ": expected ",
                     options_.model.empty() ? "one model, or its name by --decoder-model"
                                            : "a model named " + printable(options_.model),
                     ", found ", names.empty() ? "none" : names);
    } catch (const Error& error) {
        if (error.status() != Status::bad_input) throw;
        throw Error(Status::unavailable, error.message());
    }
}

std::unique_ptr<RemoteAnswers> VllmDecoder::open() const {
    return std::make_unique<VllmAnswers>(options_, name());
}

}  // namespace refrag
