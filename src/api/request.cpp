// refrag.h: requests.
#include "api/handles.h"

using namespace refrag;
using namespace refrag::api;

namespace {

// Appends a segment, or nothing of it.
void add(refrag_request* request, Segment segment) {
    request->segments.push_back(std::move(segment));
}

std::vector<float> rows_of(const float* values, size_t n_rows, int64_t dim, const char* name) {
    REFRAG_CHECK(n_rows <= size_t{1} << 32, Status::usage, name, ": expected at most 2^32 rows, found ",
                 n_rows);
    const size_t n = n_rows * static_cast<size_t>(dim);
    if (n > 0) require(values, name);
    return n == 0 ? std::vector<float>() : std::vector<float>(values, values + n);
}

}  // namespace

extern "C" {

refrag_status refrag_request_new(const refrag_model* model, refrag_request** request, refrag_error* error) {
    return guarded(error, [&] {
        require(model, "model");
        require(request, "request");
        *request = new refrag_request{model->loaded, {}};
    });
}

void refrag_request_free(refrag_request* request) {
    delete request;
}

refrag_status refrag_request_add_tokens(refrag_request* request, const int32_t* ids, size_t n_ids,
                                        refrag_error* error) {
    return guarded(error, [&] {
        require(request, "request");
        if (n_ids > 0) require(ids, "ids");
        const int64_t vocab_size = request->loaded->model->decoder().config().vocab_size;
        for (size_t i = 0; i < n_ids; ++i)
            REFRAG_CHECK(ids[i] >= 0 && ids[i] < vocab_size, Status::usage, "ids: expected 0 to ",
                         vocab_size - 1, ", found ", ids[i]);
        add(request, TokenSegment{{ids, ids + n_ids}, false});
    });
}

refrag_status refrag_request_add_text(refrag_request* request, const char* text, size_t n_bytes,
                                      int parse_special, refrag_error* error) {
    return guarded(error, [&] {
        require(request, "request");
        add(request, TextSegment{std::string(text_of(text, n_bytes, "text")), parse_special != 0});
    });
}

refrag_status refrag_request_add_question(refrag_request* request, const char* text, size_t n_bytes,
                                          refrag_error* error) {
    return guarded(error, [&] {
        require(request, "request");
        add(request, QuestionSegment{std::string(text_of(text, n_bytes, "text"))});
    });
}

refrag_status refrag_request_add_passage(refrag_request* request, const refrag_passage* passage,
                                         const uint8_t* expanded, size_t n_expanded, refrag_error* error) {
    return guarded(error, [&] {
        require(request, "request");
        check_model(passage, request->loaded, "passage", "request");
        PassageSegment segment{passage->passage};
        if (n_expanded > 0) require(expanded, "expanded");
        if (expanded != nullptr) {
            const size_t n_chunks = passage->passage->cut(*request->loaded->model)->chunks().size();
            REFRAG_CHECK(n_expanded == n_chunks, Status::usage, "expanded: expected one for each of ",
                         n_chunks, " chunks, found ", n_expanded);
            segment.expanded.emplace();
            for (size_t i = 0; i < n_expanded; ++i) segment.expanded->push_back(expanded[i] != 0);
        }
        add(request, std::move(segment));
    });
}

refrag_status refrag_request_add_chunk_embeddings(refrag_request* request, const float* values, size_t n_rows,
                                                  refrag_error* error) {
    return guarded(error, [&] {
        require(request, "request");
        const Model& model = *request->loaded->model;
        model.require_encoder();
        add(request, ChunkEmbSegment{rows_of(values, n_rows, model.d_enc(), "values")});
    });
}

refrag_status refrag_request_add_vectors(refrag_request* request, const float* values, size_t n_rows,
                                         refrag_error* error) {
    return guarded(error, [&] {
        require(request, "request");
        add(request,
            VectorSegment{rows_of(values, n_rows, request->loaded->model->decoder().config().dim, "values")});
    });
}

refrag_status refrag_request_add_prompt(refrag_request* request, refrag_passage* const* passages,
                                        size_t n_passages, const refrag_text* history, size_t n_turns,
                                        const refrag_text* question, refrag_error* error) {
    return guarded(error, [&] {
        require(request, "request");
        require(question, "question");
        if (n_passages > 0) require(passages, "passages");
        if (n_turns > 0) require(history, "history");
        const Model& model = *request->loaded->model;
        std::vector<std::shared_ptr<SharedPassage>> shared;
        int32_t chunk_len = 0;
        for (size_t i = 0; i < n_passages; ++i) {
            check_model(passages[i], request->loaded, "passages", "request");
            shared.push_back(passages[i]->passage);
            chunk_len = shared.back()->chunk_len();
        }
        std::vector<Turn> turns;
        for (size_t i = 0; i < n_turns; ++i) {
            const refrag_text& asked = history[2 * i];
            const refrag_text& said = history[2 * i + 1];
            turns.push_back({.question = std::string(text_of(asked.text, asked.n_bytes, "history")),
                             .answer = std::string(text_of(said.text, said.n_bytes, "history"))});
        }
        std::vector<Segment> segments = make_segments(
            model, turns, shared, text_of(question->text, question->n_bytes, "question"), chunk_len);
        request->segments.reserve(request->segments.size() + segments.size());
        for (Segment& segment : segments) add(request, std::move(segment));
    });
}

}  // extern "C"
