// See api.h: chat/completions, completions, Cohere's chat.
#include <algorithm>
#include <limits>

#include "io/file.h"
#include "refrag/choice.h"
#include "server/api.h"

namespace refrag {
namespace {

// Fields that are let pass where they ask for nothing, and refused by name where they do.
void allow_nothing_in(BodyReader& body, std::initializer_list<const char*> keys) {
    for (const char* key : keys) {
        const std::optional<Json> value = body.find(key);
        if (!value) continue;
        const bool is_empty = ((value->is_array() || value->is_object()) && value->size() == 0) ||
                              (value->is_bool() && !value->as_bool());
        if (!is_empty) refuse_request(key, "\"", key, "\" is not supported by this server");
    }
}

// A field that may say what is done anyway.
void allow_words(BodyReader& body, const char* key, std::initializer_list<std::string_view> words) {
    const std::optional<std::string> word = body.text(key);
    if (!word || std::find(words.begin(), words.end(), *word) != words.end()) return;
    refuse_request(key, key, ": \"", printable(*word, 60), "\" is not supported by this server");
}

void read_response_format(BodyReader& body) {
    const std::optional<Json> format = body.find("response_format");
    if (!format) return;
    body.within("response_format", [&] {
        if (format->get_string("type") != "text") format->get("type").refuse("\"text\"");
    });
}

void read_tools(BodyReader& body) {
    allow_nothing_in(body, {"tools", "functions", "strict_tools"});
    if (const std::optional<Json> choice = body.find("tool_choice")) {
        if (!choice->is_string() ||
            (choice->as_string() != "none" && choice->as_string() != "auto" && choice->as_string() != "NONE"))
            refuse_request("tool_choice", "\"tool_choice\" is not supported by this server");
    }
}

void read_chat_logprobs(BodyReader& body, AnswerOptions& answer) {
    const bool wanted = body.boolean("logprobs").value_or(false);
    const auto top = body.integer("top_logprobs", 0, max_top_logprobs);
    if (top && *top > 0 && !wanted)
        refuse_request("top_logprobs", "top_logprobs: expected logprobs: true beside it");
    if (wanted) answer.logprobs = static_cast<int32_t>(top.value_or(0));
}

}  // namespace

void Api::answer_chat(const std::shared_ptr<Exchange>& exchange, const Conversation& conversation,
                      Sources&& sources, const CallOptions& call, std::unique_ptr<AnswerFormat> format) {
    AnswerOptions options = call.answer;
    options.chunk_len = sources.chunk_len;
    if (!sources.passages.empty()) check_model_can(model_, options);
    check_answer_options(call.answer);
    const auto segments = std::make_shared<std::vector<Segment>>(
        make_segments(model_, conversation.turns, sources.passages, conversation.question, sources.chunk_len,
                      conversation.system));
    const auto documents = std::make_shared<std::vector<CitedDocument>>(std::move(sources.documents));
    std::vector<Completion::Part> parts;
    for (int32_t i = 0; i < call.n; ++i) {
        Completion::Part part;
        part.choice.index = static_cast<size_t>(i);
        part.choice.segments = segments;
        part.choice.documents = documents;
        part.segments = *segments;
        part.options = options;
        part.options.sampler.seed += static_cast<uint64_t>(i);
        parts.push_back(std::move(part));
    }
    const auto completion =
        std::make_shared<Completion>(scheduler_, metrics_, exchange, std::move(format), call.stream);
    completion->start(std::move(parts), deadline_of(exchange->request, call));
}

void Api::chat_completions(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    BodyReader body(exchange->request.body);
    check_model(body);
    CallOptions call = read_call_options(body, options_.defaults);
    read_max_tokens(body, call, 1);
    read_chat_logprobs(body, call.answer);
    read_tools(body);
    read_response_format(body);
    allow_nothing_in(body, {"logit_bias", "web_search_options", "audio"});
    if (const std::optional<Json> kinds = body.find("modalities")) {
        body.within("modalities", [&] {
            for (size_t i = 0; i < kinds->as_array().size(); ++i)
                if (kinds->at(i).as_string() != "text") kinds->at(i).refuse("\"text\"");
        });
    }
    const Conversation conversation = read_messages(body);
    Sources sources = sources_.read(body, conversation.question);
    body.finish(harmless_fields());
    CallInfo info = call_info("chatcmpl-", call);
    info.retrieve_ms = sources.retrieve_ms;
    answer_chat(exchange, conversation, std::move(sources), call,
                openai_chat_format(model_, std::move(info)));
}

void Api::cohere_chat(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    BodyReader body(exchange->request.body);
    check_model(body);
    CallOptions call = read_call_options(body, options_.defaults, {"p", "k", "stop_sequences"});
    if (call.n != 1) refuse_request("n", "n: expected 1, found ", call.n);
    read_max_tokens(body, call, 1);
    if (body.boolean("logprobs").value_or(false)) call.answer.logprobs = 0;
    read_tools(body);
    read_response_format(body);
    if (const std::optional<Json> thinking = body.find("thinking")) {
        body.within("thinking", [&] {
            if (thinking->get_string("type") != "disabled") thinking->get("type").refuse("\"disabled\"");
        });
    }
    bool cites = true;
    if (const std::optional<Json> options = body.find("citation_options")) {
        body.within("citation_options", [&] {
            const std::string mode = options->get_string_or("mode", "ACCURATE");
            cites = mode != "OFF" && mode != "off" && mode != "disabled";
            if (cites && mode != "ACCURATE" && mode != "FAST" && mode != "accurate" && mode != "fast" &&
                mode != "enabled")
                options->get("mode").refuse("ACCURATE, FAST or OFF");
        });
    }
    const Conversation conversation = read_messages(body);
    Sources sources = sources_.read(body, conversation.question);
    body.finish(harmless_fields());
    CallInfo info = call_info("", call);
    info.cites = cites;
    info.retrieve_ms = sources.retrieve_ms;
    answer_chat(exchange, conversation, std::move(sources), call,
                cohere_chat_format(model_, std::move(info)));
}

namespace {

struct TextPrompt {
    std::vector<int32_t> ids;
    std::string text;      // as it is echoed
    bool is_text = false;  // BOS comes first; ids are taken as they are
};

// A string, a list of strings, a list of ids, or a list of lists of ids.
std::vector<TextPrompt> read_prompts(BodyReader& body, const Model& model) {
    const std::optional<Json> given = body.find("prompt");
    if (!given) refuse_request("prompt", "prompt: expected a string, ids, or a list of either, found none");
    const Tokenizer& tokenizer = model.tokenizer();
    const auto of_text = [&](std::string_view text) {
        return TextPrompt{tokenizer.encode_ids(text, /*parse_special=*/true), std::string(text), true};
    };
    const auto of_ids = [&](const Json& list) {
        TextPrompt prompt{ids_of(list, model.decoder().config().vocab_size), "", false};
        prompt.text = tokenizer.decode(prompt.ids, false);
        return prompt;
    };
    return body.within("prompt", [&] {
        std::vector<TextPrompt> prompts;
        if (given->is_string()) {
            prompts.push_back(of_text(given->as_string()));
        } else if (given->as_array().size() > 0 && given->at(0).is_number()) {
            prompts.push_back(of_ids(*given));
        } else {
            for (size_t i = 0; i < given->size(); ++i)
                prompts.push_back(given->at(i).is_string() ? of_text(given->at(i).as_string())
                                                           : of_ids(given->at(i).as_array()));
        }
        if (prompts.empty()) given->refuse("at least one prompt");
        return prompts;
    });
}

}  // namespace

void Api::completions(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    BodyReader body(exchange->request.body);
    check_model(body);
    AnswerOptions defaults = options_.defaults;
    defaults.max_new_tokens = 16;
    defaults.continues_text = true;
    CallOptions call = read_call_options(body, defaults);
    read_max_tokens(body, call, 0);
    const auto logprobs = body.integer("logprobs", 0, max_top_logprobs);
    if (logprobs) call.answer.logprobs = static_cast<int32_t>(*logprobs);
    const bool echo = body.boolean("echo").value_or(false);
    if (echo && logprobs) call.answer.prompt_logprobs = call.answer.logprobs;
    if (const auto best_of = body.integer("best_of", 1, max_choices); best_of && *best_of != call.n)
        refuse_request("best_of", "best_of: expected n, ", call.n, ", found ", *best_of);
    allow_nothing_in(body, {"logit_bias"});
    allow_words(body, "suffix", {""});
    read_response_format(body);
    if (const std::optional<Json> store = body.find("store"); store && !store->is_bool())
        refuse_request("store", "\"store\" is not supported here: /v1/chat/completions reads passages");
    const std::vector<TextPrompt> prompts = read_prompts(body, model_);
    body.finish(harmless_fields());
    check_answer_options(call.answer);
    std::vector<Completion::Part> parts;
    for (const TextPrompt& prompt : prompts) {
        for (int32_t i = 0; i < call.n; ++i) {
            Completion::Part part;
            part.choice.index = parts.size();
            part.choice.prompt = prompt.text;
            part.choice.prompt_ids = prompt.ids;
            std::vector<int32_t> ids = prompt.ids;
            const std::optional<int32_t> bos = model_.bos_id();
            // A prompt that has it already keeps the one.
            if (prompt.is_text && bos && (ids.empty() || ids.front() != *bos)) ids.insert(ids.begin(), *bos);
            part.segments.emplace_back(TokenSegment{std::move(ids)});
            part.options = call.answer;
            part.options.sampler.seed += static_cast<uint64_t>(i);
            parts.push_back(std::move(part));
        }
    }
    CallInfo info = call_info("cmpl-", call);
    info.echo = echo;
    info.n_prompts = prompts.size();
    const auto completion = std::make_shared<Completion>(scheduler_, metrics_, exchange,
                                                         openai_text_format(model_, std::move(info)),
                                                         call.stream, prompts.size());
    completion->start(std::move(parts), deadline_of(exchange->request, call));
}

}  // namespace refrag
