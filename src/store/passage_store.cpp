// See passage_store.h.
#include "store/passage_store.h"

#include <cstring>

#include "base/check.h"
#include "base/dtype.h"
#ifdef REFRAG_WITH_POSTGRES
#include "store/postgres_store.h"
#endif
#include "store/sqlite_store.h"

namespace refrag {

bool is_postgres_place(std::string_view place) {
    return place.starts_with("postgresql://") || place.starts_with("postgres://");
}

std::unique_ptr<PassageStore> open_store(const std::string& place, StoreMode mode) {
    if (is_postgres_place(place)) {
#ifdef REFRAG_WITH_POSTGRES
        return std::make_unique<PostgresStore>(place, mode);
#else
        fail(Status::usage,
             "postgresql://: this refrag was built without PostgreSQL: install libpq-dev and build again");
#endif
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

Sha256Digest stored_digest(std::string_view bytes) {
    Sha256Digest digest;
    if (bytes.size() == digest.bytes.size()) std::memcpy(digest.bytes.data(), bytes.data(), bytes.size());
    return digest;
}

std::string vector_bytes(std::span<const float> vector) {
    std::string bytes;
    pack_embeddings(EmbeddingForm::bf16, vector, std::ssize(vector), bytes);
    return bytes + std::string(sha256(bytes).view().substr(0, vector_check_bytes));
}

bool vector_fits(std::string_view bytes) {
    if (bytes.size() <= vector_check_bytes) return false;
    const size_t size = bytes.size() - vector_check_bytes;
    return sha256(bytes.substr(0, size)).view().substr(0, vector_check_bytes) == bytes.substr(size);
}

}  // namespace refrag
