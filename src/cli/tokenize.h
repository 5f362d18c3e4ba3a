// `refrag tokenize`: shows the ids, pieces and byte offsets a text becomes, or the text that ids become;
// with --batch many texts in one run, a JSON line each. It is a view of text/tokenizer.h; nothing here
// decides an id.
#pragma once

namespace CLI {
class App;
}

namespace refrag {

// Adds the `tokenize` subcommand with its options. It runs when the command line is parsed, writes its result
// to standard output and throws refrag::Error on failure.
void add_tokenize(CLI::App& app);

}  // namespace refrag
