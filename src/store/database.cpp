// See database.h.
#include "store/database.h"

#include <sqlite3.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <new>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "io/lines.h"

namespace refrag {
namespace {

constexpr std::string_view kSqliteMagic{"SQLite format 3\0", 16};
constexpr int kMaxBlobBytes = 1 << 30;

int as_length(size_t bytes) {
    REFRAG_CHECK(bytes <= static_cast<size_t>(std::numeric_limits<int>::max()), Status::usage,
                 "a store's value: expected at most ", std::numeric_limits<int>::max(), " bytes, found ",
                 bytes);
    return static_cast<int>(bytes);
}

std::string escaped_for_uri(const std::string& path) {
    std::string out;
    for (const char c : path) {
        constexpr std::string_view digits = "0123456789abcdef";
        const auto byte = static_cast<unsigned char>(c);
        if (byte > 0x20 && byte < 0x7f && c != '%' && c != '?' && c != '#') {
            out += c;
        } else {
            (out += '%') += digits[byte >> 4];
            out += digits[byte & 15];
        }
    }
    return out;
}

}  // namespace

Database::Database(const std::string& path, const DatabaseKind& kind, DatabaseMode mode, int busy_ms)
    : path_(path), kind_(kind) {
    REFRAG_CHECK(look_at_file() || mode == DatabaseMode::create, Status::bad_input, printable(path_),
                 ": expected ", kind_.what, ", found ", is_file(path_) ? "an empty file" : "no such file");
    try {
        open(mode, busy_ms);
        check_kind(mode);
    } catch (...) {
        sqlite3_close_v2(handle_);
        throw;
    }
}

Database::~Database() {
    sqlite3_close_v2(handle_);
}

bool Database::look_at_file() const {
    REFRAG_CHECK(!is_directory(path_), Status::bad_input, printable(path_), ": expected ", kind_.what,
                 ", found a directory");
    std::error_code ignored;
    if (!is_file(path_)) {
        REFRAG_CHECK(!std::filesystem::exists(path_, ignored), Status::bad_input, printable(path_),
                     ": expected ", kind_.what, ", found no regular file");
        return false;
    }
    const File file(path_);
    if (file.size() == 0) return false;
    std::string head(std::min<uint64_t>(file.size(), 512), '\0');
    file.read_at(0, head.data(), head.size());
    if (head.starts_with(kSqliteMagic)) return true;
    const std::string_view form = foreign_form(head);
    fail(Status::bad_input, printable(path_), ": expected ", kind_.what, ", found ",
         form.empty() ? "another file" : form);
}

void Database::open(DatabaseMode mode, int busy_ms) {
    int flags = SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
    flags |= mode == DatabaseMode::read ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE;
    if (mode == DatabaseMode::create) flags |= SQLITE_OPEN_CREATE;
    // Where nobody can write (a read-only disk, say), SQLite's files beside it cannot be made, nor are
    // needed.
    std::string name = path_;
    if (mode == DatabaseMode::read && access(path_parent(path_).c_str(), W_OK) != 0 &&
        !is_file(path_ + "-wal")) {
        flags |= SQLITE_OPEN_URI;
        name = "file:" + escaped_for_uri(path_) + "?immutable=1";
    }
    const int code = sqlite3_open_v2(name.c_str(), &handle_, flags, nullptr);
    if (handle_ == nullptr) throw std::bad_alloc();
    if (code != SQLITE_OK) fail_with(code);
    sqlite3_busy_timeout(handle_, busy_ms);
    // A file from elsewhere may hold anything: no functions in its schema, no writing past its tables.
    sqlite3_db_config(handle_, SQLITE_DBCONFIG_DEFENSIVE, 1, nullptr);
    sqlite3_db_config(handle_, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, nullptr);
    sqlite3_db_config(handle_, SQLITE_DBCONFIG_ENABLE_TRIGGER, 0, nullptr);
    sqlite3_db_config(handle_, SQLITE_DBCONFIG_ENABLE_VIEW, 0, nullptr);
    sqlite3_limit(handle_, SQLITE_LIMIT_LENGTH, kMaxBlobBytes);
    execute("PRAGMA cell_size_check = ON");
    if (mode == DatabaseMode::read) return;
    // Readers go on while one writes; a commit survives this process, and the last ones may be lost with the
    // machine's power, whole.
    execute("PRAGMA journal_mode = WAL");
    execute("PRAGMA synchronous = NORMAL");
}

void Database::check_kind(DatabaseMode mode) {
    const auto number = [&](const char* sql) {
        Statement statement = prepare(sql);
        return statement.step() ? statement.integer(0) : 0;
    };
    // A process that was killed at its first steps leaves a database with nothing in it.
    const auto is_blank = [&] {
        return number("PRAGMA application_id") == 0 && number("SELECT count(*) FROM sqlite_schema") == 0;
    };
    if (mode == DatabaseMode::create && is_blank()) {
        Transaction transaction(*this);
        // Another process may have been faster.
        if (is_blank()) {
            execute(kind_.schema);
            execute(str("PRAGMA application_id = ", kind_.application_id).c_str());
            execute(str("PRAGMA user_version = ", kind_.format).c_str());
        }
        transaction.commit();
    }
    const int64_t id = number("PRAGMA application_id");
    REFRAG_CHECK(id == kind_.application_id, Status::bad_input, printable(path_), ": expected ", kind_.what,
                 ", found another SQLite database (application id ", id, ")");
    const int64_t format = number("PRAGMA user_version");
    REFRAG_CHECK(format == kind_.format, Status::bad_input, printable(path_), ": expected ", kind_.what,
                 " of format ", kind_.format, ", found format ", format,
                 format > kind_.format ? ", which a newer refrag wrote" : "");
    if (mode == DatabaseMode::read) return;
    REFRAG_CHECK(sqlite3_db_readonly(handle_, "main") == 0, Status::runtime, printable(path_),
                 ": expected to write to it, found it read-only");
}

void Database::fail_with(int code) const {
    const char* said = handle_ != nullptr ? sqlite3_errmsg(handle_) : sqlite3_errstr(code);
    const std::string name = printable(path_);
    switch (code & 0xff) {
        case SQLITE_NOMEM:
            throw std::bad_alloc();
        case SQLITE_BUSY:
        case SQLITE_LOCKED:
            fail(Status::runtime, name, ": locked by another process that writes to it");
        case SQLITE_READONLY:
        case SQLITE_PERM:
        case SQLITE_AUTH:
            fail(Status::runtime, name, ": expected to write to it, found it read-only (", said, ")");
        case SQLITE_FULL:
            fail(Status::runtime, name, ": no space left on its disk; what was committed is kept");
        case SQLITE_CANTOPEN:
            fail(Status::runtime, name, ": cannot be opened (", said, ")");
        case SQLITE_IOERR:
            fail(Status::runtime, name, ": its disk failed (", said, ")");
        case SQLITE_NOTADB:
        case SQLITE_CORRUPT:
        case SQLITE_SCHEMA:
        case SQLITE_FORMAT:
        case SQLITE_MISMATCH:
            fail(Status::bad_input, name, ": damaged (", said, ")");
        case SQLITE_TOOBIG:
            fail(Status::runtime, name, ": a value is too large (", said, ")");
        default:
            // A table or column that is missing, and the like: the schema is not the one that was written.
            fail(Status::bad_input, name, ": damaged, or not ", kind_.what, " (", said, ")");
    }
}

Statement Database::prepare(std::string_view sql) {
    return Statement(*this, sql);
}

void Database::execute(const char* sql) {
    const int code = sqlite3_exec(handle_, sql, nullptr, nullptr, nullptr);
    if (code != SQLITE_OK) fail_with(code);
}

int64_t Database::changes() const {
    return sqlite3_changes64(handle_);
}

int64_t Database::last_insert_id() const {
    return sqlite3_last_insert_rowid(handle_);
}

int64_t Database::data_version() {
    Statement statement = prepare("PRAGMA data_version");
    return statement.step() ? statement.integer(0) : 0;
}

Statement::Statement(Database& database, std::string_view sql) : database_(&database) {
    check(sqlite3_prepare_v2(database.handle_, sql.data(), as_length(sql.size()), &handle_, nullptr));
}

Statement::~Statement() {
    sqlite3_finalize(handle_);
}

Statement::Statement(Statement&& other) noexcept
    : database_(other.database_), handle_(std::exchange(other.handle_, nullptr)) {}

void Statement::check(int code) const {
    if (code != SQLITE_OK) database_->fail_with(code);
}

Statement& Statement::bind(int index, std::string_view text) {
    // An empty view may have no address, and then would be NULL.
    const char* data = text.empty() ? "" : text.data();
    check(sqlite3_bind_text(handle_, index, data, as_length(text.size()), SQLITE_STATIC));
    return *this;
}

Statement& Statement::bind(int index, int64_t value) {
    check(sqlite3_bind_int64(handle_, index, value));
    return *this;
}

Statement& Statement::bind(int index, double value) {
    check(sqlite3_bind_double(handle_, index, value));
    return *this;
}

Statement& Statement::bind_blob(int index, std::string_view bytes) {
    const char* data = bytes.empty() ? "" : bytes.data();
    check(sqlite3_bind_blob(handle_, index, data, as_length(bytes.size()), SQLITE_STATIC));
    return *this;
}

Statement& Statement::bind_null(int index) {
    check(sqlite3_bind_null(handle_, index));
    return *this;
}

bool Statement::step() {
    const int code = sqlite3_step(handle_);
    if (code == SQLITE_ROW) return true;
    if (code != SQLITE_DONE) database_->fail_with(code);
    return false;
}

void Statement::run() {
    while (step()) {
    }
    reset();
}

void Statement::reset() {
    sqlite3_reset(handle_);  // repeats the last step's error
    sqlite3_clear_bindings(handle_);
}

int64_t Statement::integer(int column) const {
    return sqlite3_column_int64(handle_, column);
}

double Statement::number(int column) const {
    return sqlite3_column_double(handle_, column);
}

bool Statement::is_null(int column) const {
    return sqlite3_column_type(handle_, column) == SQLITE_NULL;
}

std::string_view Statement::bytes(int column) const {
    const void* data = sqlite3_column_blob(handle_, column);
    const int n = sqlite3_column_bytes(handle_, column);
    if (data == nullptr) return {};
    return {static_cast<const char*>(data), static_cast<size_t>(n)};
}

Transaction::Transaction(Database& database) : database_(&database) {
    database.execute("BEGIN IMMEDIATE");
}

Transaction::~Transaction() {
    if (database_ == nullptr) return;
    try {
        database_->execute("ROLLBACK");
    } catch (...) {
        // It was undone with the error that brought us here.
    }
}

void Transaction::commit() {
    database_->execute("COMMIT");
    database_ = nullptr;
}

}  // namespace refrag
