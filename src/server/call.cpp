// See call.h.
#include "server/call.h"

#include <limits>
#include <random>

#include "refrag/choice.h"

namespace refrag {
namespace {

void read_stops(BodyReader& body, const char* key, std::vector<std::string>& stops) {
    const std::optional<Json> given = body.find(key);
    if (!given) return;
    stops.clear();
    body.within(key, [&] {
        if (given->is_string()) {
            stops.emplace_back(given->as_string());
        } else {
            for (size_t i = 0; i < given->as_array().size(); ++i)
                stops.emplace_back(given->at(i).as_string());
        }
    });
}

// A word of an option, as the command line takes it.
template <typename Parse>
void read_word(BodyReader& body, const char* key, Parse&& parse) {
    if (const std::optional<std::string> word = body.text(key)) body.within(key, [&] { parse(*word); });
}

void set(float& to, const std::optional<double>& value) {
    if (value) to = static_cast<float>(*value);
}

uint64_t drawn_seed() {
    std::random_device device;
    return (uint64_t{device()} << 32) ^ device();
}

}  // namespace

CallOptions read_call_options(BodyReader& body, const AnswerOptions& defaults, const FieldNames& names) {
    CallOptions call;
    AnswerOptions& answer = call.answer = defaults;
    SamplerOptions& sampler = answer.sampler;
    set(sampler.temperature, body.number("temperature", 0.0, 100.0));
    set(sampler.top_p, body.number(names.top_p, 0.0, 1.0));
    if (const auto k = body.integer(names.top_k, -1, std::numeric_limits<int32_t>::max()))
        sampler.top_k = static_cast<int32_t>(*k);
    set(sampler.min_p, body.number("min_p", 0.0, 1.0));
    set(sampler.repetition_penalty, body.number("repetition_penalty", 0.0, 1e6));
    set(sampler.frequency_penalty, body.number("frequency_penalty", -2.0, 2.0));
    set(sampler.presence_penalty, body.number("presence_penalty", -2.0, 2.0));
    const auto seed = body.integer("seed", Json::min_int, Json::max_int);
    if (seed) {
        sampler.seed = static_cast<uint64_t>(*seed);
    } else if (sampler.temperature > 0.0f) {
        sampler.seed = drawn_seed();
    }
    read_stops(body, names.stop, answer.stop);
    answer.ignore_eos = body.boolean("ignore_eos").value_or(answer.ignore_eos);
    if (const auto p = body.number("expand_fraction", 0.0, 1.0)) answer.expand_fraction = *p;
    read_word(body, "policy", [&](const std::string& word) { answer.policy = parse_select_policy(word); });
    read_word(body, "unexpanded",
              [&](const std::string& word) { answer.unexpanded = parse_unexpanded(word); });
    call.seconds = body.number("timeout", 0.001, 86400.0);
    call.stream = body.boolean("stream").value_or(false);
    call.n = static_cast<int32_t>(body.integer("n", 1, max_choices).value_or(1));
    if (const std::optional<Json> options = body.find("stream_options")) {
        body.within("stream_options", [&] {
            options->as_object().check_keys(
                {"include_usage", "include_obfuscation", "continuous_usage_stats"});
            call.include_usage = options->get_bool_or("include_usage", false);
            call.usage_so_far = call.include_usage && options->get_bool_or("continuous_usage_stats", false);
        });
        if (!call.stream) refuse_request("stream_options", "stream_options: expected stream: true beside it");
    }
    return call;
}

void read_max_tokens(BodyReader& body, CallOptions& call, int32_t least) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    const auto old_name = body.integer("max_tokens", least, most);
    const auto new_name = body.integer("max_completion_tokens", least, most);
    if (old_name) call.answer.max_new_tokens = static_cast<int32_t>(*old_name);
    if (new_name) call.answer.max_new_tokens = static_cast<int32_t>(*new_name);
}

namespace {

std::string text_of_content(const Json& message) {
    const Json content = message.get("content");
    if (content.is_null()) return "";
    if (content.is_string()) return std::string(content.as_string());
    if (!content.is_array()) content.refuse("a string, or a list of text parts");
    std::string text;
    for (size_t i = 0; i < content.size(); ++i) {
        const Json part = content.at(i);
        const std::string type = part.as_object().get_string("type");
        if (type != "text" && type != "input_text" && type != "output_text")
            part.get("type").refuse("\"text\": this server reads nothing else");
        text += (i == 0 ? "" : "\n") + part.get_string("text");
    }
    return text;
}

struct Message {
    bool of_user = false;
    std::string text;
};

// System messages go into `conversation`, the others come back, neighbours of one role joined.
std::vector<Message> read_roles(const Json& list, Conversation& conversation) {
    std::vector<Message> messages;
    for (size_t i = 0; i < list.size(); ++i) {
        const Json message = list.at(i).as_object();
        const std::string role = message.get_string("role");
        const std::optional<Json> calls = message.find("tool_calls");
        if (message.find("function_call") || (calls && calls->as_array().size() > 0))
            message.refuse("a message without tool calls: this server knows no tools");
        std::string text = text_of_content(message);
        if (role == "system" || role == "developer") {
            if (!messages.empty()) message.get("role").refuse("system messages before all others");
            if (!conversation.system) conversation.system.emplace();
            *conversation.system += (conversation.system->empty() ? "" : "\n\n") + text;
            continue;
        }
        if (role != "user" && role != "assistant" && role != "chatbot")
            message.get("role").refuse("system, user or assistant");
        const bool of_user = role == "user";
        if (messages.empty() && !of_user) message.get("role").refuse("the user to speak first");
        if (!messages.empty() && messages.back().of_user == of_user) {
            messages.back().text += "\n\n" + text;
        } else {
            messages.push_back({of_user, std::move(text)});
        }
    }
    return messages;
}

}  // namespace

Conversation read_messages(BodyReader& body) {
    const std::optional<Json> list = body.find("messages");
    if (!list) refuse_request("messages", "messages: expected a list with at least one message, found none");
    return body.within("messages", [&] {
        Conversation conversation;
        std::vector<Message> messages = read_roles(list->as_array(), conversation);
        if (messages.empty() || !messages.back().of_user)
            fail(Status::usage, "messages: expected the last one to be the user's");
        conversation.question = std::move(messages.back().text);
        for (size_t i = 0; i + 1 < messages.size(); i += 2)
            conversation.turns.push_back({std::move(messages[i].text), std::move(messages[i + 1].text)});
        return conversation;
    });
}

std::vector<int32_t> ids_of(const Json& list, int64_t vocab_size) {
    std::vector<int32_t> ids;
    ids.reserve(list.as_array().size());
    for (size_t i = 0; i < list.size(); ++i)
        ids.push_back(static_cast<int32_t>(list.at(i).as_int(0, vocab_size - 1)));
    return ids;
}

std::span<const std::string_view> harmless_fields() {
    static constexpr std::string_view fields[] = {"user",
                                                  "metadata",
                                                  "service_tier",
                                                  "safety_identifier",
                                                  "prompt_cache_key",
                                                  "request_id",
                                                  "priority",
                                                  "cache_prompt",
                                                  "id_slot",
                                                  "return_progress",
                                                  "timings_per_token",
                                                  "parallel_tool_calls",
                                                  "prediction",
                                                  "prompt_cache_retention",
                                                  "safety_mode"};
    return fields;
}

}  // namespace refrag
