// Cohere's form of chat, version 2: one object, or the events message-start, content-start, content-delta,
// content-end, citation-start, citation-end, message-end.
#include <algorithm>

#include "server/answer_format.h"

namespace refrag {
namespace {

const char* cohere_finish(FinishReason reason) {
    switch (reason) {
        case FinishReason::end_token:
            return "COMPLETE";
        case FinishReason::stop_string:
            return "STOP_SEQUENCE";
        case FinishReason::deadline:
            return "TIMEOUT";
        case FinishReason::max_tokens:
        case FinishReason::context_full:
        case FinishReason::cancelled:
            break;
    }
    return "MAX_TOKENS";
}

void write_cohere_usage(JsonWriter& json, const Usage& usage) {
    json.begin_object();
    for (const char* part : {"billed_units", "tokens"}) {
        json.key(part).begin_object();
        json.key("input_tokens").integer(static_cast<int64_t>(usage.prompt));
        json.key("output_tokens").integer(static_cast<int64_t>(usage.completion));
        json.end_object();
    }
    json.key("cached_tokens").integer(static_cast<int64_t>(usage.cached));
    json.end_object();
}

void write_cited(JsonWriter& json, const Citation& citation, const ServedChoice& choice) {
    write_citation(json, citation, choice.answer->text, *choice.documents);
    json.key("content_index").integer(0);
    json.key("type").string("TEXT_CONTENT");
    json.end_object();
}

class CohereChat final : public AnswerFormat {
  public:
    using AnswerFormat::AnswerFormat;

    std::string piece(ServedChoice& choice, std::string_view text, const Answer& so_far) override {
        std::string out = begin(choice);
        JsonWriter json;
        json.begin_object();
        json.key("type").string("content-delta");
        json.key("index").integer(0);
        json.key("delta").begin_object().key("message").begin_object().key("content").begin_object();
        json.key("text").string(text);
        json.end_object().end_object().end_object();
        choice.n_bytes += text.size();
        const size_t n = tokens_of(choice, so_far, choice.n_bytes);
        if (call_.logprobs && n > choice.n_tokens) {
            json.key("logprobs");
            write_logprobs(json, so_far, choice.n_tokens, n);
            choice.n_tokens = n;
        }
        json.end_object();
        return out + sse_event(json.text(), "content-delta");
    }

    std::string last(ServedChoice& choice) override {
        std::string out = begin(choice);
        out += indexed("content-end", 0, [](JsonWriter&) {});
        int64_t n = 0;
        for (const Citation& citation : citations_of(choice)) {
            out += indexed("citation-start", n, [&](JsonWriter& json) {
                json.key("delta").begin_object().key("message").begin_object().key("citations");
                write_cited(json, citation, choice);
                json.end_object().end_object();
            });
            out += indexed("citation-end", n++, [](JsonWriter&) {});
        }
        return out;
    }

    std::string close(std::span<const ServedChoice> choices) override {
        const ServedChoice& choice = choices.front();
        JsonWriter json;
        json.begin_object();
        json.key("type").string("message-end");
        json.key("id").string(call_.id);
        json.key("delta").begin_object();
        json.key("finish_reason").string(cohere_finish(choice.answer->finish));
        json.key("usage");
        write_cohere_usage(json, usage_of(choices, 1));
        json.key("refrag");
        write_refrag(json, choice, *choice.answer, call_.retrieve_ms);
        json.end_object().end_object();
        return sse_event(json.text(), "message-end") + std::string(sse_done);
    }

    std::string whole(std::span<const ServedChoice> choices) override {
        const ServedChoice& choice = choices.front();
        const Answer& answer = *choice.answer;
        JsonWriter json;
        json.begin_object();
        json.key("id").string(call_.id);
        json.key("finish_reason").string(cohere_finish(answer.finish));
        json.key("message").begin_object();
        json.key("role").string("assistant");
        json.key("content").begin_array().begin_object();
        json.key("type").string("text");
        json.key("text").string(answer.text);
        json.end_object().end_array();
        const std::vector<Citation> citations = citations_of(choice);
        if (!citations.empty()) {
            json.key("citations").begin_array();
            for (const Citation& citation : citations) write_cited(json, citation, choice);
            json.end_array();
        }
        json.end_object();
        if (call_.logprobs) {
            json.key("logprobs").begin_array();
            const size_t n = tokens_of(choice, answer, answer.text.size());
            for (size_t i = 0; i < n; ++i) write_logprobs(json, answer, i, i + 1);
            json.end_array();
        }
        json.key("usage");
        write_cohere_usage(json, usage_of(choices, 1));
        json.key("refrag");
        write_refrag(json, choice, answer, call_.retrieve_ms);
        json.end_object();
        return json.text();
    }

  private:
    std::string begin(ServedChoice& choice) {
        if (choice.begun) return "";
        choice.begun = true;
        JsonWriter json;
        json.begin_object();
        json.key("type").string("message-start");
        json.key("id").string(call_.id);
        json.key("delta").begin_object().key("message").begin_object();
        json.key("role").string("assistant");
        json.key("content").begin_array().end_array();
        json.key("tool_plan").string("");
        json.key("tool_calls").begin_array().end_array();
        json.key("citations").begin_array().end_array();
        json.end_object().end_object().end_object();
        return sse_event(json.text(), "message-start") + indexed("content-start", 0, [](JsonWriter& start) {
                   start.key("delta").begin_object().key("message").begin_object().key("content");
                   start.begin_object().key("type").string("text").key("text").string("");
                   start.end_object().end_object().end_object();
               });
    }

    template <typename Write>
    static std::string indexed(const char* type, int64_t index, Write&& write) {
        JsonWriter json;
        json.begin_object();
        json.key("type").string(type);
        json.key("index").integer(index);
        write(json);
        json.end_object();
        return sse_event(json.text(), type);
    }

    // Of the answer's log-probabilities, those of its text's first n_bytes.
    size_t tokens_of(const ServedChoice& choice, const Answer& answer, size_t n_bytes) const {
        if (!call_.logprobs) return 0;
        const size_t n = tokens_within(choice.places.bytes(model_.tokenizer(), answer, false), n_bytes);
        return std::min(n, answer.logprobs.size());
    }

    // Tokens from..to as one item.
    void write_logprobs(JsonWriter& json, const Answer& answer, size_t from, size_t to) const {
        json.begin_object();
        std::string text;
        json.key("token_ids").begin_array();
        for (size_t i = from; i < to; ++i) {
            json.integer(answer.ids[i]);
            text += model_.tokenizer().token_bytes(answer.ids[i]);
        }
        json.end_array();
        json.key("text").string(text);
        json.key("logprobs").begin_array();
        for (size_t i = from; i < to; ++i) json.number(answer.logprobs[i].chosen.logprob);
        json.end_array().end_object();
    }
};

}  // namespace

std::unique_ptr<AnswerFormat> cohere_chat_format(const Model& model, CallInfo call) {
    return std::make_unique<CohereChat>(model, std::move(call));
}

}  // namespace refrag
