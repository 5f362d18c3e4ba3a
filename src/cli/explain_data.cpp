// See explain_data.h.
#include "cli/explain_data.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "base/check.h"
#include "base/utf8.h"
#include "cli/progress.h"
#include "io/json.h"
#include "refrag/attention_report.h"
#include "refrag/session.h"

namespace refrag {
namespace {

// Rows of the decoder's input that are one thing.
struct InputRun {
    const char* kind;  // "start", "template", "question", "chunk", "vectors", "answer"
    int64_t n;         // rows
    int64_t chunk = -1;
    std::vector<int32_t> ids = {};  // of tokens
};

// Whether the template's pieces around a passage are there: they are left out with all of its chunks.
bool has_rows(const ExplainedQuestion& q, size_t segment) {
    bool none = true, some = false;
    for (const ChunkReport& chunk : q.answer.chunks) {
        if (chunk.segment != segment) continue;
        none = false;
        some = some || chunk.n_positions > 0;
    }
    return none || some;
}

// The input's runs in order, those of the answer (but its last token, which was not read) at the end.
std::vector<InputRun> input_runs(const Model& model, const ExplainedQuestion& q) {
    std::vector<InputRun> runs;
    const auto add_ids = [&](const char* kind, std::vector<int32_t> ids) {
        if (!ids.empty()) runs.push_back({kind, std::ssize(ids), -1, std::move(ids)});
    };
    size_t chunk = 0;
    for (size_t s = 0; s < q.segments.size(); ++s) {
        const Segment& segment = q.segments[s];
        if (const auto* tokens = std::get_if<TokenSegment>(&segment)) {
            const auto around = static_cast<size_t>(static_cast<int64_t>(s) + tokens->around);
            if (around != s && !has_rows(q, around)) continue;
            const bool is_start = runs.empty() && tokens->ids.size() == 1 && tokens->ids[0] == model.bos_id();
            add_ids(is_start ? "start" : "template", tokens->ids);
        } else if (const auto* text = std::get_if<TextSegment>(&segment)) {
            add_ids("template", model.tokenizer().encode_ids(text->text, text->parse_special));
        } else if (const auto* question = std::get_if<QuestionSegment>(&segment)) {
            add_ids("question",
                    question->ids ? *question->ids : model.tokenizer().encode_ids(question->text));
        } else if (const auto* passage = std::get_if<PassageSegment>(&segment)) {
            for (const Chunk& c : passage->passage->cut(model)->chunks()) {
                const ChunkReport& report = q.answer.chunks[chunk];
                if (report.n_positions > 0)
                    runs.push_back({"chunk", report.n_positions, static_cast<int64_t>(chunk),
                                    report.expanded ? c.ids : std::vector<int32_t>{}});
                ++chunk;
            }
        } else {
            const auto* given = std::get_if<ChunkEmbSegment>(&segment);
            const int64_t rows =
                given ? std::ssize(given->values) / model.d_enc()
                      : std::ssize(std::get<VectorSegment>(segment).values) / model.decoder().config().dim;
            if (rows > 0) runs.push_back({"vectors", rows});
        }
    }
    int64_t n = 0;
    for (const InputRun& run : runs) n += run.n;
    REFRAG_CHECK(n == static_cast<int64_t>(q.answer.positions), Status::runtime, "explain: expected ",
                 q.answer.positions, " positions, found ", n);
    std::vector<int32_t> said = q.answer.ids;
    if (!said.empty()) said.pop_back();
    add_ids("answer", std::move(said));
    return runs;
}

// The same input, its chunks as they were chosen: nothing is sensed again.
Prompt prompt_of(Backend& backend, const Model& model, const ExplainedQuestion& q,
                 const AnswerOptions& options) {
    std::vector<Segment> segments = q.segments;
    for (const ChunkReport& chunk : q.answer.chunks) {
        auto& passage = std::get<PassageSegment>(segments[chunk.segment]);
        if (&chunk == q.answer.chunks.data() || chunk.segment != (&chunk - 1)->segment)
            passage.expanded.emplace();
        passage.expanded->push_back(chunk.expanded);
    }
    AnswerOptions as_answered = options;
    as_answered.max_new_tokens = 1;
    Arena arena(backend);
    Answer again;
    return make_prompt(backend, model, std::move(segments), as_answered, model.decoder().config().max_seq_len,
                       arena, again);
}

// What the attention of `rows`, [n, n_positions], gives each run, six digits after the point.
void write_sums(JsonWriter& json, const std::vector<float>& rows, int64_t n_positions,
                const std::vector<InputRun>& runs) {
    json.begin_array();
    for (size_t at = 0; at < rows.size();) {
        json.begin_array();
        int64_t left = n_positions;
        for (const InputRun& run : runs) {
            double sum = 0.0;
            for (int64_t i = 0; i < run.n; ++i) sum += static_cast<double>(rows[at++]);
            json.number(std::round(sum * 1e6) / 1e6);
            left -= run.n;
        }
        REFRAG_DCHECK(left == 0);
        json.end_array();
    }
    json.end_array();
}

void write_error(JsonWriter& json, std::string_view error) {
    json.begin_object();
    json.key("error").string(error);
    json.end_object();
}

void write_attention(JsonWriter& json, const Model& model, const ExplainedQuestion& q,
                     const std::vector<InputRun>& runs, const AnswerOptions& options) {
    try {
        const std::unique_ptr<Backend> backend = model.device().make_backend();
        const Prompt prompt = prompt_of(*backend, model, q, options);
        const AttentionReport report = answer_attention(*backend, model.decoder(), prompt, q.answer.ids);
        json.begin_object();
        json.key("by_layer");
        write_sums(json, report.by_layer, report.n_positions, runs);
        json.key("by_token");
        write_sums(json, report.by_row, report.n_positions, runs);
        json.end_object();
    } catch (const Error& error) {
        write_error(json, error.message());
    }
}

// The question with everything expanded, up to its first token, from the same state: passages that had been
// cut are, the others are cut anew.
Answer answer_in_full(const Model& model, Session& session, const ExplainedQuestion& q,
                      const AnswerOptions& options) {
    std::vector<Segment> segments = q.segments;
    for (size_t i = 0; i < segments.size(); ++i) {
        auto* passage = std::get_if<PassageSegment>(&segments[i]);
        if (passage == nullptr) continue;
        passage->expanded.reset();
        if (q.was_cut[i]) continue;
        const auto cut = passage->passage->cut(model);
        passage->passage = std::make_shared<SharedPassage>(model, cut->text(), cut->chunk_len());
    }
    AnswerOptions all = options;
    all.policy = SelectPolicy::all;
    all.expand_fraction.reset();
    all.want_logits = false;
    all.logprobs.reset();
    all.max_new_tokens = 1;
    return session.answer(std::move(segments), all);
}

// Either, or.
struct FullContext {
    std::optional<Answer> answer;
    std::string error;
};

FullContext measure_full(const Model& model, Session& session, const ExplainedQuestion& q,
                         const AnswerOptions& options) {
    try {
        return {answer_in_full(model, session, q, options), {}};
    } catch (const Error& error) {
        return {std::nullopt, error.message()};
    }
}

void write_full(JsonWriter& json, const FullContext& full) {
    if (!full.answer) return write_error(json, full.error);
    json.begin_object();
    json.key("positions").integer(static_cast<int64_t>(full.answer->positions));
    json.key("n_reused").integer(static_cast<int64_t>(full.answer->n_reused));
    json.key("ttft_ms").number(full.answer->ttft_ms);
    json.key("times_ms");
    write_times(json, full.answer->times);
    json.end_object();
}

void write_tokens(JsonWriter& json, const Tokenizer& tokenizer, std::span<const int32_t> ids) {
    json.begin_array();
    for (const int32_t id : ids) json.string(tokenizer.token_bytes(id));
    json.end_array();
}

void write_input(JsonWriter& json, const Tokenizer& tokenizer, const std::vector<InputRun>& runs) {
    json.begin_array();
    for (const InputRun& run : runs) {
        json.begin_object();
        json.key("kind").string(run.kind);
        json.key("n").integer(run.n);
        if (run.chunk >= 0) json.key("chunk").integer(run.chunk);
        if (!run.ids.empty()) {
            json.key("tokens");
            write_tokens(json, tokenizer, run.ids);
        }
        json.end_object();
    }
    json.end_array();
}

void write_documents(JsonWriter& json, const std::vector<DocumentName>& documents) {
    json.begin_array();
    for (const DocumentName& document : documents) {
        json.begin_object();
        json.key("id").string(document.id);
        json.key("title").string(document.title);
        json.end_object();
    }
    json.end_array();
}

// "document" is the index of its passage here: ids need not differ.
void write_page_chunks(JsonWriter& json, const Model& model, const ExplainedQuestion& q) {
    json.begin_array();
    size_t chunk = 0;
    int64_t document = -1;
    for (const Segment& segment : q.segments) {
        const auto* passage = std::get_if<PassageSegment>(&segment);
        if (passage == nullptr) continue;
        ++document;
        const auto cut = passage->passage->cut(model);
        std::vector<size_t> ends;
        for (const Chunk& c : cut->chunks()) ends.push_back(c.end);
        ends = whole_characters(cut->text(), ends);
        size_t begin = 0;
        for (const size_t end : ends) {
            json.begin_object();
            json.key("document").integer(document);
            write_chunk(json, q.answer.chunks[chunk++],
                        std::string_view(cut->text()).substr(begin, end - begin));
            json.end_object();
            begin = end;
        }
    }
    json.end_array();
}

}  // namespace

std::vector<size_t> whole_characters(std::string_view text, const std::vector<size_t>& ends) {
    std::vector<size_t> moved;
    size_t at = 0;
    for (const size_t end : ends) {
        while (at < end) at += decode_utf8(text, at).bytes;
        moved.push_back(at);
    }
    return moved;
}

std::string explain_data(const Model& model, const EngineOptions& engine, const AnswerOptions& options,
                         const std::vector<ExplainedQuestion>& questions) {
    // The engine is gone before the first cache for attention is made: on a GPU it has the memory.
    std::vector<FullContext> full;
    Progress progress("explaining");
    const auto n_passes = 2 * std::ssize(questions);
    int64_t n_done = 0;
    std::optional<Session> session(std::in_place, model, engine);
    for (const ExplainedQuestion& q : questions) {
        full.push_back(measure_full(model, *session, q, options));
        progress.update(++n_done, n_passes);
    }
    session.reset();

    JsonWriter json;
    json.begin_object();
    json.key("model").string(model.dir());
    json.key("device").string(model.device().description());
    json.key("version").string(REFRAG_VERSION);
    json.key("questions").begin_array();
    for (size_t i = 0; i < questions.size(); ++i) {
        const ExplainedQuestion& q = questions[i];
        const std::vector<InputRun> runs = input_runs(model, q);
        json.begin_object();
        write_answer(json, model.tokenizer(), q.question, q.answer);
        if (q.retrieve_ms) json.key("retrieve_ms").number(*q.retrieve_ms);
        json.key("documents");
        write_documents(json, q.documents);
        json.key("chunks");
        write_page_chunks(json, model, q);
        json.key("input");
        write_input(json, model.tokenizer(), runs);
        json.key("answer_tokens");
        write_tokens(json, model.tokenizer(), q.answer.ids);
        json.key("full");
        write_full(json, full[i]);
        json.key("attention");
        write_attention(json, model, q, runs, options);
        json.end_object();
        progress.update(++n_done, n_passes);
    }
    json.end_array();
    json.end_object();
    return json.text();
}

}  // namespace refrag
