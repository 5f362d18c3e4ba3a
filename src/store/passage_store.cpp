// See passage_store.h.
#include "store/passage_store.h"

#include "base/check.h"
#include "base/dtype.h"
#include "io/file.h"
#include "store/sqlite_store.h"

namespace refrag {

std::unique_ptr<PassageStore> open_store(const std::string& place, StoreMode mode) {
    for (const char* scheme : {"postgresql://", "postgres://"}) {
        REFRAG_CHECK(!place.starts_with(scheme), Status::usage, printable(place),
                     ": this refrag was built without PostgreSQL");
    }
    return std::make_unique<SqliteStore>(place, mode);
}

Sha256Digest passage_digest(std::string_view document, int64_t place, int64_t begin, int64_t end,
                            std::string_view title, std::string_view text, std::string_view record) {
    return Sha256()
        .add_field(document)
        .add_field(str(place, " ", begin, " ", end))
        .add_field(title)
        .add_field(text)
        .add_field(record)
        .digest();
}

Sha256Digest document_digest(const Document& document) {
    return Sha256()
        .add_field(document.id)
        .add_field(document.source)
        .add_field(document.title)
        .add_field(document.metadata)
        .add_field(document.hash.view())
        .add_field(str(document.n_passages))
        .digest();
}

std::string vector_bytes(std::span<const float> vector) {
    std::string bytes;
    pack_embeddings(EmbeddingForm::bf16, vector, std::ssize(vector), bytes);
    return bytes + std::string(sha256(bytes).view().substr(0, 8));
}

}  // namespace refrag
