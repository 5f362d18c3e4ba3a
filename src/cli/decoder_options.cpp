// See decoder_options.h.
#include "cli/decoder_options.h"

#include <CLI/CLI.hpp>

#include "cli/numbers.h"

namespace refrag {

void add_decoder_options(CLI::App& app, DecoderOptions& options) {
    const char* group = "A decoder elsewhere (vLLM with --enable-prompt-embeds)";
    CLI::Option* url =
        app.add_option("--decoder-url", options.url,
                       "Compress, sense and project here, and have the answer decoded there: its API, "
                       "http://HOST:8000/v1; of the model's decoder only tokenizer and embeddings are loaded")
            ->group(group)
            ->type_name("URL");
    app.add_option("--decoder-model", options.model, "The decoder's name there (default: the only one)")
        ->needs(url)
        ->group(group)
        ->type_name("NAME");
    app.add_option("--decoder-key-file", options.key_file, "A file whose first line is the API key there")
        ->needs(url)
        ->group(group)
        ->type_name("FILE");
    app.add_option("--decoder-timeout", options.silent_seconds,
                   "An answer of which nothing comes for so long has failed")
        ->needs(url)
        ->group(group)
        ->capture_default_str()
        ->transform(decimal_number(1.0, 86400.0))
        ->type_name("S");
    app.add_option("--decoder-max-body", options.max_body_mib,
                   "A prompt's vectors at most: 8/3 bytes for each position and dimension")
        ->needs(url)
        ->group(group)
        ->capture_default_str()
        ->transform(whole_number(1, 2048))
        ->type_name("MIB");
}

}  // namespace refrag
