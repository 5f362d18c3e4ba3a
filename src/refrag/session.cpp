// See session.h. answer() is the path of a request in the order of the paper's Figure 1.
#include "refrag/session.h"

#include <algorithm>
#include <chrono>

#include "refrag/scoring.h"

namespace refrag {
namespace {

double now_ms() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(now).count();
}

// Adds the time from its making to its end to a counter.
class StageTimer {
  public:
    explicit StageTimer(double& counter_ms) : counter_ms_(counter_ms), started_ms_(now_ms()) {}
    StageTimer(const StageTimer&) = delete;
    StageTimer& operator=(const StageTimer&) = delete;
    ~StageTimer() { counter_ms_ += now_ms() - started_ms_; }

  private:
    double& counter_ms_;
    double started_ms_;
};

std::vector<int32_t> template_ids(const Tokenizer& tokenizer, const std::string& piece) {
    return piece.empty() ? std::vector<int32_t>{} : tokenizer.encode_ids(piece, /*parse_special=*/true);
}

int64_t checked_context(const Model& model, int64_t max_context) {
    const int64_t window = model.decoder().config().max_seq_len;
    REFRAG_CHECK(max_context >= 0 && max_context <= window, Status::usage, "context size: expected at most ",
                 window, " positions (the decoder's max_position_embeddings), found ", max_context);
    return max_context == 0 ? window : max_context;
}

}  // namespace

const char* finish_reason_name(FinishReason reason) {
    switch (reason) {
        case FinishReason::end_token:
            return "end";
        case FinishReason::max_tokens:
            return "length";
        case FinishReason::context_full:
            return "context";
    }
    return "?";
}

Session::Session(const Model& model, int64_t max_context)
    : model_(model),
      max_context_(checked_context(model, max_context)),
      kv_(model.decoder().make_kv_cache(1, max_context_)),
      arena_(model.backend()) {}

Answer Session::answer(std::span<ContextPassage> passages, std::string_view question,
                       const AnswerOptions& options, const TextSink& sink) {
    const double started_ms = now_ms();
    Sampler sampler(options.sampler);
    Answer answer;
    answer.chunk_len = options.chunk_len == 0 ? model_.config().chunk_len : options.chunk_len;
    answer.expand_fraction = options.expand_fraction.value_or(model_.config().expand_fraction);
    if (options.policy == SelectPolicy::none) answer.expand_fraction = 0.0;
    if (options.policy == SelectPolicy::all) answer.expand_fraction = 1.0;

    std::vector<int32_t> question_ids;
    {
        const StageTimer timer(answer.times.tokenize);
        question_ids = model_.tokenizer().encode_ids(question);
        for (size_t p = 0; p < passages.size(); ++p) {
            passages[p].tokenize(model_, answer.chunk_len);
            for (size_t c = 0; c < passages[p].chunks().size(); ++c) {
                const Chunk& chunk = passages[p].chunks()[c];
                ChunkReport report;
                report.passage = p;
                report.begin = chunk.begin;
                report.end = chunk.end;
                report.n_tokens = chunk.ids.size();
                report.cached = passages[p].has_embedding(c);
                answer.n_cached += report.cached ? 1 : 0;
                answer.chunks.push_back(report);
            }
        }
    }

    // What cannot fit is refused before the encoder works for nothing: with the fewest positions it can take.
    {
        const StageTimer timer(answer.times.prefill);
        const bool everything = answer.expand_fraction == 1.0;
        check_fits(assemble(passages, question_ids, std::vector<bool>(answer.chunks.size(), everything)),
                   everything ? "" : "at least ");
    }

    const ArenaScope scratch(arena_);
    const std::vector<bool> expanded = sense(passages, question, options, answer);
    {
        // After a choice that needs no embeddings, only what stays compressed is encoded.
        const StageTimer timer(answer.times.encode);
        std::vector<bool> compressed(expanded);
        compressed.flip();
        if (!compressed.empty()) encode_chunks(model_, passages, compressed, arena_);
    }

    DecoderInput input;
    {
        const StageTimer timer(answer.times.prefill);
        input = assemble(passages, question_ids, expanded);
    }
    for (size_t i = 0; i < answer.chunks.size(); ++i) {
        answer.chunks[i].expanded = expanded[i];
        answer.chunks[i].position = input.chunk_position[i];
        answer.chunks[i].slots = input.chunk_rows[i];
        answer.n_expanded += expanded[i] ? 1 : 0;
    }
    answer.positions = input.source.size();
    answer.plain_tokens = input.plain_tokens;
    check_fits(input, "");

    Tensor slots;
    {
        const StageTimer timer(answer.times.project);
        slots = project(passages, input.slot_chunk);
    }
    Tensor hidden;
    {
        const StageTimer timer(answer.times.prefill);
        kv_.truncate(0, 0);
        hidden = prefill(model_.decoder(), input.source, slots, kv_, 0, 1, arena_);
    }
    generate(hidden, options.max_new_tokens, sampler, sink, started_ms, answer);
    return answer;
}

void Session::check_fits(const DecoderInput& input, const char* at_least) const {
    REFRAG_CHECK(!input.source.empty(), Status::usage,
                 "the prompt is empty: no passage, no question, no template");
    REFRAG_CHECK(std::ssize(input.source) < max_context_, Status::runtime, "the prompt takes ", at_least,
                 input.source.size(), " decoder positions (", input.plain_tokens,
                 " tokens) and leaves no room for an answer in a context of ", max_context_,
                 ": give fewer passages, expand less, or raise -c up to the decoder's window of ",
                 model_.decoder().config().max_seq_len);
}

std::vector<bool> Session::sense(std::span<ContextPassage> passages, std::string_view question,
                                 const AnswerOptions& options, Answer& answer) {
    const int64_t n_chunks = std::ssize(answer.chunks);
    const int64_t wanted = n_expand(answer.expand_fraction, n_chunks);
    const bool known = wanted == 0 || wanted == n_chunks;
    std::vector<float> scores;
    switch (options.policy) {
        case SelectPolicy::model:
            if (!known || options.want_logits) scores = policy_logits(passages, question, answer);
            break;
        case SelectPolicy::perplexity_asc:
        case SelectPolicy::perplexity_desc:
            if (!known || options.want_logits) {
                const StageTimer timer(answer.times.sense);
                std::vector<std::vector<int32_t>> ids;
                for (const ContextPassage& passage : passages) {
                    for (const Chunk& chunk : passage.chunks()) ids.push_back(chunk.ids);
                }
                scores = mean_nll_alone(model_, ids, arena_);
            }
            break;
        case SelectPolicy::none:
        case SelectPolicy::all:
        case SelectPolicy::random:
            break;
    }
    const StageTimer timer(answer.times.sense);
    for (size_t i = 0; i < scores.size(); ++i) answer.chunks[i].logit = scores[i];
    return select_chunks(options.policy, scores, n_chunks, wanted, options.sampler.seed);
}

std::vector<float> Session::policy_logits(std::span<ContextPassage> passages, std::string_view question,
                                          Answer& answer) {
    {
        const StageTimer timer(answer.times.encode);
        encode_chunks(model_, passages, {}, arena_);
    }
    const StageTimer timer(answer.times.sense);
    const ArenaScope scratch(arena_);
    const Tensor chunk_emb = arena_.tensor(std::ssize(answer.chunks), model_.d_enc());
    std::vector<float> host;
    host.reserve(static_cast<size_t>(chunk_emb.size()));
    for (const ContextPassage& passage : passages) {
        for (size_t c = 0; c < passage.chunks().size(); ++c) {
            const std::span<const float> c_i = passage.embedding(c);
            host.insert(host.end(), c_i.begin(), c_i.end());
        }
    }
    if (!host.empty()) model_.backend().upload(chunk_emb.data, host.data(), chunk_emb.bytes());
    Tensor question_emb;
    if (model_.policy().config().sees_question) {
        const std::vector<Token> tokens = model_.tokenizer().encode(question);
        std::vector<std::vector<int32_t>> pieces;
        for (Chunk& piece : cut_chunks(question, tokens, answer.chunk_len, model_.encoder_vocabulary())) {
            pieces.push_back(std::move(piece.encoder_ids));
        }
        question_emb = arena_.tensor(std::ssize(pieces), model_.d_enc());
        model_.encoder().encode(pieces, question_emb, arena_);
    }
    return model_.policy().logits(chunk_emb, question_emb, arena_);
}

DecoderInput Session::assemble(std::span<const ContextPassage> passages, const std::vector<int32_t>& question,
                               const std::vector<bool>& expanded) const {
    const Tokenizer& tokenizer = model_.tokenizer();
    const PromptTemplate& pieces = model_.config().prompt;
    DecoderInput input;
    if (model_.bos_id()) input.add_token(*model_.bos_id());
    input.add_tokens(template_ids(tokenizer, pieces.before));
    const auto add_question = [&] {
        input.add_tokens(template_ids(tokenizer, pieces.question_prefix));
        input.add_tokens(question);
        input.add_tokens(template_ids(tokenizer, pieces.question_suffix));
    };
    if (model_.config().order == SegmentOrder::question_first) add_question();
    const std::vector<int32_t> prefix = template_ids(tokenizer, pieces.passage_prefix);
    const std::vector<int32_t> suffix = template_ids(tokenizer, pieces.passage_suffix);
    size_t index = 0;
    for (const ContextPassage& passage : passages) {
        input.add_tokens(prefix);
        for (const Chunk& chunk : passage.chunks()) input.add_chunk(chunk, expanded[index++]);
        input.add_tokens(suffix);
    }
    if (model_.config().order == SegmentOrder::passages_first) add_question();
    return input;
}

Tensor Session::project(std::span<const ContextPassage> passages, const std::vector<int32_t>& slot_chunk) {
    const Tensor slots = arena_.tensor(std::ssize(slot_chunk), model_.decoder().config().dim);
    if (slot_chunk.empty()) return slots;
    std::vector<std::span<const float>> embeddings;  // of all chunks, null where none was needed
    for (const ContextPassage& passage : passages) {
        for (size_t c = 0; c < passage.chunks().size(); ++c) {
            embeddings.push_back(passage.has_embedding(c) ? passage.embedding(c) : std::span<const float>{});
        }
    }
    std::vector<float> host;
    for (const int32_t chunk : slot_chunk) {
        const std::span<const float> c_i = embeddings[static_cast<size_t>(chunk)];
        host.insert(host.end(), c_i.begin(), c_i.end());
    }
    const ArenaScope scratch(arena_);
    const Tensor chunk_emb = arena_.tensor(slots.rows, model_.d_enc());
    model_.backend().upload(chunk_emb.data, host.data(), chunk_emb.bytes());
    model_.projector().forward(slots, chunk_emb, arena_);
    return slots;
}

void Session::generate(Tensor hidden, int32_t max_new_tokens, Sampler& sampler, const TextSink& sink,
                       double started_ms, Answer& answer) {
    const Llama& decoder = model_.decoder();
    std::vector<float> logits(static_cast<size_t>(decoder.config().vocab_size));
    const auto next_token = [&](Tensor last) {
        const ArenaScope scratch(arena_);
        const Tensor device = decoder.logits(last, arena_);
        model_.backend().download(logits.data(), device.data, device.bytes());
        return sampler.sample(logits);
    };
    StreamDecoder stream(model_.tokenizer());
    bool at_start = true;
    const auto emit = [&](std::string piece) {
        if (at_start && !piece.empty()) {
            if (piece[0] == ' ') piece.erase(0, 1);
            at_start = false;
        }
        if (piece.empty()) return;
        answer.text += piece;
        if (sink) sink(piece);
    };

    int32_t id = 0;
    {
        const StageTimer timer(answer.times.sample);
        id = next_token(hidden);
    }
    answer.ttft_ms = now_ms() - started_ms;
    const double decode_started_ms = now_ms();
    answer.finish = FinishReason::max_tokens;
    while (std::ssize(answer.ids) < max_new_tokens) {
        if (model_.is_end(id)) {
            answer.finish = FinishReason::end_token;
            break;
        }
        answer.ids.push_back(id);
        emit(stream.push(id));
        if (std::ssize(answer.ids) == max_new_tokens) break;
        if (kv_.length(0) >= max_context_) {
            answer.finish = FinishReason::context_full;
            break;
        }
        const ArenaScope scratch(arena_);
        const Tensor last = prefill(decoder, std::span(&id, 1), Tensor{}, kv_, 0, 1, arena_);
        id = next_token(last);
    }
    emit(stream.flush());
    answer.times.decode = now_ms() - decode_started_ms;
    const bool ended = answer.finish == FinishReason::end_token;
    const double further = static_cast<double>(answer.ids.size()) - (ended ? 0.0 : 1.0);
    if (further > 0.0 && answer.times.decode > 0.0)
        answer.tokens_per_s = further * 1000.0 / answer.times.decode;
}

}  // namespace refrag
