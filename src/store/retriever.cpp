// See retriever.h.
#include "store/retriever.h"

#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "refrag/timer.h"
#include "store/indexer.h"

namespace refrag {

StoreStamp stamp_in(PassageStore& store) {
    const std::optional<StoreStamp> stamp = store.stamp();
    REFRAG_CHECK(stamp.has_value(), Status::bad_input, printable(store.name()),
                 ": nothing has been indexed yet (refrag index STORE FILES)");
    return *stamp;
}

Retriever::Retriever(PassageStore& store, const Model& model, std::shared_ptr<PassageCache> cache,
                     RetrieveOptions options, std::function<void(const std::string&)> warn)
    : store_(store),
      model_(model),
      cache_(std::move(cache)),
      options_(std::move(options)),
      warn_(std::move(warn)),
      stamp_(stamp_in(store)),
      backend_(model.device().make_backend()),
      arena_(*backend_) {
    check_stamp(store.name(), stamp_,
                stamp_of(model, IndexOptions{.chunk_len = stamp_.chunk_len, .form = stamp_.form}));
    const bool has_query = model.has_encoder() || !options_.embedding.empty();
    REFRAG_CHECK(options_.retrieval != Retrieval::dense || has_query, Status::usage,
                 "--retrieve dense: expected a model with an encoder, or --embedding, found neither");
    if (!has_query) options_.retrieval = Retrieval::words;
}

Retrieved Retriever::find(std::string_view question, int64_t top, const Filter& filter) {
    const double started_ms = now_ms();
    RetrieveOptions options = options_;
    options.top = top;
    options.filter = filter;
    std::vector<float> query = options_.embedding;
    if (query.empty() && options_.retrieval != Retrieval::words)
        query = question_vector(*backend_, model_, question, stamp_.chunk_len, arena_);
    std::vector<int64_t> numbers;
    for (const Found& found : retrieve(store_, vectors_, question, query, options))
        numbers.push_back(found.n);
    Retrieved out;
    out.passages = store_.get(numbers);
    for (const StoredPassage& passage : out.passages) {
        const std::string content = passage.content();
        try {
            out.shared.push_back(
                cache_->share(model_, content, stamp_.chunk_len, stamp_.form, passage.record));
        } catch (const Error& error) {
            // Not encoded anew yet by this model, say: then it is encoded here.
            if (error.status() != Status::bad_input) throw;
            if (warn_)
                warn_(str("passage of ", printable(passage.document, 60), ": its record is ", error.message(),
                          ": encoded here"));
            out.shared.push_back(cache_->share(model_, content, stamp_.chunk_len));
        }
    }
    out.ms = now_ms() - started_ms;
    return out;
}

}  // namespace refrag
