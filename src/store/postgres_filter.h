// --where in PostgreSQL's words: the conditions of filter.h over documents' fields (jsonb), with the SQLite
// store's rules. A number is never a text; true and false are 1 and 0; a missing key is null, and not equal
// to anything.
#pragma once

#include <string>
#include <string_view>

#include "store/filter.h"
#include "store/postgres.h"

namespace refrag {

// " AND ..." for each condition, over a table `d` of documents. Keys and values become parameters.
std::string postgres_filter(const Filter& filter, PostgresParameters& parameters);

// Metadata as jsonb takes it: a zero byte in a text, which jsonb cannot hold, is U+FFFD.
std::string postgres_fields(std::string_view metadata);

}  // namespace refrag
