// See sqlite_store.h.
#include "store/sqlite_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/dtype.h"
#include "io/file.h"

namespace refrag {
namespace {

// Vectors lie apart: a scan of them all reads nothing else. The full-text index holds no text of its own.
constexpr const char* kStoreSchema = R"(
CREATE TABLE settings (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE documents (
    n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, source TEXT NOT NULL, title TEXT NOT NULL,
    metadata TEXT NOT NULL, hash BLOB NOT NULL, n_passages INTEGER NOT NULL, digest BLOB NOT NULL);
CREATE TABLE passages (
    n INTEGER PRIMARY KEY, document INTEGER NOT NULL, place INTEGER NOT NULL, first INTEGER NOT NULL,
    last INTEGER NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, digest BLOB NOT NULL, record BLOB NOT NULL);
CREATE INDEX passages_document ON passages (document);
CREATE TABLE vectors (n INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE VIRTUAL TABLE words USING fts5 (title, text, content = 'passages', content_rowid = 'n',
    tokenize = 'porter unicode61');
)";
constexpr DatabaseKind kStoreKind = {"a passage store", 0x52464753 /* RFGS */, 1, kStoreSchema};

// " AND json_extract(documents.metadata, ?) >= ?" for each condition.
std::string filter_sql(const Filter& filter) {
    std::string sql;
    for (const Condition& condition : filter) {
        const bool is_null = std::holds_alternative<std::nullptr_t>(condition.value);
        const bool is_not = condition.op == FilterOp::not_equal;
        sql += " AND json_extract(documents.metadata, ?) ";
        // A missing key equals nothing, and is not equal to anything.
        sql += is_null  ? (is_not ? "IS NOT ?" : "IS ?")
               : is_not ? "IS NOT ?"
                        : str(filter_op_sql(condition.op), " ?");
        // Texts and numbers have no order between them.
        if (!is_null && !is_not)
            sql += std::holds_alternative<std::string>(condition.value)
                       ? " AND json_type(documents.metadata, ?) = 'text'"
                       : " AND json_type(documents.metadata, ?) IN ('integer', 'real', 'true', 'false')";
    }
    return sql;
}

// The paths and values of a filter, kept alive for the statement.
std::vector<std::string> filter_paths(const Filter& filter) {
    std::vector<std::string> paths;
    for (const Condition& condition : filter) {
        std::string path = "$";
        for (const std::string& key : condition.key) path += ".\"" + key + "\"";
        paths.push_back(std::move(path));
    }
    return paths;
}

void bind_filter(Statement& statement, const Filter& filter, const std::vector<std::string>& paths,
                 int index) {
    for (size_t i = 0; i < filter.size(); ++i) {
        const auto& value = filter[i].value;
        statement.bind(index++, paths[i]);
        if (const auto* text = std::get_if<std::string>(&value)) {
            statement.bind(index++, *text);
        } else if (const auto* number = std::get_if<double>(&value)) {
            statement.bind(index++, *number);
        } else if (const auto* truth = std::get_if<bool>(&value)) {
            statement.bind(index++, int64_t{*truth});
        } else {
            statement.bind_null(index++);
        }
        if (!std::holds_alternative<std::nullptr_t>(value) && filter[i].op != FilterOp::not_equal)
            statement.bind(index++, paths[i]);
    }
}

// Words as FTS5 takes them literally: each in double quotes, any of them.
std::string match_any(std::span<const std::string> words) {
    std::string query;
    for (const std::string& word : words) {
        query += query.empty() ? "\"" : " OR \"";
        for (const char c : word) query += c == '"' ? "\"\"" : std::string(1, c);
        query += "\"";
    }
    return query;
}

constexpr const char* kDocumentRow =
    "SELECT id, source, title, metadata, hash, n_passages, digest, n FROM documents";

// digest_fits: whether the row is as it was written.
Document read_document(const Statement& row, bool& digest_fits) {
    Document document;
    document.id = row.text(0);
    document.source = row.text(1);
    document.title = row.text(2);
    document.metadata = row.text(3);
    document.hash = stored_digest(row.bytes(4));
    document.n_passages = row.integer(5);
    digest_fits = document_digest(document).view() == row.bytes(6);
    return document;
}

std::optional<StoreStamp> stamp_in_settings(Database& database) {
    Statement select = database.prepare("SELECT name, value FROM settings");
    StoreStamp stamp;
    bool any = false;
    while (select.step()) {
        const std::string_view name = select.bytes(0);
        any = true;
        if (name == "model") stamp.model = select.text(1);
        if (name == "maker") stamp.maker = stored_digest(select.bytes(1));
        if (name == "chunk_len") stamp.chunk_len = static_cast<int32_t>(select.integer(1));
        if (name == "form") stamp.form = parse_embedding_form(database.path(), select.bytes(1));
        if (name == "d_enc") stamp.d_enc = static_cast<int32_t>(select.integer(1));
        if (name == "n_vocab") stamp.n_vocab = select.integer(1);
    }
    if (!any) return std::nullopt;
    return stamp;
}

}  // namespace

struct SqliteStore::Writer {
    explicit Writer(Database& database)
        : find_document(database, "SELECT n FROM documents WHERE id = ?"),
          insert_document(database,
                          "INSERT INTO documents (id, source, title, metadata, hash, n_passages, digest) "
                          "VALUES (?, ?, ?, ?, ?, ?, ?)"),
          delete_document(database, "DELETE FROM documents WHERE n = ?"),
          insert_passage(database,
                         "INSERT INTO passages (document, place, first, last, title, text, digest, record) "
                         "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"),
          passages_of(database, "SELECT n, title, text FROM passages WHERE document = ?"),
          delete_passage(database, "DELETE FROM passages WHERE n = ?"),
          insert_vector(database, "INSERT OR REPLACE INTO vectors (n, vector) VALUES (?, ?)"),
          delete_vector(database, "DELETE FROM vectors WHERE n = ?"),
          insert_words(database, "INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)"),
          delete_words(database, "INSERT INTO words (words, rowid, title, text) VALUES ('delete', ?, ?, ?)"),
          setting(database, "INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)") {}
    Statement find_document, insert_document, delete_document, insert_passage, passages_of, delete_passage,
        insert_vector, delete_vector, insert_words, delete_words, setting;
};

class SqliteStore::Change {
  public:
    explicit Change(SqliteStore& store) : store_(store), own_(!store.transaction_) {
        if (own_) store_.transaction_ = std::make_unique<Transaction>(*store_.write_);
    }
    ~Change() {
        if (own_) store_.transaction_.reset();
    }
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;
    void commit() {
        if (own_) store_.transaction_->commit();
    }

  private:
    SqliteStore& store_;
    bool own_;
};

SqliteStore::SqliteStore(const std::string& path, StoreMode mode) : path_(path) {
    if (mode != StoreMode::read)
        write_ = std::make_unique<Database>(
            path, kStoreKind, mode == StoreMode::create ? DatabaseMode::create : DatabaseMode::write);
    read_ = std::make_unique<Database>(path, kStoreKind, DatabaseMode::read);
}

SqliteStore::~SqliteStore() {
    // The last connection to close puts the log into the file, which a reading one cannot.
    read_.reset();
    transaction_.reset();
    statements_.reset();
}

SqliteStore::Writer& SqliteStore::writer() {
    REFRAG_CHECK(write_ != nullptr, Status::usage, printable(path_), ": opened for reading alone");
    if (!statements_) statements_ = std::make_unique<Writer>(*write_);
    return *statements_;
}

std::optional<StoreStamp> SqliteStore::stamp() {
    const std::lock_guard lock(read_mutex_);
    return stamp_in_settings(*read_);
}

void SqliteStore::begin() {
    const std::lock_guard lock(write_mutex_);
    writer();
    transaction_ = std::make_unique<Transaction>(*write_);
}

void SqliteStore::commit() {
    const std::lock_guard lock(write_mutex_);
    transaction_->commit();
    transaction_.reset();
}

void SqliteStore::rollback() noexcept {
    const std::lock_guard lock(write_mutex_);
    statements_.reset();
    transaction_.reset();
}

void SqliteStore::set_stamp(const StoreStamp& stamp) {
    const std::lock_guard lock(write_mutex_);
    write_stamp(stamp);
}

StoreStamp SqliteStore::stamp_if_empty(const StoreStamp& stamp) {
    const std::lock_guard lock(write_mutex_);
    writer();
    Change change(*this);  // from here on no other process writes
    const std::optional<StoreStamp> found = stamp_in_settings(*write_);
    if (!found) write_stamp(stamp);
    change.commit();
    return found.value_or(stamp);
}

void SqliteStore::write_stamp(const StoreStamp& stamp) {
    Statement& setting = writer().setting;
    Change change(*this);
    const auto set = [&](const char* name, const auto& value) { setting.bind(1, name).bind(2, value).run(); };
    set("model", std::string_view(stamp.model));
    setting.bind(1, "maker").bind_blob(2, stamp.maker.view()).run();
    set("chunk_len", int64_t{stamp.chunk_len});
    set("form", embedding_form_name(stamp.form));
    set("d_enc", int64_t{stamp.d_enc});
    set("n_vocab", stamp.n_vocab);
    change.commit();
}

void SqliteStore::put(const Document& document, std::span<const NewPassage> passages) {
    const std::lock_guard lock(write_mutex_);
    Writer& w = writer();
    Change change(*this);
    w.find_document.bind(1, document.id);
    const bool is_there = w.find_document.step();
    const int64_t old = is_there ? w.find_document.integer(0) : 0;
    w.find_document.reset();
    if (is_there) {
        remove_passages(old);
        w.delete_document.bind(1, old).run();
    }
    const Sha256Digest digest = document_digest(document);
    w.insert_document.bind(1, document.id)
        .bind(2, document.source)
        .bind(3, document.title)
        .bind(4, document.metadata)
        .bind_blob(5, document.hash.view())
        .bind(6, document.n_passages)
        .bind_blob(7, digest.view())
        .run();
    const int64_t n_document = write_->last_insert_id();
    for (size_t i = 0; i < passages.size(); ++i) {
        const NewPassage& p = passages[i];
        const auto place = static_cast<int64_t>(i);
        const Sha256Digest of = passage_digest(document.id, place, p.begin, p.end, p.title, p.text, p.record);
        w.insert_passage.bind(1, n_document)
            .bind(2, place)
            .bind(3, p.begin)
            .bind(4, p.end)
            .bind(5, p.title)
            .bind(6, p.text)
            .bind_blob(7, of.view())
            .bind_blob(8, p.record)
            .run();
        const int64_t n = write_->last_insert_id();
        w.insert_words.bind(1, n).bind(2, p.title).bind(3, p.text).run();
        if (p.vector.empty()) continue;
        const std::string vector = vector_bytes(p.vector);
        w.insert_vector.bind(1, n).bind_blob(2, vector).run();
    }
    change.commit();
}

bool SqliteStore::remove(std::string_view id) {
    const std::lock_guard lock(write_mutex_);
    Writer& w = writer();
    Change change(*this);
    w.find_document.bind(1, id);
    const bool is_there = w.find_document.step();
    const int64_t n = is_there ? w.find_document.integer(0) : 0;
    w.find_document.reset();
    if (is_there) {
        remove_passages(n);
        w.delete_document.bind(1, n).run();
    }
    change.commit();
    return is_there;
}

void SqliteStore::remove_passages(int64_t document) {
    Writer& w = writer();
    struct Old {
        int64_t n;
        std::string title, text;
    };
    std::vector<Old> old;
    w.passages_of.bind(1, document);
    while (w.passages_of.step())
        old.push_back({w.passages_of.integer(0), w.passages_of.text(1), w.passages_of.text(2)});
    w.passages_of.reset();
    for (const Old& passage : old) {
        w.delete_words.bind(1, passage.n).bind(2, passage.title).bind(3, passage.text).run();
        w.delete_vector.bind(1, passage.n).run();
        w.delete_passage.bind(1, passage.n).run();
    }
}

void SqliteStore::replace_record(int64_t n, std::string_view record, std::span<const float> vector) {
    const int64_t numbers[] = {n};
    const std::vector<StoredPassage> found = get(numbers);
    if (found.empty()) return;
    const StoredPassage& p = found.front();
    const std::lock_guard lock(write_mutex_);
    Writer& w = writer();
    Change change(*this);
    const Sha256Digest of = passage_digest(p.document, p.place, p.begin, p.end, p.title, p.text, record);
    Statement update(*write_, "UPDATE passages SET record = ?, digest = ? WHERE n = ?");
    update.bind_blob(1, record).bind_blob(2, of.view()).bind(3, n).run();
    w.delete_vector.bind(1, n).run();
    const std::string bytes = vector.empty() ? std::string() : vector_bytes(vector);
    if (!vector.empty()) w.insert_vector.bind(1, n).bind_blob(2, bytes).run();
    change.commit();
}

std::optional<Document> SqliteStore::find(std::string_view id) {
    const std::lock_guard lock(read_mutex_);
    Statement select = read_->prepare(str(kDocumentRow, " WHERE id = ?"));
    select.bind(1, id);
    if (!select.step()) return std::nullopt;
    bool fits = false;
    Document document = read_document(select, fits);
    if (!fits) document.hash = {};  // what was changed on disk is indexed again
    return document;
}

void SqliteStore::for_each_document(const std::function<void(const Document&)>& use) {
    const std::lock_guard lock(read_mutex_);
    Statement select = read_->prepare(str(kDocumentRow, " ORDER BY n"));
    while (select.step()) {
        bool fits = false;
        use(read_document(select, fits));
    }
}

std::vector<Found> SqliteStore::search_words(std::span<const std::string> words, int64_t limit,
                                             const Filter& filter) {
    std::vector<Found> found;
    if (words.empty() || limit <= 0) return found;
    const std::string query = match_any(words);
    const std::vector<std::string> paths = filter_paths(filter);
    const std::lock_guard lock(read_mutex_);
    // A word in the title counts twice.
    std::string sql = "SELECT words.rowid, bm25(words, 2.0, 1.0) AS score FROM words";
    if (!filter.empty())
        sql += " JOIN passages ON passages.n = words.rowid JOIN documents ON documents.n = passages.document";
    sql += " WHERE words MATCH ?" + filter_sql(filter) + " ORDER BY score, words.rowid LIMIT ?";
    Statement select = read_->prepare(sql);
    select.bind(1, query);
    bind_filter(select, filter, paths, 2);
    int n_bound = 2;
    for (const Condition& condition : filter)
        n_bound +=
            std::holds_alternative<std::nullptr_t>(condition.value) || condition.op == FilterOp::not_equal
                ? 2
                : 3;
    select.bind(n_bound, limit);
    while (select.step()) found.push_back({select.integer(0), -select.number(1)});
    return found;
}

void SqliteStore::for_each_vector(const Filter& filter,
                                  const std::function<void(int64_t n, std::span<const uint16_t>)>& use) {
    const std::vector<std::string> paths = filter_paths(filter);
    const std::lock_guard lock(read_mutex_);
    std::string sql = "SELECT vectors.n, vector FROM vectors";
    if (!filter.empty())
        sql +=
            " JOIN passages ON passages.n = vectors.n JOIN documents ON documents.n = passages.document "
            "WHERE 1" +
            filter_sql(filter);
    Statement select = read_->prepare(sql + " ORDER BY vectors.n");
    bind_filter(select, filter, paths, 1);
    std::vector<uint16_t> vector;
    while (select.step()) {
        const std::string_view bytes = select.bytes(1);
        if (bytes.size() < vector_check_bytes) continue;
        vector.resize((bytes.size() - vector_check_bytes) / sizeof(uint16_t));
        std::memcpy(vector.data(), bytes.data(), vector.size() * sizeof(uint16_t));
        use(select.integer(0), vector);
    }
}

StoredPassage SqliteStore::read_passage(const Statement& row) const {
    StoredPassage p;
    p.n = row.integer(0);
    p.place = row.integer(1);
    p.begin = row.integer(2);
    p.end = row.integer(3);
    p.title = row.text(4);
    p.text = row.text(5);
    p.record = row.text(7);
    p.document = row.text(8);
    p.metadata = row.text(9);
    const Sha256Digest of = passage_digest(p.document, p.place, p.begin, p.end, p.title, p.text, p.record);
    REFRAG_CHECK(of.view() == row.bytes(6), Status::bad_input, printable(path_), ": damaged: passage ", p.n,
                 " of document ", printable(p.document, 60),
                 " is not what was written: index that document again");
    return p;
}

std::vector<StoredPassage> SqliteStore::get(std::span<const int64_t> numbers) {
    const std::lock_guard lock(read_mutex_);
    Statement select = read_->prepare(
        "SELECT passages.n, place, first, last, passages.title, text, passages.digest, record, documents.id, "
        "metadata FROM passages JOIN documents ON documents.n = passages.document WHERE passages.n = ?");
    std::vector<StoredPassage> passages;
    for (const int64_t n : numbers) {
        select.bind(1, n);
        if (select.step()) passages.push_back(read_passage(select));
        select.reset();
    }
    return passages;
}

std::vector<int64_t> SqliteStore::numbers(int64_t after, int64_t limit) {
    const std::lock_guard lock(read_mutex_);
    Statement select = read_->prepare("SELECT n FROM passages WHERE n > ? ORDER BY n LIMIT ?");
    select.bind(1, after).bind(2, limit);
    std::vector<int64_t> out;
    while (select.step()) out.push_back(select.integer(0));
    return out;
}

StoreStats SqliteStore::stats() {
    const std::lock_guard lock(read_mutex_);
    const auto number = [this](const char* sql) {
        Statement select = read_->prepare(sql);
        return select.step() ? select.integer(0) : 0;
    };
    StoreStats stats;
    stats.n_documents = number("SELECT count(*) FROM documents");
    stats.n_passages = number("SELECT count(*) FROM passages");
    stats.n_vectors = number("SELECT count(*) FROM vectors");
    stats.record_bytes = number("SELECT coalesce(sum(length(record)), 0) FROM passages");
    stats.text_bytes = number("SELECT coalesce(sum(length(CAST(text AS BLOB))), 0) FROM passages");
    stats.store_bytes = number("PRAGMA page_count") * number("PRAGMA page_size");
    return stats;
}

void SqliteStore::verify_structure(const std::function<void(const std::string&)>& problem) {
    {
        const std::lock_guard lock(read_mutex_);
        Statement check = read_->prepare("PRAGMA integrity_check(20)");
        while (check.step())
            if (check.bytes(0) != "ok") problem(check.text(0));
        Statement documents = read_->prepare(kDocumentRow);
        while (documents.step()) {
            bool fits = false;
            const Document document = read_document(documents, fits);
            if (!fits) problem(str("document ", printable(document.id, 60), ": not what was written"));
        }
        check_vectors(problem);
    }
    if (!write_) return;
    const std::lock_guard lock(write_mutex_);
    try {
        write_->execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)");
    } catch (const Error& error) {
        problem(str("the full-text index does not fit the passages: ", error.message()));
    }
}

void SqliteStore::check_vectors(const std::function<void(const std::string&)>& problem) {
    Statement select = read_->prepare("SELECT n, vector FROM vectors");
    while (select.step()) {
        if (!vector_fits(select.bytes(1)))
            problem(str("vector of passage ", select.integer(0), ": not what was written"));
    }
}

int64_t SqliteStore::version() {
    const std::lock_guard lock(read_mutex_);
    return read_->data_version();
}

}  // namespace refrag
