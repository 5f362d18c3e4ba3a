// refrag.h: sessions, generation, answers.
#include <chrono>

#include "api/handles.h"
#include "refrag/passage_record.h"

using namespace refrag;
using namespace refrag::api;

namespace {

AnswerOptions answer_options(const refrag_generate_options& o) {
    AnswerOptions out;
    out.max_new_tokens = o.max_new_tokens;
    if (!(o.expand_fraction < 0.0)) out.expand_fraction = o.expand_fraction;
    if (o.policy != nullptr) out.policy = parse_select_policy(o.policy);
    if (o.unexpanded != nullptr) out.unexpanded = parse_unexpanded(o.unexpanded);
    out.sampler.temperature = o.temperature;
    out.sampler.top_k = o.top_k;
    out.sampler.top_p = o.top_p;
    out.sampler.min_p = o.min_p;
    out.sampler.repetition_penalty = o.repetition_penalty;
    out.sampler.frequency_penalty = o.frequency_penalty;
    out.sampler.presence_penalty = o.presence_penalty;
    out.sampler.repeat_last_n = o.repeat_last_n;
    out.sampler.seed = o.seed;
    if (o.n_stop > 0) require(o.stop, "stop");
    for (size_t i = 0; i < o.n_stop; ++i) {
        require(o.stop[i], "stop");
        out.stop.emplace_back(o.stop[i]);
    }
    out.ignore_eos = o.ignore_eos != 0;
    check_answer_options(out);
    return out;
}

Answer generate(refrag_session& session, const refrag_request& request, const refrag_generate_options& o) {
    TextSink sink;
    if (o.text != nullptr)
        sink = [&o](std::string_view text) { return o.text(o.user, text.data(), text.size()) != 0; };
    AnswerLimits limits;
    if (o.keep_on != nullptr) limits.keep_going = [&o] { return o.keep_on(o.user) != 0; };
    REFRAG_CHECK(o.deadline_ms >= 0, Status::usage, "deadline_ms: expected 0 or more, found ", o.deadline_ms);
    // A deadline beyond the clock's range is none.
    using std::chrono::milliseconds;
    const auto now = std::chrono::steady_clock::now();
    const auto most = std::chrono::duration_cast<milliseconds>(decltype(now)::max() - now);
    if (o.deadline_ms > 0 && milliseconds(o.deadline_ms) < most)
        limits.deadline = now + milliseconds(o.deadline_ms);
    std::optional<Answer> answer = session.session.answer(request.segments, answer_options(o), sink, limits);
    if (!answer) throw Cancelled();
    return std::move(*answer);
}

refrag_session_options default_session_options() {
    refrag_session_options options{};
    options.struct_size = sizeof options;
    options.prefix_cache = 1;
    return options;
}

refrag_generate_options default_generate_options() {
    const AnswerOptions defaults;
    refrag_generate_options options{};
    options.struct_size = sizeof options;
    options.max_new_tokens = defaults.max_new_tokens;
    options.expand_fraction = -1.0;
    options.temperature = defaults.sampler.temperature;
    options.top_k = defaults.sampler.top_k;
    options.top_p = defaults.sampler.top_p;
    options.min_p = defaults.sampler.min_p;
    options.repetition_penalty = defaults.sampler.repetition_penalty;
    options.frequency_penalty = defaults.sampler.frequency_penalty;
    options.presence_penalty = defaults.sampler.presence_penalty;
    options.repeat_last_n = defaults.sampler.repeat_last_n;
    options.seed = defaults.sampler.seed;
    return options;
}

// What an encoded passage of the session's model holds.
std::shared_ptr<const EncodedPassage> encoded_of(const refrag_session& session,
                                                 const refrag_passage* passage) {
    check_model(passage, session.loaded, "passage", "session");
    auto encoded = passage->passage->encoded();
    REFRAG_CHECK(encoded != nullptr, Status::usage,
                 "passage: expected one that is encoded (refrag_session_encode)");
    return encoded;
}

}  // namespace

extern "C" {

void refrag_session_options_init(refrag_session_options* options, size_t struct_size) {
    give_defaults(options, struct_size, default_session_options());
}

refrag_status refrag_session_new(const refrag_model* model, const refrag_session_options* options,
                                 refrag_session** session, refrag_error* error) {
    return guarded(error, [&] {
        require(model, "model");
        require(session, "session");
        const refrag_session_options o =
            options_of(options, default_session_options(), "refrag_session_options");
        EngineOptions engine;
        engine.max_context = o.max_context;
        engine.prefix_cache = o.prefix_cache != 0;
        REFRAG_CHECK(o.step_rows >= 0, Status::usage, "step_rows: expected 0 or more, found ", o.step_rows);
        if (o.step_rows > 0) engine.step_rows = o.step_rows;
        *session = new refrag_session(model->loaded, engine);
    });
}

void refrag_session_free(refrag_session* session) {
    delete session;
}

refrag_status refrag_session_encode(refrag_session* session, refrag_passage* const* passages,
                                    size_t n_passages, refrag_error* error) {
    return guarded(error, [&] {
        const InUse in_use(session);
        if (n_passages > 0) require(passages, "passages");
        session->loaded->model->require_encoder();
        std::vector<std::shared_ptr<SharedPassage>> shared;
        for (size_t i = 0; i < n_passages; ++i) {
            check_model(passages[i], session->loaded, "passages", "session");
            shared.push_back(passages[i]->passage);
        }
        encode_passages(*session->backend, *session->loaded->model, shared, session->arena);
    });
}

refrag_status refrag_session_embeddings(refrag_session* session, const refrag_passage* passage, float* values,
                                        size_t capacity, size_t* n_values, refrag_error* error) {
    return guarded(error, [&] {
        const InUse in_use(session);
        const auto encoded = encoded_of(*session, passage);
        const std::vector<float> all = encoded->download(*session->backend);
        give_values(all.data(), all.size(), values, capacity, n_values, "values", "n_values");
    });
}

refrag_status refrag_passage_save(refrag_session* session, const refrag_passage* passage, void* record,
                                  size_t capacity, size_t* record_bytes, refrag_error* error) {
    return guarded(error, [&] {
        const InUse in_use(session);
        const auto encoded = encoded_of(*session, passage);
        const std::string bytes =
            passage_record(*encoded->cut(), encoded->key(), EmbeddingForm::f32,
                           encoded->download(*session->backend), session->loaded->model->d_enc());
        REFRAG_CHECK(!bytes.empty(), Status::runtime,
                     "passage: its embeddings hold a value that is no finite number");
        give_values(bytes.data(), bytes.size(), static_cast<char*>(record), capacity, record_bytes, "record",
                    "record_bytes");
    });
}

void refrag_generate_options_init(refrag_generate_options* options, size_t struct_size) {
    give_defaults(options, struct_size, default_generate_options());
}

refrag_status refrag_session_generate(refrag_session* session, const refrag_request* request,
                                      const refrag_generate_options* options, refrag_answer** answer,
                                      refrag_error* error) {
    return guarded(error, [&] {
        const InUse in_use(session);
        check_model(request, session->loaded, "request", "session");
        require(answer, "answer");
        const refrag_generate_options o =
            options_of(options, default_generate_options(), "refrag_generate_options");
        auto out = std::make_unique<refrag_answer>();
        out->answer = generate(*session, *request, o);
        *answer = out.release();
    });
}

refrag_status refrag_answer_get_info(const refrag_answer* answer, refrag_answer_info* info,
                                     refrag_error* error) {
    return guarded(error, [&] {
        require(answer, "answer");
        const Answer& a = answer->answer;
        refrag_answer_info out{};
        out.finish = static_cast<refrag_finish>(a.finish);
        out.n_chunks = a.chunks.size();
        out.n_expanded = a.n_expanded;
        out.n_cached = a.n_cached;
        out.n_positions = a.positions;
        out.n_reused = a.n_reused;
        out.n_plain_tokens = a.plain_tokens;
        out.n_new_tokens = a.ids.size();
        out.ttft_ms = a.ttft_ms;
        out.tokens_per_s = a.tokens_per_s;
        give_info(info, out, "refrag_answer_info");
    });
}

const char* refrag_answer_text(const refrag_answer* answer, size_t* n_bytes) {
    if (n_bytes != nullptr) *n_bytes = answer != nullptr ? answer->answer.text.size() : 0;
    return answer != nullptr ? answer->answer.text.c_str() : "";
}

const int32_t* refrag_answer_ids(const refrag_answer* answer, size_t* n_ids) {
    if (n_ids != nullptr) *n_ids = answer != nullptr ? answer->answer.ids.size() : 0;
    return answer != nullptr ? answer->answer.ids.data() : nullptr;
}

refrag_status refrag_answer_chunk(const refrag_answer* answer, size_t index, refrag_chunk_info* info,
                                  refrag_error* error) {
    return guarded(error, [&] {
        require(answer, "answer");
        const std::vector<ChunkReport>& chunks = answer->answer.chunks;
        REFRAG_CHECK(index < chunks.size(), Status::usage, "index: expected one below ", chunks.size(),
                     " chunks, found ", index);
        const ChunkReport& chunk = chunks[index];
        refrag_chunk_info out{};
        out.segment = chunk.segment;
        out.begin = chunk.begin;
        out.end = chunk.end;
        out.n_tokens = chunk.n_tokens;
        out.has_logit = chunk.logit ? 1 : 0;
        out.logit = chunk.logit.value_or(0.0f);
        out.expanded = chunk.expanded ? 1 : 0;
        out.cached = chunk.cached ? 1 : 0;
        out.position = chunk.position;
        out.n_positions = chunk.n_positions;
        give_info(info, out, "refrag_chunk_info");
    });
}

void refrag_answer_free(refrag_answer* answer) {
    delete answer;
}

}  // extern "C"

// The finish reasons are handed out as they are numbered.
static_assert(static_cast<int>(FinishReason::end_token) == REFRAG_FINISH_END);
static_assert(static_cast<int>(FinishReason::stop_string) == REFRAG_FINISH_STOP);
static_assert(static_cast<int>(FinishReason::max_tokens) == REFRAG_FINISH_LENGTH);
static_assert(static_cast<int>(FinishReason::context_full) == REFRAG_FINISH_CONTEXT);
static_assert(static_cast<int>(FinishReason::cancelled) == REFRAG_FINISH_CANCELLED);
static_assert(static_cast<int>(FinishReason::deadline) == REFRAG_FINISH_DEADLINE);
