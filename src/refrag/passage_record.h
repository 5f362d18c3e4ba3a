// An encoded passage as bytes: what caches and stores keep, and what `refrag encode` writes. A record holds
// the chunks and their embeddings, not the text; it is read back for a text and a name, and whatever does not
// fit them, is torn or was changed is no record of theirs. Little end first:
//
//   "RFRGPASS"  u32 version 1, u32 form (EmbeddingForm), u32 chunk_len, u32 d_enc, u64 text bytes, u32
//   n_chunks name        32 bytes: the passage's key (maker, content, tenant) chunks      n_chunks times: u32
//   bytes of the text, u32 n_ids ids         i32, of all chunks one after another: the decoder's embeddings
//   n_chunks rows in the form digest      32 bytes: SHA-256 of all before it
//
// What the encoder read is left out: nothing needs it once a chunk is encoded.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "refrag/embedding_form.h"
#include "refrag/passage.h"

namespace refrag {

// chunk_emb: [n_chunks, d_enc] as the model's encoder gave them, rounded here; none of a model without
// encoder. Empty where the passage cannot be kept: a value that is no finite number.
std::string passage_record(const CutPassage& cut, const Sha256Digest& key, EmbeddingForm form,
                           std::span<const float> chunk_emb, int32_t d_enc);

// What a record holds.
struct PassageRecord {
    EmbeddingForm form = EmbeddingForm::bf16;
    std::shared_ptr<const CutPassage> cut;
    std::vector<float> chunk_emb;  // [n_chunks, d_enc]
    int32_t d_enc = 0;
};

// Throws Status::bad_input with one line that says what is wrong (without a place): another version, cut
// short, another digest, another passage's, or values that make no sense. `key`: what it must be named;
// `text`: the passage's, as chunked; n_vocab: ids are below it.
PassageRecord read_passage_record(std::string_view record, const Sha256Digest& key, std::string text,
                                  int64_t n_vocab);

// The chunk length that a record says, unchecked; 1 where there is none.
int32_t passage_record_chunk_len(std::string_view record);
// The name in a record, unchecked; all zeros where there is none.
Sha256Digest passage_record_key(std::string_view record);

}  // namespace refrag
