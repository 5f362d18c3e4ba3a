// The passage store of `refrag serve`.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <mutex>

#include "cli/serve.h"
#include "store/retriever.h"

namespace refrag {
namespace {

// One question at a time: a retriever is one thread's.
struct SharedRetriever {
    SharedRetriever(PassageStore& store, const Model& model, const RetrieveOptions& options)
        : retriever(store, model, std::make_shared<PassageCache>(), options, [](const std::string& line) {
              std::fprintf(stderr, "refrag: warning: %s\n", line.c_str());
          }) {}
    std::mutex mutex;
    Retriever retriever;
};

}  // namespace

void add_served_store_options(CLI::App& app, ServedStore& store) {
    app.add_option("--store", store.place,
                   "A passage store (refrag index): requests with \"store\": {\"query\", \"top\", \"where\"} "
                   "are answered from it")
        ->group("Retrieval")
        ->type_name("STORE");
    add_retrieve_options(app, store.retrieve);
}

OpenStore open_served_store(const ServedStore& store) {
    if (store.place.empty()) return {};
    const std::shared_ptr<PassageStore> opened = open_store(store.place, StoreMode::read);
    const RetrieveOptions options = retrieve_options(store.retrieve);
    OpenStore out;
    out.chunk_len = stamp_in(*opened).chunk_len;
    out.open = [opened, options](const Model& model) -> StoreFinder {
        const auto shared = std::make_shared<SharedRetriever>(*opened, model, options);
        return [opened, shared, options](const StoreQuery& query) {
            Filter filter = options.filter;
            for (const std::string& text : query.where) filter.push_back(parse_condition(text));
            Retrieved found;
            {
                const std::lock_guard<std::mutex> lock(shared->mutex);
                found = shared->retriever.find(query.query, query.top.value_or(options.top), filter);
            }
            std::vector<FoundPassage> out_passages;
            for (size_t i = 0; i < found.passages.size(); ++i) {
                StoredPassage& passage = found.passages[i];
                out_passages.push_back({passage.document, passage.title, passage.text, found.shared[i]});
            }
            return out_passages;
        };
    };
    return out;
}

}  // namespace refrag
