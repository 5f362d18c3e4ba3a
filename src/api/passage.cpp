// refrag.h: passages.
#include "api/handles.h"
#include "refrag/passage_cache.h"
#include "refrag/passage_record.h"

using namespace refrag;
using namespace refrag::api;

extern "C" {

refrag_status refrag_passage_new(const refrag_model* model, const char* text, size_t n_bytes,
                                 int32_t chunk_len, refrag_passage** passage, refrag_error* error) {
    return guarded(error, [&] {
        require(model, "model");
        require(passage, "passage");
        REFRAG_CHECK(chunk_len >= 0 && chunk_len <= 4096, Status::usage,
                     "chunk_len: expected 0 to 4096, found ", chunk_len);
        auto shared = std::make_shared<SharedPassage>(model->model(),
                                                      std::string(text_of(text, n_bytes, "text")), chunk_len);
        *passage = new refrag_passage{model->loaded, std::move(shared)};
    });
}

refrag_status refrag_passage_load(const refrag_model* model, const char* text, size_t n_bytes,
                                  const void* record, size_t record_bytes, refrag_passage** passage,
                                  refrag_error* error) {
    return guarded(error, [&] {
        require(model, "model");
        require(passage, "passage");
        require(record, "record");
        const Model& m = model->model();
        const std::string_view bytes(static_cast<const char*>(record), record_bytes);
        // The record says how long its chunks are; its name says whether that is true.
        PassageCache cache;
        auto shared = cache.share(m, std::string(text_of(text, n_bytes, "text")),
                                  passage_record_chunk_len(bytes), EmbeddingForm::f32, bytes);
        *passage = new refrag_passage{model->loaded, std::move(shared)};
    });
}

refrag_status refrag_passage_share(const refrag_passage* passage, refrag_passage** other,
                                   refrag_error* error) {
    return guarded(error, [&] {
        require(passage, "passage");
        require(other, "other");
        *other = new refrag_passage{passage->loaded, passage->passage};
    });
}

void refrag_passage_free(refrag_passage* passage) {
    delete passage;
}

int refrag_passage_is_encoded(const refrag_passage* passage) {
    return passage != nullptr && passage->passage->encoded() ? 1 : 0;
}

refrag_status refrag_passage_n_chunks(const refrag_passage* passage, size_t* n_chunks, refrag_error* error) {
    return guarded(error, [&] {
        require(passage, "passage");
        require(n_chunks, "n_chunks");
        *n_chunks = passage->passage->cut(*passage->loaded->model)->chunks().size();
    });
}

refrag_status refrag_passage_chunk(const refrag_passage* passage, size_t index, size_t* begin, size_t* end,
                                   size_t* n_tokens, refrag_error* error) {
    return guarded(error, [&] {
        require(passage, "passage");
        const auto cut = passage->passage->cut(*passage->loaded->model);
        REFRAG_CHECK(index < cut->chunks().size(), Status::usage, "index: expected one below ",
                     cut->chunks().size(), " chunks, found ", index);
        const Chunk& chunk = cut->chunks()[index];
        if (begin != nullptr) *begin = chunk.begin;
        if (end != nullptr) *end = chunk.end;
        if (n_tokens != nullptr) *n_tokens = chunk.ids.size();
    });
}

}  // extern "C"
