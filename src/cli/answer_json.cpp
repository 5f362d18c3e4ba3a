// See answer_json.h.
#include "cli/answer_json.h"

#include "text/unicode.h"

namespace refrag {
namespace {

// "token", "id", "logprob"; "bytes" too where the token is not whole characters. The object stays open.
void write_token(JsonWriter& json, const Tokenizer& tokenizer, const TokenLogprob& token) {
    const std::string_view bytes = tokenizer.token_bytes(token.id);
    json.begin_object();
    json.key("token").string(bytes);
    json.key("id").integer(token.id);
    json.key("logprob").number(token.logprob);
    if (is_valid_utf8(bytes)) return;
    json.key("bytes").begin_array();
    for (const char byte : bytes) json.integer(static_cast<unsigned char>(byte));
    json.end_array();
}

}  // namespace

void write_times(JsonWriter& json, const StageTimes& times) {
    json.begin_object();
    json.key("queue").number(times.queue);
    json.key("tokenize").number(times.tokenize);
    json.key("encode").number(times.encode);
    json.key("sense").number(times.sense);
    json.key("project").number(times.project);
    json.key("prefill").number(times.prefill);
    json.key("sample").number(times.sample);
    json.key("decode").number(times.decode);
    json.end_object();
}

void write_answer(JsonWriter& json, const Tokenizer& tokenizer, std::string_view question,
                  const Answer& answer) {
    json.key("question").string(question);
    json.key("answer").string(answer.text);
    json.key("finish").string(finish_reason_name(answer.finish));
    if (answer.stop) json.key("stop").string(*answer.stop);
    json.key("policy").string(select_policy_name(answer.policy));
    json.key("unexpanded").string(unexpanded_name(answer.unexpanded));
    json.key("k").integer(answer.chunk_len);
    json.key("p").number(answer.expand_fraction);
    json.key("n_chunks").integer(std::ssize(answer.chunks));
    json.key("n_expanded").integer(static_cast<int64_t>(answer.n_expanded));
    json.key("n_cached").integer(static_cast<int64_t>(answer.n_cached));
    json.key("positions").integer(static_cast<int64_t>(answer.positions));
    json.key("n_reused").integer(static_cast<int64_t>(answer.n_reused));
    json.key("plain_tokens").integer(static_cast<int64_t>(answer.plain_tokens));
    json.key("new_tokens").integer(std::ssize(answer.ids));
    json.key("ttft_ms").number(answer.ttft_ms);
    json.key("tokens_per_s").number(answer.tokens_per_s);
    json.key("times_ms");
    write_times(json, answer.times);
    if (answer.logprobs.empty()) return;
    json.key("logprobs").begin_array();
    for (const TokenLogprobs& token : answer.logprobs) {
        write_token(json, tokenizer, token.chosen);
        json.key("top").begin_array();
        for (const TokenLogprob& other : token.top) {
            write_token(json, tokenizer, other);
            json.end_object();
        }
        json.end_array();
        json.end_object();
    }
    json.end_array();
}

void write_chunk(JsonWriter& json, const ChunkReport& chunk, std::string_view text) {
    json.key("begin").integer(static_cast<int64_t>(chunk.begin));
    json.key("end").integer(static_cast<int64_t>(chunk.end));
    json.key("text").string(text);
    json.key("tokens").integer(static_cast<int64_t>(chunk.n_tokens));
    json.key("logit");
    if (chunk.logit) {
        json.number(*chunk.logit);
    } else {
        json.null();
    }
    json.key("expanded").boolean(chunk.expanded);
    json.key("cached").boolean(chunk.cached);
    json.key("position").integer(chunk.position);
    json.key("n_positions").integer(chunk.n_positions);
}

void write_chunks(JsonWriter& json, const Model& model, std::span<const DocumentName> documents,
                  std::span<const Segment> segments, const Answer& answer) {
    std::vector<size_t> passage_of;  // [segments.size()]: how many passages came before
    size_t n_passages = 0;
    for (const Segment& segment : segments) {
        passage_of.push_back(n_passages);
        n_passages += std::holds_alternative<PassageSegment>(segment) ? 1 : 0;
    }
    json.key("chunks").begin_array();
    for (const ChunkReport& chunk : answer.chunks) {
        const auto cut = std::get<PassageSegment>(segments[chunk.segment]).passage->cut(model);
        const std::string_view text = cut->text();
        json.begin_object();
        json.key("document").string(documents[passage_of[chunk.segment]].id);
        write_chunk(json, chunk, text.substr(chunk.begin, chunk.end - chunk.begin));
        json.end_object();
    }
    json.end_array();
}

}  // namespace refrag
