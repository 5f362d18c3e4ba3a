// Where a request's passages come from: `documents` in the request, `passage_ids` that were put before, and
// `store`, a passage store that the server was started with.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "refrag/citation_json.h"
#include "refrag/passage_cache.h"
#include "server/body_reader.h"
#include "server/passage_table.h"

namespace refrag {

struct SourceLimits {
    size_t max_documents = 1024;
    size_t max_chunks = 65536;
};

struct StoreQuery {
    std::string query;
    std::optional<int64_t> top;
    std::vector<std::string> where;  // conditions as --where has them
};

struct FoundPassage {
    std::string id, title, text;
    std::shared_ptr<SharedPassage> passage;
};

// Answers from a passage store; made by who knows of stores (cli/serve.cpp). Any number of threads.
using StoreFinder = std::function<std::vector<FoundPassage>(const StoreQuery&)>;

// A request's passages, in the order in which they are read.
struct Sources {
    std::vector<std::shared_ptr<SharedPassage>> passages;
    std::vector<CitedDocument> documents;  // one for each
    int32_t chunk_len = 0;
    double retrieve_ms = 0.0;
};

class SourceReader {
  public:
    // find: empty where there is no store. chunk_len: of all passages; 0: the model's.
    SourceReader(const Model& model, PassageCache& cache, const PassageTable& table, StoreFinder find,
                 SourceLimits limits, int32_t chunk_len)
        : model_(model),
          cache_(cache),
          table_(table),
          find_(std::move(find)),
          limits_(limits),
          chunk_len_(chunk_len) {}

    // Reads the three fields. `question` is the store's query where it has none of its own.
    Sources read(BodyReader& body, const std::string& question) const;

  private:
    const Model& model_;
    PassageCache& cache_;
    const PassageTable& table_;
    const StoreFinder find_;
    const SourceLimits limits_;
    const int32_t chunk_len_;
};

}  // namespace refrag
