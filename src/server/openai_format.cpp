// OpenAI's forms: chat.completion, chat.completion.chunk, text_completion.
#include <algorithm>

#include "server/answer_format.h"

namespace refrag {
namespace {

void write_head(JsonWriter& json, const CallInfo& call, const char* object) {
    json.begin_object();
    json.key("id").string(call.id);
    json.key("object").string(object);
    json.key("created").integer(call.created);
    json.key("model").string(call.model);
}

// A token's log-probability as chat has it; the object stays open.
void write_token(JsonWriter& json, const Tokenizer& tokenizer, const TokenLogprob& token) {
    const std::string_view bytes = tokenizer.token_bytes(token.id);
    json.begin_object();
    json.key("token").string(bytes);
    json.key("logprob").number(token.logprob);
    json.key("bytes").begin_array();
    for (const char byte : bytes) json.integer(static_cast<unsigned char>(byte));
    json.end_array();
}

// What chat and completions have in common.
class OpenAiFormat : public AnswerFormat {
  public:
    // object: of a stream's events.
    OpenAiFormat(const Model& model, CallInfo call, const char* object, bool continues_text)
        : AnswerFormat(model, std::move(call)), object_(object), continues_text_(continues_text) {}

    std::string close(std::span<const ServedChoice> choices) override {
        std::string out;
        if (call_.include_usage) {
            JsonWriter json;
            write_head(json, call_, object_);
            json.key("choices").begin_array().end_array();
            json.key("usage");
            write_usage(json, usage_of(choices, call_.n_prompts));
            json.end_object();
            out = sse_event(json.text());
        }
        return out + std::string(sse_done);
    }

  protected:
    // Of the log-probabilities, those of the text's first n_bytes.
    size_t tokens_so_far(const ServedChoice& choice, const Answer& answer, size_t n_bytes) const {
        if (!call_.logprobs) return 0;
        return tokens_within(choice.places.bytes(model_.tokenizer(), answer, continues_text_), n_bytes);
    }
    // All of them, but those of a stop string.
    size_t tokens_at_end(const ServedChoice& choice) const {
        const Answer& answer = *choice.answer;
        return answer.finish == FinishReason::stop_string ? tokens_so_far(choice, answer, answer.text.size())
                                                          : answer.logprobs.size();
    }

    // A chunk's usage, where a stream has any: null, or as far as the answer has come.
    void write_chunk_usage(JsonWriter& json, const Answer& so_far) const {
        if (!call_.include_usage) return;
        json.key("usage");
        if (call_.usage_so_far) {
            write_usage(json, {so_far.plain_tokens, so_far.ids.size(), so_far.n_reused});
        } else {
            json.null();
        }
    }

  private:
    const char* const object_;
    const bool continues_text_;
};

class OpenAiChat final : public OpenAiFormat {
  public:
    OpenAiChat(const Model& model, CallInfo call)
        : OpenAiFormat(model, std::move(call), "chat.completion.chunk", /*continues_text=*/false) {}

    std::string piece(ServedChoice& choice, std::string_view text, const Answer& so_far) override {
        std::string out = begin(choice, so_far);
        choice.n_bytes += text.size();
        return out + chunk(
                         choice, [&](JsonWriter& json) { json.key("content").string(text); }, so_far,
                         tokens_so_far(choice, so_far, choice.n_bytes), nullptr);
    }

    std::string last(ServedChoice& choice) override {
        const Answer& answer = *choice.answer;
        std::string out = begin(choice, answer);
        const auto write = [&](JsonWriter& json) {
            const std::vector<Citation> citations = citations_of(choice);
            if (citations.empty()) return;
            json.key("citations");
            write_citations(json, citations, answer.text, *choice.documents);
        };
        return out + chunk(choice, write, answer, tokens_at_end(choice), openai_finish(answer.finish));
    }

    std::string whole(std::span<const ServedChoice> choices) override {
        JsonWriter json;
        write_head(json, call_, "chat.completion");
        json.key("choices").begin_array();
        for (const ServedChoice& choice : choices) {
            const Answer& answer = *choice.answer;
            json.begin_object();
            json.key("index").integer(static_cast<int64_t>(choice.index));
            json.key("message").begin_object();
            json.key("role").string("assistant");
            json.key("content").string(answer.text);
            json.key("refusal").null();
            const std::vector<Citation> citations = citations_of(choice);
            if (!citations.empty()) {
                json.key("citations");
                write_citations(json, citations, answer.text, *choice.documents);
            }
            json.end_object();
            write_logprobs(json, answer, 0, tokens_at_end(choice));
            json.key("finish_reason").string(openai_finish(answer.finish));
            json.end_object();
        }
        json.end_array();
        json.key("usage");
        write_usage(json, usage_of(choices, call_.n_prompts));
        json.key("refrag");
        write_refrag(json, choices.front(), *choices.front().answer, call_.retrieve_ms);
        json.end_object();
        return json.text();
    }

  private:
    void write_logprobs(JsonWriter& json, const Answer& answer, size_t from, size_t to) const {
        json.key("logprobs");
        if (!call_.logprobs) {
            json.null();
            return;
        }
        json.begin_object().key("content").begin_array();
        for (size_t i = from; i < std::min(to, answer.logprobs.size()); ++i) {
            write_token(json, model_.tokenizer(), answer.logprobs[i].chosen);
            json.key("top_logprobs").begin_array();
            for (const TokenLogprob& other : answer.logprobs[i].top) {
                write_token(json, model_.tokenizer(), other);
                json.end_object();
            }
            json.end_array().end_object();
        }
        json.end_array();
        json.key("refusal").null();
        json.end_object();
    }

    std::string begin(ServedChoice& choice, const Answer& so_far) {
        if (choice.begun) return "";
        choice.begun = true;
        return chunk(
            choice,
            [](JsonWriter& json) {
                json.key("role").string("assistant");
                json.key("content").string("");
            },
            so_far, 0, nullptr);
    }

    // Tokens from choice.n_tokens to `n_tokens` go with it.
    template <typename WriteDelta>
    std::string chunk(ServedChoice& choice, WriteDelta&& write_delta, const Answer& answer, size_t n_tokens,
                      const char* finish) {
        JsonWriter json;
        write_head(json, call_, "chat.completion.chunk");
        json.key("choices").begin_array().begin_object();
        json.key("index").integer(static_cast<int64_t>(choice.index));
        json.key("delta").begin_object();
        write_delta(json);
        json.end_object();
        n_tokens = std::max(n_tokens, choice.n_tokens);
        if (call_.logprobs && n_tokens > choice.n_tokens) {
            write_logprobs(json, answer, choice.n_tokens, n_tokens);
        } else {
            json.key("logprobs").null();
        }
        choice.n_tokens = n_tokens;
        json.key("finish_reason");
        if (finish == nullptr) {
            json.null();
        } else {
            json.string(finish);
        }
        json.end_object().end_array();
        write_chunk_usage(json, answer);
        if (finish != nullptr) {
            json.key("refrag");
            write_refrag(json, choice, answer, call_.retrieve_ms);
        }
        json.end_object();
        return sse_event(json.text());
    }
};

class OpenAiText final : public OpenAiFormat {
  public:
    OpenAiText(const Model& model, CallInfo call)
        : OpenAiFormat(model, std::move(call), "text_completion", /*continues_text=*/true) {}

    std::string piece(ServedChoice& choice, std::string_view text, const Answer& so_far) override {
        std::string out = begin(choice, so_far);
        const size_t from = choice.n_tokens;
        choice.n_bytes += text.size();
        choice.n_tokens = std::max(from, tokens_so_far(choice, so_far, choice.n_bytes));
        return out + event(choice, so_far, text, nullptr,
                           [&](Logprobs& list) { add_answer(list, choice, so_far, from, choice.n_tokens); });
    }

    std::string last(ServedChoice& choice) override {
        const Answer& answer = *choice.answer;
        std::string out = begin(choice, answer);
        return out + event(choice, answer, "", openai_finish(answer.finish), [&](Logprobs& list) {
                   add_answer(list, choice, answer, choice.n_tokens, tokens_at_end(choice));
               });
    }

    std::string whole(std::span<const ServedChoice> choices) override {
        JsonWriter json;
        write_head(json, call_, "text_completion");
        json.key("choices").begin_array();
        for (const ServedChoice& choice : choices) {
            const Answer& answer = *choice.answer;
            json.begin_object();
            json.key("index").integer(static_cast<int64_t>(choice.index));
            json.key("text").string((call_.echo ? choice.prompt : "") + answer.text);
            Logprobs list;
            if (call_.echo) add_prompt(list, choice, answer);
            add_answer(list, choice, answer, 0, tokens_at_end(choice));
            write_logprobs(json, list);
            json.key("finish_reason").string(openai_finish(answer.finish));
            json.end_object();
        }
        json.end_array();
        json.key("usage");
        write_usage(json, usage_of(choices, call_.n_prompts));
        json.end_object();
        return json.text();
    }

  private:
    // The four lists of the completions form.
    struct Logprobs {
        struct Entry {
            const TokenLogprobs* logprobs = nullptr;  // null: nothing before it
            int32_t id = 0;
            size_t offset = 0;  // in characters
        };
        std::vector<Entry> entries;
    };

    void add_prompt(Logprobs& list, const ServedChoice& choice, const Answer& answer) const {
        if (!call_.logprobs) return;
        // Our own BOS is no part of the prompt that was given.
        const size_t before = answer.scores.size() - std::min(answer.scores.size(), choice.prompt_ids.size());
        size_t offset = 0;
        for (size_t i = before; i < answer.scores.size(); ++i) {
            const PromptScore& score = answer.scores[i];
            list.entries.push_back({score.logprobs ? &*score.logprobs : nullptr, score.id, offset});
            if (score.id >= 0) offset += count_characters(model_.tokenizer().token_bytes(score.id));
        }
    }

    void add_answer(Logprobs& list, const ServedChoice& choice, const Answer& answer, size_t from,
                    size_t to) const {
        if (!call_.logprobs) return;
        const std::vector<size_t>& begins =
            choice.places.characters(model_.tokenizer(), answer, /*continues_text=*/true);
        const size_t base = call_.echo ? count_characters(choice.prompt) : 0;
        for (size_t i = from; i < std::min(to, answer.logprobs.size()); ++i)
            list.entries.push_back({&answer.logprobs[i], answer.ids[i], base + begins[i]});
    }

    void write_logprobs(JsonWriter& json, const Logprobs& list) const {
        json.key("logprobs");
        if (!call_.logprobs) {
            json.null();
            return;
        }
        const Tokenizer& tokenizer = model_.tokenizer();
        json.begin_object();
        json.key("tokens").begin_array();
        for (const auto& entry : list.entries) json.string(tokenizer.token_bytes(entry.id));
        json.end_array();
        json.key("token_logprobs").begin_array();
        for (const auto& entry : list.entries) {
            if (entry.logprobs == nullptr) {
                json.null();
            } else {
                json.number(entry.logprobs->chosen.logprob);
            }
        }
        json.end_array();
        json.key("top_logprobs").begin_array();
        for (const auto& entry : list.entries) write_top(json, entry.logprobs);
        json.end_array();
        json.key("text_offset").begin_array();
        for (const auto& entry : list.entries) json.integer(static_cast<int64_t>(entry.offset));
        json.end_array().end_object();
    }

    // By spelling; of two tokens that are spelt alike (parts of a character) the more likely one stands.
    void write_top(JsonWriter& json, const TokenLogprobs* logprobs) const {
        if (logprobs == nullptr) {
            json.null();
            return;
        }
        json.begin_object();
        std::vector<std::string> written;
        const auto write = [&](const TokenLogprob& token) {
            std::string spelt = json_quote(model_.tokenizer().token_bytes(token.id));
            if (std::find(written.begin(), written.end(), spelt) != written.end()) return;
            json.key(model_.tokenizer().token_bytes(token.id)).number(token.logprob);
            written.push_back(std::move(spelt));
        };
        for (const TokenLogprob& token : logprobs->top) write(token);
        if (*call_.logprobs > 0) write(logprobs->chosen);
        json.end_object();
    }

    std::string begin(ServedChoice& choice, const Answer& so_far) {
        if (choice.begun) return "";
        choice.begun = true;
        if (!call_.echo) return "";
        return event(choice, so_far, choice.prompt, nullptr,
                     [&](Logprobs& list) { add_prompt(list, choice, so_far); });
    }

    template <typename AddLogprobs>
    std::string event(const ServedChoice& choice, const Answer& so_far, std::string_view text,
                      const char* finish, AddLogprobs&& add_logprobs) const {
        JsonWriter json;
        write_head(json, call_, "text_completion");
        json.key("choices").begin_array().begin_object();
        json.key("index").integer(static_cast<int64_t>(choice.index));
        json.key("text").string(text);
        Logprobs list;
        add_logprobs(list);
        write_logprobs(json, list);
        json.key("finish_reason");
        if (finish == nullptr) {
            json.null();
        } else {
            json.string(finish);
        }
        json.end_object().end_array();
        write_chunk_usage(json, so_far);
        json.end_object();
        return sse_event(json.text());
    }
};

}  // namespace

std::unique_ptr<AnswerFormat> openai_chat_format(const Model& model, CallInfo call) {
    return std::make_unique<OpenAiChat>(model, std::move(call));
}

std::unique_ptr<AnswerFormat> openai_text_format(const Model& model, CallInfo call) {
    return std::make_unique<OpenAiText>(model, std::move(call));
}

}  // namespace refrag
