// PostgreSQL behind one wrapper: a server named by a URL, parameters and results in binary, and every failure
// as one line that says which store and what is wrong, without the password. No statement holds a user's
// text: values are parameters always.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"

struct pg_conn;
struct pg_result;

namespace refrag {

// postgresql://[user[:password]@]host[:port]/database[?option=value...][#schema], as libpq takes it but for
// the schema, "refrag" by default: small letters, digits and _. A # elsewhere is written %23.
struct PostgresPlace {
    std::string url;     // without the schema
    std::string schema;  // needs no quoting
    std::string name;    // for messages: without user, password and options
};

// Status::usage for what is none.
PostgresPlace parse_postgres_place(std::string_view place);

// The connection broke, or there is none: what was open is lost. Status::runtime.
class PostgresLost : public Error {
  public:
    using Error::Error;
};

// A statement's values. Each add gives the placeholder that stands for the value, with its type.
class PostgresParameters {
  public:
    std::string add(int64_t value);
    std::string add(double value);
    std::string add_text(std::string_view text);  // UTF-8 without zero bytes
    std::string add_bytes(std::string_view bytes);
    std::string add_all(std::span<const int64_t> values);
    std::string add_all(std::span<const double> values);
    std::string add_texts(std::span<const std::string> texts);
    std::string add_bytes(std::span<const std::string> values);

  private:
    friend class PostgresConnection;
    std::string place(std::string value, const char* type);

    std::vector<std::string> values_;
};

// Columns count from 0. Integers are int8, numbers float8: statements cast to them.
class PostgresResult {
  public:
    explicit PostgresResult(pg_result* handle);

    int64_t n_rows() const;
    int64_t n_changed() const;  // rows that the statement inserted, changed or deleted
    bool is_null(int64_t row, int column) const;
    int64_t integer(int64_t row, int column) const;
    double number(int64_t row, int column) const;
    // As long as the result.
    std::string_view bytes(int64_t row, int column) const;
    std::string text(int64_t row, int column) const { return std::string(bytes(row, column)); }

  private:
    friend class PostgresConnection;
    std::unique_ptr<pg_result, void (*)(pg_result*)> handle_;
};

// One thread at a time. In statements, @NAME is the store's table of that name. Status::runtime for a server
// that cannot be reached, refuses or is full; Status::bad_input for a store that is damaged.
class PostgresConnection {
  public:
    explicit PostgresConnection(const PostgresPlace& place) : place_(place) {}
    ~PostgresConnection();
    PostgresConnection(const PostgresConnection&) = delete;
    PostgresConnection& operator=(const PostgresConnection&) = delete;

    // Connects where there is no connection, or a broken one.
    void connect();

    PostgresResult run(const std::string& sql, const PostgresParameters& parameters = {});
    // Several statements without values.
    void run_script(const std::string& sql);
    // Row by row, as the server sends them: each row is a result of its own.
    void stream(const std::string& sql, const PostgresParameters& parameters,
                const std::function<void(const PostgresResult& row)>& use);
    // COPY ... FROM STDIN in binary: append_row adds a row to `out` (below).
    void copy_in(const std::string& sql, int64_t n_rows,
                 const std::function<void(int64_t row, std::string& out)>& append_row);
    // Ends the connection.
    void close() noexcept;

  private:
    std::string with_schema(std::string_view sql) const;
    void send(const std::string& sql, const PostgresParameters& parameters);
    void send_rows(int64_t n_rows, const std::function<void(int64_t row, std::string& out)>& append_row);
    PostgresResult last_result();
    void check(const PostgresResult& result);
    [[noreturn]] void fail_with(const pg_result* result);
    [[noreturn]] void fail_lost();

    const PostgresPlace place_;
    pg_conn* handle_ = nullptr;
};

// Fields of a binary row, as COPY takes them: how many, then each.
void append_row_begin(std::string& out, int16_t n_fields);
void append_field(std::string& out, int64_t value);
void append_field(std::string& out, std::string_view bytes);

// A number with its big end first.
template <typename Number>
void append_big_endian(std::string& out, Number value) {
    for (int shift = static_cast<int>(sizeof(Number)) * 8 - 8; shift >= 0; shift -= 8)
        out += static_cast<char>(static_cast<uint64_t>(value) >> shift & 0xff);
}

}  // namespace refrag
