// SQLite behind one wrapper: a file opened for what is needed, statements, transactions, and every failure as
// one line that says which file and what is wrong. A file is ours by its application id and its format.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

struct sqlite3;
struct sqlite3_stmt;

namespace refrag {

// What a file is, for SQLite's header and for messages.
struct DatabaseKind {
    const char* what;        // "a passage store"
    int32_t application_id;  // PRAGMA application_id
    int32_t format;          // PRAGMA user_version; files of a newer one are refused with both numbers
    const char* schema;      // of a new file
};

enum class DatabaseMode {
    read,    // what is there, unchanged
    write,   // what is there
    create,  // what is there, or a new file
};

class Statement;

// One thread at a time. Status::bad_input for a file that is none of this kind, cut short or changed;
// Status::runtime for one that is locked, read-only, on a full disk, or cannot be opened.
class Database {
  public:
    // busy_ms: how long to wait for another process that writes.
    Database(const std::string& path, const DatabaseKind& kind, DatabaseMode mode, int busy_ms = 10000);
    ~Database();
    Database(const Database&) = delete;
    Database& operator=(const Database&) = delete;

    const std::string& path() const { return path_; }
    Statement prepare(std::string_view sql);
    void execute(const char* sql);
    // Rows changed by the last statement.
    int64_t changes() const;
    int64_t last_insert_id() const;
    // Changes whenever another connection has changed the file.
    int64_t data_version();
    // Throws what SQLite's code means for this file.
    [[noreturn]] void fail_with(int code) const;

  private:
    friend class Statement;
    bool look_at_file() const;  // whether there is anything in it
    void open(DatabaseMode mode, int busy_ms);
    void check_kind(DatabaseMode mode);

    std::string path_;
    DatabaseKind kind_;
    sqlite3* handle_ = nullptr;
};

// Placeholders and columns count from 1 and 0, as in SQLite. Movable; ends before its database.
class Statement {
  public:
    Statement(Database& database, std::string_view sql);
    ~Statement();
    Statement(Statement&& other) noexcept;
    Statement& operator=(Statement&&) = delete;
    Statement(const Statement&) = delete;
    Statement& operator=(const Statement&) = delete;

    // The bytes must live until the next reset().
    Statement& bind(int index, std::string_view text);
    Statement& bind(int index, const char* text) { return bind(index, std::string_view(text)); }
    Statement& bind(int index, int64_t value);
    Statement& bind(int index, double value);
    Statement& bind_blob(int index, std::string_view bytes);
    Statement& bind_null(int index);

    // Whether there is a row.
    bool step();
    // Runs a statement that gives no rows, and resets it.
    void run();
    // To be used again; the values that were bound are let go of.
    void reset();

    int64_t integer(int column) const;
    double number(int column) const;
    bool is_null(int column) const;
    // Valid until the next step or reset. Text and blob alike: the bytes as they lie.
    std::string_view bytes(int column) const;
    std::string text(int column) const { return std::string(bytes(column)); }

  private:
    void check(int code) const;

    Database* database_;
    sqlite3_stmt* handle_ = nullptr;
};

// Begins at once to write (BEGIN IMMEDIATE); undone unless committed.
class Transaction {
  public:
    explicit Transaction(Database& database);
    ~Transaction();
    Transaction(const Transaction&) = delete;
    Transaction& operator=(const Transaction&) = delete;
    void commit();

  private:
    Database* database_;
};

}  // namespace refrag
