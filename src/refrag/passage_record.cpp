// See passage_record.h.
#include "refrag/passage_record.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace refrag {
namespace {

static_assert(std::endian::native == std::endian::little, "a record's numbers are copied as they lie");

constexpr std::string_view kMagic = "RFRGPASS";
constexpr uint32_t kVersion = 1;
constexpr size_t kKeyAt = kMagic.size() + 4 * sizeof(uint32_t) + sizeof(uint64_t) + sizeof(uint32_t);
constexpr size_t kHeaderBytes = kKeyAt + sizeof(Sha256Digest::bytes);
constexpr size_t kDigestBytes = sizeof(Sha256Digest::bytes);

template <typename Number>
void append(std::string& out, Number value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// Takes numbers from the front; the caller has checked that they are there.
class Reader {
  public:
    explicit Reader(std::string_view bytes) : bytes_(bytes) {}
    template <typename Number>
    Number take() {
        Number value{};
        std::memcpy(&value, take(sizeof value).data(), sizeof value);
        return value;
    }
    std::string_view take(size_t n) {
        REFRAG_CHECK(n <= bytes_.size(), Status::bad_input, "cut short");
        const std::string_view front = bytes_.substr(0, n);
        bytes_.remove_prefix(n);
        return front;
    }
    size_t left() const { return bytes_.size(); }

  private:
    std::string_view bytes_;
};

}  // namespace

std::string passage_record(const CutPassage& cut, const Sha256Digest& key, EmbeddingForm form,
                           std::span<const float> chunk_emb, int32_t d_enc) {
    REFRAG_DCHECK(chunk_emb.size() == cut.chunks().size() * static_cast<size_t>(d_enc));
    if (!std::all_of(chunk_emb.begin(), chunk_emb.end(), [](float value) { return std::isfinite(value); }))
        return {};
    // Spans and counts have 32 bits.
    if (cut.text().size() > UINT32_MAX || cut.chunks().size() > UINT32_MAX) return {};
    std::string out(kMagic);
    append(out, kVersion);
    append(out, static_cast<uint32_t>(form));
    append(out, static_cast<uint32_t>(cut.chunk_len()));
    append(out, static_cast<uint32_t>(d_enc));
    append(out, static_cast<uint64_t>(cut.text().size()));
    append(out, static_cast<uint32_t>(cut.chunks().size()));
    out += key.view();
    for (const Chunk& chunk : cut.chunks()) {
        append(out, static_cast<uint32_t>(chunk.end - chunk.begin));
        append(out, static_cast<uint32_t>(chunk.ids.size()));
    }
    for (const Chunk& chunk : cut.chunks())
        for (const int32_t id : chunk.ids) append(out, id);
    pack_embeddings(form, chunk_emb, d_enc, out);
    out += sha256(out).view();
    return out;
}

PassageRecord read_passage_record(std::string_view record, const Sha256Digest& key, std::string text,
                                  int64_t n_vocab) {
    REFRAG_CHECK(record.starts_with(kMagic), Status::bad_input, "no passage record");
    REFRAG_CHECK(record.size() >= kHeaderBytes + kDigestBytes, Status::bad_input, "cut short");
    const std::string_view body = record.substr(0, record.size() - kDigestBytes);
    REFRAG_CHECK(sha256(body).view() == record.substr(body.size()), Status::bad_input,
                 "its digest does not fit its bytes");
    Reader reader(body.substr(kMagic.size()));
    const auto version = reader.take<uint32_t>();
    REFRAG_CHECK(version == kVersion, Status::bad_input, "expected version ", kVersion, ", found ", version);
    const auto form = reader.take<uint32_t>();
    REFRAG_CHECK(form <= static_cast<uint32_t>(EmbeddingForm::int8), Status::bad_input,
                 "a form of embeddings that is not known: ", form);
    const auto chunk_len = reader.take<uint32_t>();
    const auto d_enc = reader.take<uint32_t>();
    const auto text_bytes = reader.take<uint64_t>();
    const auto n_chunks = reader.take<uint32_t>();
    REFRAG_CHECK(reader.take(key.bytes.size()) == key.view(), Status::bad_input,
                 "of another passage or another model");
    REFRAG_CHECK(text_bytes == text.size(), Status::bad_input, "expected a text of ", text_bytes,
                 " bytes, found ", text.size());
    REFRAG_CHECK(chunk_len >= 1 && chunk_len <= INT32_MAX && d_enc <= INT32_MAX, Status::bad_input,
                 "a chunk length or dimension that makes no sense");

    PassageRecord out;
    out.form = static_cast<EmbeddingForm>(form);
    out.d_enc = static_cast<int32_t>(d_enc);
    Reader sizes(reader.take(uint64_t{n_chunks} * 2 * sizeof(uint32_t)));
    std::vector<Chunk> chunks(n_chunks);
    size_t begin = 0;
    for (Chunk& chunk : chunks) {
        const auto bytes = sizes.take<uint32_t>();
        const auto n_ids = sizes.take<uint32_t>();
        REFRAG_CHECK(bytes <= text.size() - begin && n_ids >= 1 && n_ids <= chunk_len, Status::bad_input,
                     "chunks that do not fit the text");
        chunk.begin = begin;
        chunk.end = begin += bytes;
        Reader ids(reader.take(uint64_t{n_ids} * sizeof(int32_t)));
        chunk.ids.resize(n_ids);
        for (int32_t& id : chunk.ids) {
            id = ids.take<int32_t>();
            REFRAG_CHECK(id >= 0 && id < n_vocab, Status::bad_input, "expected ids of 0 to ", n_vocab - 1,
                         ", found ", id);
        }
    }
    REFRAG_CHECK(begin == text.size(), Status::bad_input, "chunks that do not fit the text");
    const size_t row_bytes = embedding_row_bytes(out.form, out.d_enc);
    const std::string_view rows = reader.take(uint64_t{n_chunks} * row_bytes);
    REFRAG_CHECK(reader.left() == 0, Status::bad_input, "bytes that belong to nothing");
    out.chunk_emb.resize(size_t{n_chunks} * d_enc);
    unpack_embeddings(out.form, rows, out.d_enc, out.chunk_emb);
    REFRAG_CHECK(std::all_of(out.chunk_emb.begin(), out.chunk_emb.end(),
                             [](float value) { return std::isfinite(value); }),
                 Status::bad_input, "an embedding with a value that is no finite number");
    out.cut = std::make_shared<const CutPassage>(std::move(text), static_cast<int32_t>(chunk_len),
                                                 std::move(chunks));
    return out;
}

int32_t passage_record_chunk_len(std::string_view record) {
    uint32_t chunk_len = 1;
    if (record.starts_with(kMagic) && record.size() >= kHeaderBytes)
        std::memcpy(&chunk_len, record.data() + kMagic.size() + 2 * sizeof(uint32_t), sizeof chunk_len);
    return static_cast<int32_t>(std::clamp<uint32_t>(chunk_len, 1, INT32_MAX));
}

Sha256Digest passage_record_key(std::string_view record) {
    Sha256Digest key;
    if (record.starts_with(kMagic) && record.size() >= kHeaderBytes)
        std::memcpy(key.bytes.data(), record.data() + kKeyAt, key.bytes.size());
    return key;
}

}  // namespace refrag
