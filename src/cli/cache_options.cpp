// See cache_options.h.
#include "cli/cache_options.h"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "base/check.h"
#include "cli/numbers.h"
#ifdef REFRAG_WITH_STORE
#include "store/record_cache.h"
#include "store/redis_cache.h"
#endif

namespace refrag {

void add_cache_options(CLI::App& app, CacheOptions& options) {
    const char* group = "Passages that stay encoded";
    app.add_option("--cache", options.place,
                   "Keep chunk embeddings in this directory, or in a Redis or Valkey server (redis://HOST, "
                   "unix:///SOCKET): a passage that any run with this model has encoded is encoded no more")
        ->group(group)
        ->envname("REFRAG_CACHE")
        ->type_name("DIR|URL");
    app.add_option("--cache-type", options.form,
                   "How they are kept, and rounded: bf16, or int8 with a scale for each (half the size)")
        ->group(group)
        ->capture_default_str()
        ->type_name("bf16|int8|f32");
    app.add_option("--cache-size", options.size_mib,
                   "MiB that a cache in a directory may take; the longest unused passages are let go of")
        ->group(group)
        ->capture_default_str()
        ->transform(whole_number(1, int64_t{1} << 30))
        ->type_name("MIB");
}

void require_store([[maybe_unused]] const char* what) {
#ifndef REFRAG_WITH_STORE
    fail(Status::usage, what,
         ": this refrag was built without SQLite: install libsqlite3-dev and build again");
#endif
}

std::shared_ptr<PassageKeeper> open_cache(const CacheOptions& options) {
    const EmbeddingForm form = parse_embedding_form("--cache-type", options.form);
    if (options.place.empty()) return nullptr;
    require_store("--cache");
#ifdef REFRAG_WITH_STORE
    const auto warn = [](const std::string& line) {
        std::fprintf(stderr, "refrag: warning: %s\n", line.c_str());
    };
    if (is_redis_place(options.place)) {
#ifdef REFRAG_WITH_VALKEY
        return std::make_shared<RedisCache>(options.place, form, warn);
#else
        fail(Status::usage,
             "--cache: this refrag was built without hiredis: install libhiredis-dev and build again");
#endif
    }
    return std::make_shared<RecordCache>(options.place, form, static_cast<uint64_t>(options.size_mib) << 20,
                                         warn);
#else
    static_cast<void>(form);
    return nullptr;
#endif
}

}  // namespace refrag
