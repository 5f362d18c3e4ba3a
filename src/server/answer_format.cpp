// See answer_format.h.
#include "server/answer_format.h"

#include <algorithm>

#include "refrag/citations.h"

namespace refrag {

std::string AnswerFormat::broken(const ApiError& error) const {
    return sse_event(error_json(error)) + std::string(sse_done);
}

std::string sse_event(std::string_view json, std::string_view event) {
    std::string out;
    if (!event.empty()) out += str("event: ", event, "\n");
    return out + "data: " + std::string(json) + "\n\n";
}

size_t count_characters(std::string_view text) {
    return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char byte) {
        return (static_cast<unsigned char>(byte) & 0xC0) != 0x80;
    }));
}

void TokenPlaces::extend(const Tokenizer& tokenizer, const Answer& answer, bool continues_text) {
    while (bytes_.size() < answer.ids.size()) {
        const int32_t id = answer.ids[bytes_.size()];
        const std::string_view spelt = tokenizer.is_special(id) ? "" : tokenizer.token_bytes(id);
        bytes_.push_back(end_byte_ - std::min(end_byte_, dropped_));
        characters_.push_back(end_character_ - std::min(end_character_, dropped_));
        if (end_byte_ == 0 && !continues_text && spelt.starts_with(' ')) dropped_ = 1;
        end_byte_ += spelt.size();
        end_character_ += count_characters(spelt);
    }
}

size_t tokens_within(const std::vector<size_t>& begins, size_t n_bytes) {
    return static_cast<size_t>(std::lower_bound(begins.begin(), begins.end(), n_bytes) - begins.begin());
}

Usage usage_of(std::span<const ServedChoice> choices, size_t n_prompts) {
    Usage usage;
    const size_t n_each = n_prompts == 0 ? 1 : std::max<size_t>(1, choices.size() / n_prompts);
    for (const ServedChoice& choice : choices) {
        if (!choice.answer) continue;
        if (choice.index % n_each == 0) {
            usage.prompt += choice.answer->plain_tokens;
            usage.cached += choice.answer->n_reused;
        }
        usage.completion += choice.answer->ids.size();
    }
    return usage;
}

void write_usage(JsonWriter& json, const Usage& usage) {
    json.begin_object();
    json.key("prompt_tokens").integer(static_cast<int64_t>(usage.prompt));
    json.key("completion_tokens").integer(static_cast<int64_t>(usage.completion));
    json.key("total_tokens").integer(static_cast<int64_t>(usage.prompt + usage.completion));
    json.key("prompt_tokens_details").begin_object();
    json.key("cached_tokens").integer(static_cast<int64_t>(usage.cached));
    json.end_object().end_object();
}

const char* openai_finish(FinishReason reason) {
    switch (reason) {
        case FinishReason::end_token:
        case FinishReason::stop_string:
            return "stop";
        case FinishReason::max_tokens:
        case FinishReason::context_full:
        case FinishReason::cancelled:
        case FinishReason::deadline:
            break;
    }
    return "length";
}

void write_refrag(JsonWriter& json, const ServedChoice& choice, const Answer& answer, double retrieve_ms) {
    json.begin_object();
    json.key("chunks").integer(std::ssize(answer.chunks));
    json.key("expanded").integer(static_cast<int64_t>(answer.n_expanded));
    json.key("cached").integer(static_cast<int64_t>(answer.n_cached));
    json.key("positions").integer(static_cast<int64_t>(answer.positions));
    json.key("plain_tokens").integer(static_cast<int64_t>(answer.plain_tokens));
    json.key("reused_positions").integer(static_cast<int64_t>(answer.n_reused));
    json.key("policy").string(select_policy_name(answer.policy));
    json.key("unexpanded").string(unexpanded_name(answer.unexpanded));
    json.key("chunk_len").integer(answer.chunk_len);
    json.key("expand_fraction").number(answer.expand_fraction);
    json.key("queue_ms").number(answer.times.queue);
    json.key("retrieve_ms").number(retrieve_ms);
    json.key("ttft_ms").number(answer.ttft_ms);
    json.key("documents").begin_array();
    size_t document = 0;
    size_t at = 0;  // of the chunks, which come in the order of the segments
    for (size_t s = 0; choice.segments && s < choice.segments->size(); ++s) {
        if (!std::holds_alternative<PassageSegment>((*choice.segments)[s])) continue;
        size_t n_chunks = 0, n_expanded = 0, n_cached = 0;
        for (; at < answer.chunks.size() && answer.chunks[at].segment == s; ++at) {
            ++n_chunks;
            n_expanded += answer.chunks[at].expanded ? 1 : 0;
            n_cached += answer.chunks[at].cached ? 1 : 0;
        }
        const bool drops = answer.unexpanded == Unexpanded::drop;
        json.begin_object();
        json.key("id").string((*choice.documents)[document++].id);
        json.key("read").string(n_expanded == n_chunks ? "expanded"
                                : n_expanded > 0       ? "partly"
                                : drops                ? "left_out"
                                                       : "compressed");
        json.key("chunks").integer(static_cast<int64_t>(n_chunks));
        json.key("expanded").integer(static_cast<int64_t>(n_expanded));
        json.key("cached").integer(static_cast<int64_t>(n_cached));
        json.end_object();
    }
    json.end_array().end_object();
}

std::vector<Citation> AnswerFormat::citations_of(const ServedChoice& choice) const {
    if (!call_.cites || !choice.segments || !choice.documents || choice.documents->empty() || !choice.answer)
        return {};
    return find_citations(model_, *choice.segments, *choice.answer);
}

}  // namespace refrag
