// An encoded document as a line of JSON: what `refrag encode` writes and `refrag index --encoded` reads, so
// that a collection can be encoded on many machines. One object a line:
//
//   {"id", "source", "title", "metadata", "hash": hex, "maker": hex,
//    "passages": [{"begin", "end", "title", "text", "record": base64, "vector": base64}]}
//
// "maker" is the model's (StoreStamp), "record" a passage record with its digest, "vector" [d] fp32.
#pragma once

#include <string>
#include <vector>

#include "io/json.h"
#include "store/passage_store.h"

namespace refrag {

struct EncodedDocument {
    Document document;
    std::vector<NewPassage> passages;
    int64_t n_chunks = 0;  // of all of them, where it was read from a line
};

std::string encoded_line(const EncodedDocument& encoded, const Sha256Digest& maker);

// Status::bad_input for what is not such a line, was made by another model than the stamp's, or whose records
// do not fit their texts.
EncodedDocument read_encoded_line(const Json& line, const StoreStamp& stamp);

// The digest of 64 hexadecimal digits; refuses the value where it is none.
Sha256Digest digest_of_hex(const Json& value);

}  // namespace refrag
