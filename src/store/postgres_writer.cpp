// The writing half of PostgresStore: documents wait until the transaction's end and are then written
// together.
#include <algorithm>
#include <unordered_set>
#include <utility>

#include "base/check.h"
#include "store/postgres_filter.h"
#include "store/postgres_store.h"
#include "store/postgres_words.h"

namespace refrag {
namespace {

// What waits for a COPY; beyond it a batch is written in parts.
constexpr size_t kMostWaitingBytes = size_t{32} << 20;

size_t bytes_of(const Document& document, std::span<const NewPassage> passages) {
    size_t bytes = document.id.size() + document.metadata.size();
    for (const NewPassage& p : passages)
        bytes += p.title.size() + p.text.size() + p.record.size() + p.vector.size() * sizeof(uint16_t);
    return bytes;
}

}  // namespace

// One call's writing: within the transaction that is under way, or in one of its own, undone unless
// committed.
class PostgresStore::Change {
  public:
    explicit Change(PostgresStore& store) : store_(store), own_(store.state_ == TransactionState::none) {
        REFRAG_CHECK(store.writes_, Status::usage, store.name(), ": opened for reading alone");
        REFRAG_CHECK(store.state_ != TransactionState::lost, Status::runtime, store.name(),
                     ": the transaction is lost, nothing of it was kept");
        if (own_) store_.state_ = TransactionState::begun;
    }
    ~Change() {
        if (own_) {
            store_.abort();
        } else if (!committed_) {
            store_.state_ = TransactionState::lost;
        }
    }
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;
    void commit() {
        if (own_) store_.end_transaction();
        committed_ = true;
    }

  private:
    PostgresStore& store_;
    bool own_;
    bool committed_ = false;
};

void PostgresStore::begin() {
    const std::lock_guard lock(write_mutex_);
    REFRAG_CHECK(writes_, Status::usage, name(), ": opened for reading alone");
    abort();
    state_ = TransactionState::begun;
}

void PostgresStore::commit() {
    const std::lock_guard lock(write_mutex_);
    REFRAG_CHECK(state_ != TransactionState::lost, Status::runtime, name(),
                 ": the transaction is lost, nothing of it was kept");
    end_transaction();
}

void PostgresStore::rollback() noexcept {
    const std::lock_guard lock(write_mutex_);
    abort();
}

void PostgresStore::abort() noexcept {
    waiting_.clear();
    waiting_places_.clear();
    waiting_bytes_ = 0;
    const bool is_open = state_ == TransactionState::open || state_ == TransactionState::lost;
    state_ = TransactionState::none;
    if (!is_open) return;
    try {
        write_.run("ROLLBACK");
    } catch (...) {
        write_.close();  // which undoes it as well
    }
}

// The server hears of a transaction when there is something to write.
void PostgresStore::open_transaction() {
    if (state_ == TransactionState::open) return;
    constexpr const char* kBegin = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE";
    write_.connect();
    try {
        write_.run(kBegin);
    } catch (const PostgresLost&) {
        // It broke while nothing was open.
        write_.connect();
        write_.run(kBegin);
    }
    passages_added_ = 0;
    words_added_ = 0;
    state_ = TransactionState::open;
}

void PostgresStore::end_transaction() {
    const char* what = "the transaction that was open is lost, nothing of it was kept";
    try {
        flush();
        if (state_ == TransactionState::open) {
            PostgresParameters sums;
            const std::string passages = sums.add(passages_added_);
            const std::string words = sums.add(words_added_);
            write_.run("UPDATE @counters SET version = version + 1, passages = passages + " + passages +
                           ", words = words + " + words + " WHERE slot = pg_backend_pid() % 32",
                       sums);
            what = "whether the transaction that was open is kept, whole, or lost is not known";
            write_.run("COMMIT");
        }
        state_ = TransactionState::none;
    } catch (const PostgresLost& lost) {
        const bool was_open = state_ == TransactionState::open;
        state_ = TransactionState::lost;
        if (!was_open) throw;
        throw PostgresLost(lost.status(), str(lost.message(), ": ", what));
    } catch (...) {
        state_ = TransactionState::lost;
        throw;
    }
}

void PostgresStore::set_stamp(const StoreStamp& stamp) {
    write_stamp(
        stamp,
        "DO UPDATE SET model = excluded.model, maker = excluded.maker, chunk_len = excluded.chunk_len, "
        "form = excluded.form, d_enc = excluded.d_enc, n_vocab = excluded.n_vocab");
}

// A row that another transaction is about to commit is waited for.
StoreStamp PostgresStore::stamp_if_empty(const StoreStamp& stamp) {
    write_stamp(stamp, "DO NOTHING");
    return *this->stamp();
}

void PostgresStore::write_stamp(const StoreStamp& stamp, const std::string& on_conflict) {
    const std::lock_guard lock(write_mutex_);
    Change change(*this);
    open_transaction();
    PostgresParameters values;
    const std::string model = values.add_bytes(stamp.model);
    const std::string maker = values.add_bytes(stamp.maker.view());
    const std::string chunk_len = values.add(int64_t{stamp.chunk_len});
    const std::string form = values.add_text(embedding_form_name(stamp.form));
    const std::string d_enc = values.add(int64_t{stamp.d_enc});
    const std::string n_vocab = values.add(stamp.n_vocab);
    write_.run("INSERT INTO @stamp (model, maker, chunk_len, form, d_enc, n_vocab) VALUES (" + model + ", " +
                   maker + ", " + chunk_len + ", " + form + ", " + d_enc + ", " + n_vocab +
                   ") ON CONFLICT (only_row) " + on_conflict,
               values);
    change.commit();
}

void PostgresStore::put(const Document& document, std::span<const NewPassage> passages) {
    const std::lock_guard lock(write_mutex_);
    Change change(*this);
    const auto [place, is_new] = waiting_places_.try_emplace(document.id, waiting_.size());
    if (is_new) waiting_.emplace_back();
    waiting_[place->second] = {document, {passages.begin(), passages.end()}};
    waiting_bytes_ += bytes_of(document, passages);
    if (waiting_bytes_ > kMostWaitingBytes) flush();
    change.commit();
}

// Documents in the order of their ids, so that two writers of the same ones wait and do not block each other.
void PostgresStore::flush() {
    if (waiting_.empty()) return;
    open_transaction();
    std::sort(waiting_.begin(), waiting_.end(),
              [](const Waiting& a, const Waiting& b) { return a.document.id < b.document.id; });
    const std::vector<int64_t> documents = upsert_documents();
    remove_passages(documents);
    insert_passages(documents);
    waiting_.clear();
    waiting_places_.clear();
    waiting_bytes_ = 0;
}

// Their numbers, in the order of waiting_. Each row is locked from here to the end of the transaction.
std::vector<int64_t> PostgresStore::upsert_documents() {
    std::vector<std::string> ids;
    std::vector<std::string> sources;
    std::vector<std::string> titles;
    std::vector<std::string> metadata;
    std::vector<std::string> fields;
    std::vector<std::string> hashes;
    std::vector<std::string> digests;
    std::vector<int64_t> n_passages;
    for (const Waiting& waiting : waiting_) {
        const Document& document = waiting.document;
        ids.push_back(document.id);
        sources.push_back(document.source);
        titles.push_back(document.title);
        metadata.push_back(document.metadata);
        fields.push_back(postgres_fields(document.metadata));
        hashes.emplace_back(document.hash.view());
        digests.emplace_back(document_digest(document).view());
        n_passages.push_back(document.n_passages);
    }
    PostgresParameters values;
    std::string arrays;
    for (const std::vector<std::string>* column : {&ids, &sources, &titles, &metadata, &hashes, &digests})
        arrays += values.add_bytes(*column) + ", ";
    arrays += values.add_texts(fields) + ", ";
    arrays += values.add_all(n_passages);
    const PostgresResult rows = write_.run(
        "INSERT INTO @documents AS d (id, source, title, metadata, hash, digest, fields, n_passages) SELECT "
        "t.id, "
        "t.source, t.title, t.metadata, t.hash, t.digest, t.fields::jsonb, t.n_passages FROM unnest(" +
            arrays +
            ") WITH ORDINALITY AS t(id, source, title, metadata, hash, digest, fields, n_passages, place) "
            "ORDER BY "
            "t.place ON CONFLICT (sha256(id)) DO UPDATE SET source = excluded.source, title = "
            "excluded.title, metadata "
            "= excluded.metadata, hash = excluded.hash, digest = excluded.digest, fields = excluded.fields, "
            "n_passages = excluded.n_passages RETURNING d.id, d.n",
        values);
    std::unordered_map<std::string_view, int64_t> numbers;
    for (int64_t i = 0; i < rows.n_rows(); ++i) numbers[rows.bytes(i, 0)] = rows.integer(i, 1);
    std::vector<int64_t> out;
    out.reserve(ids.size());
    for (const std::string& id : ids) out.push_back(numbers.at(id));
    return out;
}

void PostgresStore::remove_passages(std::span<const int64_t> documents) {
    PostgresParameters values;
    const std::string all = values.add_all(documents);
    const PostgresResult gone =
        write_.run("WITH gone AS (DELETE FROM @passages WHERE document = ANY (" + all +
                       ") RETURNING n_words) SELECT count(*), coalesce(sum(n_words), 0)::int8 FROM gone",
                   values);
    passages_added_ -= gone.integer(0, 0);
    words_added_ -= gone.integer(0, 1);
}

// documents: the numbers of those that wait.
void PostgresStore::insert_passages(const std::vector<int64_t>& documents) {
    struct Row {
        const Waiting* waiting = nullptr;
        const NewPassage* passage = nullptr;
        int64_t document = 0;
        int64_t place = 0;
        int64_t n = 0;
    };
    std::vector<Row> rows;
    std::unordered_set<std::string> words;
    for (size_t i = 0; i < waiting_.size(); ++i) {
        int64_t place = 0;
        for (const NewPassage& passage : waiting_[i].passages) {
            rows.push_back({&waiting_[i], &passage, documents[i], place++, 0});
            for (const std::string* text : {&passage.title, &passage.text})
                for (std::string& word : index_words(*text)) words.insert(std::move(word));
        }
    }
    if (rows.empty()) return;
    stems_of(write_, {words.begin(), words.end()});  // all in one question
    PostgresParameters values;
    const std::string n_rows = values.add(static_cast<int64_t>(rows.size()));
    const PostgresResult numbers =
        write_.run("SELECT nextval('@passage_numbers') FROM generate_series(1, " + n_rows + ")", values);
    for (size_t i = 0; i < rows.size(); ++i) rows[i].n = numbers.integer(static_cast<int64_t>(i), 0);
    write_.copy_in(
        "COPY @passages (n, document, place, first, last, title, text, digest, record, n_words, words) FROM "
        "STDIN "
        "(FORMAT binary)",
        std::ssize(rows), [&](int64_t at, std::string& out) {
            const Row& row = rows[static_cast<size_t>(at)];
            const NewPassage& p = *row.passage;
            const std::vector<std::string> title = stems_of(write_, index_words(p.title));
            const std::vector<std::string> text = stems_of(write_, index_words(p.text));
            const Sha256Digest digest = passage_digest(row.waiting->document.id, row.place, p.begin, p.end,
                                                       p.title, p.text, p.record);
            const int64_t n_words = std::ssize(title) + std::ssize(text);
            append_row_begin(out, 11);
            for (const int64_t value : {row.n, row.document, row.place, p.begin, p.end})
                append_field(out, value);
            append_field(out, p.title);
            append_field(out, p.text);
            append_field(out, digest.view());
            append_field(out, p.record);
            append_field(out, n_words);
            append_field(out, word_vector(title, text));
            words_added_ += n_words;
        });
    passages_added_ += std::ssize(rows);
    std::erase_if(rows, [](const Row& row) { return row.passage->vector.empty(); });
    write_.copy_in("COPY @vectors (n, vector) FROM STDIN (FORMAT binary)", std::ssize(rows),
                   [&](int64_t at, std::string& out) {
                       const Row& row = rows[static_cast<size_t>(at)];
                       append_row_begin(out, 2);
                       append_field(out, row.n);
                       append_field(out, vector_bytes(row.passage->vector));
                   });
}

bool PostgresStore::remove(std::string_view id) {
    const std::lock_guard lock(write_mutex_);
    Change change(*this);
    open_transaction();
    flush();
    PostgresParameters asked;
    const std::string given = asked.add_bytes(id);
    const PostgresResult rows =
        write_.run("SELECT n FROM @documents WHERE sha256(id) = sha256(" + given + ") FOR UPDATE", asked);
    if (rows.n_rows() > 0) {
        const int64_t n = rows.integer(0, 0);
        remove_passages({&n, 1});
        PostgresParameters values;
        const std::string number = values.add(n);
        write_.run("DELETE FROM @documents WHERE n = " + number, values);
    }
    change.commit();
    return rows.n_rows() > 0;
}

void PostgresStore::replace_record(int64_t n, std::string_view record, std::span<const float> vector) {
    const std::vector<StoredPassage> found = get({&n, 1});
    if (found.empty()) return;
    const StoredPassage& p = found.front();
    const Sha256Digest digest = passage_digest(p.document, p.place, p.begin, p.end, p.title, p.text, record);
    const std::lock_guard lock(write_mutex_);
    Change change(*this);
    open_transaction();
    flush();
    PostgresParameters values;
    const std::string bytes = values.add_bytes(record);
    const std::string of = values.add_bytes(digest.view());
    const std::string number = values.add(n);
    const PostgresResult updated = write_.run(
        "UPDATE @passages SET record = " + bytes + ", digest = " + of + " WHERE n = " + number, values);
    // Another writer may have removed it.
    if (updated.n_changed() > 0) {
        PostgresParameters old;
        const std::string old_number = old.add(n);
        write_.run("DELETE FROM @vectors WHERE n = " + old_number, old);
        if (!vector.empty()) {
            PostgresParameters fresh;
            const std::string its = fresh.add(n);
            const std::string made = fresh.add_bytes(vector_bytes(vector));
            write_.run("INSERT INTO @vectors (n, vector) VALUES (" + its + ", " + made + ")", fresh);
        }
    }
    change.commit();
}

}  // namespace refrag
