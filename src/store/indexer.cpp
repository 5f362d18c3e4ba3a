// See indexer.h.
#include "store/indexer.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "refrag/passage_record.h"
#include "store/cutter.h"
#include "store/retrieve.h"

namespace refrag {
namespace {

// Tokens of passages that make a batch: many groups of the encoder, and a transaction's worth of rows.
constexpr int64_t kBatchTokens = 16384;

// Keeps nothing: it makes passages round their embeddings to the store's form.
class Rounding : public PassageKeeper {
  public:
    explicit Rounding(EmbeddingForm form) : form_(form) {}
    EmbeddingForm form() const noexcept override { return form_; }
    std::optional<std::string> find(const Sha256Digest&) noexcept override { return std::nullopt; }
    void forget(const Sha256Digest&) noexcept override {}
    bool takes_records() const noexcept override { return false; }
    void keep(const Sha256Digest&, std::string) noexcept override {}

  private:
    EmbeddingForm form_;
};

Sha256Digest document_hash(const SourceDocument& document, const IndexOptions& options) {
    const auto* embedding = reinterpret_cast<const char*>(document.embedding.data());
    return Sha256()
        .add_field(str("cutter ", kCutterVersion, "; tokens ", options.passage_tokens, "; markdown ",
                       document.markdown))
        .add_field(document.title)
        .add_field(document.text)
        .add_field(document.metadata)
        .add_field({embedding, document.embedding.size() * sizeof(float)})
        .digest();
}

}  // namespace

StoreStamp stamp_of(const Model& model, const IndexOptions& options) {
    StoreStamp stamp;
    stamp.model = model.dir();
    stamp.chunk_len = options.chunk_len == 0 ? model.config().chunk_len : options.chunk_len;
    stamp.form = options.form;
    stamp.maker = model.passage_maker(stamp.chunk_len, options.form);
    stamp.d_enc = model.has_encoder() ? model.d_enc() : 0;
    stamp.n_vocab = model.tokenizer().vocab_size();
    return stamp;
}

void check_stamp(const std::string& store, const StoreStamp& found, const StoreStamp& expected) {
    if (found.maker == expected.maker) return;
    const auto shown = [](const StoreStamp& stamp) {
        return str(printable(stamp.model), " (k = ", stamp.chunk_len, ", ", embedding_form_name(stamp.form),
                   ", maker ", stamp.maker.hex().substr(0, 12), ")");
    };
    fail(Status::bad_input, printable(store), ": its passages were encoded by ", shown(found), ", not by ",
         shown(expected), ": name that model, or encode them anew with `refrag index --reencode`");
}

void fill_passage(Backend& backend, const Model& model, EmbeddingForm form, SharedPassage& passage,
                  std::span<const float> own, NewPassage& out) {
    const std::shared_ptr<const CutPassage> cut = passage.cut(model);
    std::vector<float> values;
    const int32_t d_enc = model.has_encoder() ? model.d_enc() : 0;
    if (d_enc > 0) values = passage.encoded()->download(backend);
    const Sha256Digest key = passage_key(model.passage_maker(cut->chunk_len(), form), cut->content());
    out.record = passage_record(*cut, key, form, values, d_enc);
    REFRAG_CHECK(
        !out.record.empty(), Status::bad_input,
        "a passage that cannot be stored: its embeddings hold a value that is no finite number, or its "
        "text has more than 2^32 bytes");
    out.vector.assign(own.begin(), own.end());
    if (own.empty()) out.vector = mean_direction(values, d_enc);
    make_unit(out.vector);
}

Indexer::Indexer(PassageStore& store, const Model& model, const IndexOptions& options)
    : Indexer([&store](const std::vector<EncodedDocument>& batch) { write_batch(store, batch); }, model,
              options) {
    store_ = &store;
    check_stamp(store.name(), store.stamp_if_empty(stamp_), stamp_);
}

Indexer::Indexer(EncodedSink sink, const Model& model, const IndexOptions& options)
    : sink_(std::move(sink)),
      model_(model),
      options_(options),
      stamp_(stamp_of(model, options)),
      backend_(model.device().make_backend()),
      arena_(*backend_),
      rounds_(std::make_shared<Rounding>(options.form)) {}

Indexer::~Indexer() {
    if (writing_.valid()) writing_.wait();
}

void Indexer::add(SourceDocument source) {
    ++counts_.n_documents;
    const Sha256Digest hash = document_hash(source, options_);
    const auto [seen, is_first] = seen_.emplace(source.id, hash);
    if (!is_first) {
        if (seen->second != hash)
            return refuse(Error(Status::bad_input, str("document ", printable(source.id, 60),
                                                       ": the id came before, with another content")));
        ++counts_.n_unchanged;
        return;
    }
    const std::optional<Document> old = store_ != nullptr ? store_->find(source.id) : std::nullopt;
    if (old && old->hash == hash) {
        ++counts_.n_unchanged;
        return;
    }
    ++(old ? counts_.n_replaced : counts_.n_added);
    Waiting waiting;
    waiting.encoded.document = {source.id, source.source, source.title, source.metadata, hash, 0};
    waiting.own = std::move(source.embedding);
    const std::vector<Token> tokens = model_.tokenizer().encode(source.text);
    for (const CutSpan& span : cut_document(source.text, tokens, options_.passage_tokens, source.markdown)) {
        NewPassage passage;
        passage.begin = static_cast<int64_t>(span.begin);
        passage.end = static_cast<int64_t>(span.end);
        passage.title = source.title;
        if (!span.heading.empty()) passage.title += (passage.title.empty() ? "" : ": ") + span.heading;
        passage.text = source.text.substr(span.begin, span.end - span.begin);
        auto shared = std::make_shared<SharedPassage>(model_, passage.content(), stamp_.chunk_len, "",
                                                      model_.has_encoder() ? rounds_ : nullptr);
        const auto here = cache_.put(shared);
        counts_.n_repeated += here != shared ? 1 : 0;
        waiting.shared.push_back(here);
        waiting.encoded.passages.push_back(std::move(passage));
    }
    waiting.encoded.document.n_passages = std::ssize(waiting.encoded.passages);
    waiting_tokens_ += std::ssize(tokens);
    waiting_.push_back(std::move(waiting));
    if (waiting_tokens_ >= kBatchTokens) encode_waiting();
}

void Indexer::encode_waiting() {
    if (waiting_.empty()) return;
    if (model_.has_encoder()) {
        std::vector<std::shared_ptr<SharedPassage>> all;
        for (const Waiting& waiting : waiting_)
            all.insert(all.end(), waiting.shared.begin(), waiting.shared.end());
        try {
            encode_passages(*backend_, model_, all, arena_);
        } catch (const Error&) {
            encode_one_by_one();
        }
    }
    std::vector<EncodedDocument> batch;
    for (Waiting& waiting : waiting_) {
        std::vector<NewPassage>& passages = waiting.encoded.passages;
        for (size_t i = 0; i < passages.size(); ++i) {
            fill_passage(*backend_, model_, options_.form, *waiting.shared[i], waiting.own, passages[i]);
            counts_.n_chunks += std::ssize(waiting.shared[i]->cut(model_)->chunks());
        }
        counts_.n_passages += std::ssize(passages);
        batch.push_back(std::move(waiting.encoded));
    }
    waiting_.clear();
    waiting_tokens_ = 0;
    wait_for_write();
    writing_ = std::async(std::launch::async,
                          [this, moved = std::move(batch)]() mutable { sink_(std::move(moved)); });
}

// Names the document that cannot be encoded, and goes on without it.
void Indexer::encode_one_by_one() {
    for (size_t i = 0; i < waiting_.size();) {
        try {
            encode_passages(*backend_, model_, waiting_[i].shared, arena_);
            ++i;
        } catch (const Error& error) {
            const Error named(error.status(), str("document ", printable(waiting_[i].encoded.document.id, 60),
                                                  ": ", error.message()));
            waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
            refuse(named);
        }
    }
}

void Indexer::refuse(const Error& error) const {
    // What is no fault of the document's (a device that fails) is nothing to go on from.
    const bool of_document = error.status() == Status::bad_input || error.status() == Status::usage;
    if (!options_.on_bad || !of_document) throw Error(error);
    options_.on_bad(error);
}

void Indexer::add_file(const std::string& file, const std::function<bool()>& go_on,
                       const std::function<void(uint64_t bytes)>& progress) {
    read_documents(
        file,
        [&](SourceDocument&& document) {
            add(std::move(document));
            return !go_on || go_on();
        },
        options_.on_bad, progress);
}

void write_batch(PassageStore& store, std::span<const EncodedDocument> batch) {
    store.begin();
    try {
        for (const EncodedDocument& encoded : batch) store.put(encoded.document, encoded.passages);
        store.commit();
    } catch (...) {
        store.rollback();
        throw;
    }
}

void Indexer::wait_for_write() {
    if (writing_.valid()) writing_.get();
}

void Indexer::finish() {
    encode_waiting();
    wait_for_write();
}

void reencode(PassageStore& store, const Model& model, const IndexOptions& options,
              const std::function<void(int64_t done, int64_t total)>& progress) {
    const StoreStamp stamp = stamp_of(model, options);
    // First: who asks in the meantime takes the records that are there already, and encodes the rest itself.
    store.set_stamp(stamp);
    const std::unique_ptr<Backend> backend = model.device().make_backend();
    Arena arena(*backend);
    const auto rounds = model.has_encoder() ? std::make_shared<Rounding>(options.form) : nullptr;
    const int64_t total = store.stats().n_passages;
    int64_t done = 0;
    constexpr int64_t kBatch = 128;
    std::vector<int64_t> numbers;
    for (int64_t after = -1; !(numbers = store.numbers(after, kBatch)).empty(); after = numbers.back()) {
        const std::vector<StoredPassage> passages = store.get(numbers);
        std::vector<std::shared_ptr<SharedPassage>> shared;
        std::vector<size_t> places;
        for (size_t i = 0; i < passages.size(); ++i) {
            const std::string content = passages[i].content();
            const Sha256Digest key = passage_key(stamp.maker, sha256(content));
            if (passage_record_key(passages[i].record) == key) continue;
            shared.push_back(std::make_shared<SharedPassage>(model, content, stamp.chunk_len, "", rounds));
            places.push_back(i);
        }
        if (model.has_encoder()) encode_passages(*backend, model, shared, arena);
        store.begin();
        try {
            for (size_t i = 0; i < shared.size(); ++i) {
                NewPassage made;
                fill_passage(*backend, model, options.form, *shared[i], {}, made);
                store.replace_record(passages[places[i]].n, made.record, made.vector);
            }
            store.commit();
        } catch (...) {
            store.rollback();
            throw;
        }
        done += std::ssize(numbers);
        if (progress) progress(done, total);
    }
}

}  // namespace refrag
