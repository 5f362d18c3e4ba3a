// Which words a passage in PostgreSQL is found by: runs of letters and digits in lower case (words_of), their
// stems by the server, and these as a tsvector that this side makes. So PostgreSQL's parser, to which a.b is
// a host and a/b a file, has no part in it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace refrag {

// At most 500 bytes of each: a lexeme has a bound.
std::vector<std::string> index_words(std::string_view text);

// A tsvector as the server sends and receives it in binary. Stems of the title have weight A, those of the
// text D; the count of a stem is the number of its positions, up to 255. Beyond a megabyte of stems, the
// server's bound, further ones are left out.
std::string word_vector(std::span<const std::string> title, std::span<const std::string> text);

// A tsquery in text: any of the stems, each quoted.
std::string any_of(std::span<const std::string> stems);
std::string quoted_lexeme(std::string_view stem);

}  // namespace refrag
