// See postgres.h.
#include "store/postgres.h"

#include <libpq-fe.h>

#include <array>
#include <bit>
#include <cstring>
#include <new>

#include "io/file.h"

namespace refrag {
namespace {

// Types as the server numbers them: pg_type.oid.
constexpr int32_t kInt8 = 20;
constexpr int32_t kBytea = 17;
constexpr int32_t kText = 25;
constexpr int32_t kFloat8 = 701;

constexpr size_t kCopyBytes = size_t{1} << 20;  // handed to libpq at a time
constexpr int kOldestServer = 120000;

std::string big_endian(int64_t value) {
    std::string out;
    append_big_endian(out, value);
    return out;
}

// An array of one dimension that holds no NULL.
template <typename Values, typename Append>
std::string array_of(const Values& values, int32_t type, Append&& append) {
    std::string out;
    append_big_endian(out, int32_t{values.empty() ? 0 : 1});
    append_big_endian(out, int32_t{0});
    append_big_endian(out, type);
    if (values.empty()) return out;
    append_big_endian(out, static_cast<int32_t>(values.size()));
    append_big_endian(out, int32_t{1});
    for (const auto& value : values) append(out, value);
    return out;
}

// The first line of what libpq or the server said.
std::string first_line(const char* said) {
    const std::string_view text = said != nullptr ? said : "";
    std::string line = printable(text.substr(0, text.find('\n')), 300);
    while (!line.empty() && (line.back() == ' ' || line.back() == '.')) line.pop_back();
    return line.empty() ? "no reason given" : line;
}

uint64_t from_big_endian(std::string_view bytes) {
    uint64_t value = 0;
    for (const char c : bytes) value = value << 8 | static_cast<unsigned char>(c);
    return value;
}

void check_schema(std::string_view schema) {
    bool fits = !schema.empty() && schema.size() <= 63 && (schema[0] < '0' || schema[0] > '9');
    for (const char c : schema) fits = fits && ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_');
    // What follows a # may be a part of a password.
    REFRAG_CHECK(fits && !schema.starts_with("pg_"), Status::usage,
                 "postgresql://...#SCHEMA: expected a schema of small letters, digits and _, not pg_...; a # "
                 "elsewhere is written %23");
}

}  // namespace

PostgresPlace parse_postgres_place(std::string_view place) {
    PostgresPlace out;
    const size_t hash = place.rfind('#');
    out.schema = hash == std::string_view::npos ? "refrag" : std::string(place.substr(hash + 1));
    check_schema(out.schema);
    out.url = std::string(place.substr(0, hash));
    char* said = nullptr;
    const std::unique_ptr<PQconninfoOption, void (*)(PQconninfoOption*)> options(
        PQconninfoParse(out.url.c_str(), &said), PQconninfoFree);
    const std::unique_ptr<char, void (*)(void*)> said_owner(said, PQfreemem);
    if (!options) {
        // libpq names the part that it does not understand, which may hold the password.
        const bool secret =
            out.url.find('@') != std::string::npos || out.url.find("password") != std::string::npos;
        fail(Status::usage, "expected postgresql://[user[:password]@]host[:port]/database",
             secret ? ", found something else" : ": " + first_line(said));
    }
    std::string host;
    std::string port;
    std::string database;
    for (const PQconninfoOption* option = options.get(); option->keyword != nullptr; ++option) {
        if (option->val == nullptr) continue;
        const std::string_view keyword = option->keyword;
        if (keyword == "host" || (keyword == "hostaddr" && host.empty())) host = option->val;
        if (keyword == "port") port = option->val;
        if (keyword == "dbname") database = option->val;
    }
    const bool is_socket = host.starts_with('/');
    out.name = "postgresql://" + (is_socket ? "" : host) + (port.empty() || is_socket ? "" : ":" + port) +
               "/" + database + (is_socket ? "?host=" + host : "") + "#" + out.schema;
    out.name = printable(out.name);
    return out;
}

std::string PostgresParameters::place(std::string value, const char* type) {
    values_.push_back(std::move(value));
    return str("$", values_.size(), "::", type);
}

std::string PostgresParameters::add(int64_t value) {
    return place(big_endian(value), "int8");
}
std::string PostgresParameters::add(double value) {
    return place(big_endian(std::bit_cast<int64_t>(value)), "float8");
}
std::string PostgresParameters::add_text(std::string_view text) {
    return place(std::string(text), "text");
}
std::string PostgresParameters::add_bytes(std::string_view bytes) {
    return place(std::string(bytes), "bytea");
}
std::string PostgresParameters::add_all(std::span<const int64_t> values) {
    return place(array_of(values, kInt8, [](std::string& out, int64_t value) { append_field(out, value); }),
                 "int8[]");
}
std::string PostgresParameters::add_all(std::span<const double> values) {
    return place(
        array_of(values, kFloat8,
                 [](std::string& out, double value) { append_field(out, std::bit_cast<int64_t>(value)); }),
        "float8[]");
}
std::string PostgresParameters::add_texts(std::span<const std::string> texts) {
    return place(array_of(texts, kText, [](std::string& out, const std::string& v) { append_field(out, v); }),
                 "text[]");
}
std::string PostgresParameters::add_bytes(std::span<const std::string> values) {
    return place(
        array_of(values, kBytea, [](std::string& out, const std::string& v) { append_field(out, v); }),
        "bytea[]");
}

PostgresResult::PostgresResult(pg_result* handle) : handle_(handle, PQclear) {}

int64_t PostgresResult::n_rows() const {
    return PQntuples(handle_.get());
}

int64_t PostgresResult::n_changed() const {
    int64_t n = 0;
    for (const char* at = PQcmdTuples(handle_.get()); *at >= '0' && *at <= '9'; ++at)
        n = n * 10 + (*at - '0');
    return n;
}

bool PostgresResult::is_null(int64_t row, int column) const {
    return PQgetisnull(handle_.get(), static_cast<int>(row), column) != 0;
}

std::string_view PostgresResult::bytes(int64_t row, int column) const {
    return {PQgetvalue(handle_.get(), static_cast<int>(row), column),
            static_cast<size_t>(PQgetlength(handle_.get(), static_cast<int>(row), column))};
}

int64_t PostgresResult::integer(int64_t row, int column) const {
    REFRAG_DCHECK(is_null(row, column) || bytes(row, column).size() == 8);
    return static_cast<int64_t>(from_big_endian(bytes(row, column)));
}

double PostgresResult::number(int64_t row, int column) const {
    return std::bit_cast<double>(integer(row, column));
}

PostgresConnection::~PostgresConnection() {
    close();
}

void PostgresConnection::close() noexcept {
    PQfinish(handle_);
    handle_ = nullptr;
}

void PostgresConnection::connect() {
    if (handle_ != nullptr && PQstatus(handle_) == CONNECTION_OK) return;
    close();
    // What the URL says comes later, and so counts.
    const std::array<const char*, 5> keywords = {"connect_timeout", "fallback_application_name", "dbname",
                                                 "client_encoding", nullptr};
    const std::array<const char*, 5> values = {"10", "refrag", place_.url.c_str(), "UTF8", nullptr};
    handle_ = PQconnectdbParams(keywords.data(), values.data(), 1);
    if (handle_ == nullptr) throw std::bad_alloc();
    if (PQstatus(handle_) != CONNECTION_OK) {
        const std::string said = first_line(PQerrorMessage(handle_));
        close();
        throw PostgresLost(Status::runtime, str(place_.name, ": cannot be reached (", said, ")"));
    }
    PQsetNoticeProcessor(
        handle_, [](void*, const char*) {}, nullptr);
    const int version = PQserverVersion(handle_);
    REFRAG_CHECK(version >= kOldestServer, Status::runtime, place_.name,
                 ": expected PostgreSQL 12 or newer, found ", version / 10000);
    const char* encoding = PQparameterStatus(handle_, "server_encoding");
    REFRAG_CHECK(encoding != nullptr && std::string_view(encoding) == "UTF8", Status::runtime, place_.name,
                 ": expected a database in UTF8, found one in ", encoding != nullptr ? encoding : "?");
}

std::string PostgresConnection::with_schema(std::string_view sql) const {
    std::string out;
    for (size_t i = 0; i < sql.size(); ++i) {
        const bool is_table = sql[i] == '@' && i + 1 < sql.size() && sql[i + 1] >= 'a' && sql[i + 1] <= 'z';
        if (is_table) {
            ((out += '"') += place_.schema) += "\".";
        } else {
            out += sql[i];
        }
    }
    return out;
}

void PostgresConnection::send(const std::string& sql, const PostgresParameters& parameters) {
    if (handle_ == nullptr) fail_lost();
    std::vector<const char*> values;
    std::vector<int> lengths;
    for (const std::string& value : parameters.values_) {
        REFRAG_CHECK(value.size() < size_t{1} << 30, Status::usage, place_.name,
                     ": a value of at most 2^30 bytes expected, found ", value.size());
        values.push_back(value.data());
        lengths.push_back(static_cast<int>(value.size()));
    }
    const std::vector<int> binary(values.size(), 1);
    const int sent = PQsendQueryParams(handle_, with_schema(sql).c_str(), static_cast<int>(values.size()),
                                       nullptr, values.data(), lengths.data(), binary.data(), 1);
    if (sent == 0) fail_lost();
}

// Of a statement: what it gave, or the error.
PostgresResult PostgresConnection::last_result() {
    PostgresResult last(nullptr);
    while (pg_result* next = PQgetResult(handle_)) {
        const ExecStatusType status = PQresultStatus(next);
        const bool failed = last.handle_ && PQresultStatus(last.handle_.get()) == PGRES_FATAL_ERROR;
        PostgresResult holder(next);
        if (!failed) last = std::move(holder);
        // Within COPY there is always a next result.
        if (status == PGRES_COPY_IN || status == PGRES_COPY_OUT) break;
    }
    check(last);
    return last;
}

void PostgresConnection::check(const PostgresResult& result) {
    switch (PQresultStatus(result.handle_.get())) {
        case PGRES_COMMAND_OK:
        case PGRES_TUPLES_OK:
        case PGRES_SINGLE_TUPLE:
        case PGRES_COPY_IN:
            return;
        default:
            fail_with(result.handle_.get());
    }
}

PostgresResult PostgresConnection::run(const std::string& sql, const PostgresParameters& parameters) {
    send(sql, parameters);
    return last_result();
}

void PostgresConnection::run_script(const std::string& sql) {
    if (handle_ == nullptr || PQsendQuery(handle_, with_schema(sql).c_str()) == 0) fail_lost();
    last_result();
}

void PostgresConnection::stream(const std::string& sql, const PostgresParameters& parameters,
                                const std::function<void(const PostgresResult& row)>& use) {
    send(sql, parameters);
    PQsetSingleRowMode(handle_);
    try {
        while (pg_result* next = PQgetResult(handle_)) {
            const PostgresResult row(next);
            check(row);
            if (row.n_rows() > 0) use(row);
        }
    } catch (...) {
        // The rest is on its way: only a new connection is free of it.
        close();
        throw;
    }
}

void PostgresConnection::copy_in(const std::string& sql, int64_t n_rows,
                                 const std::function<void(int64_t row, std::string& out)>& append_row) {
    if (handle_ == nullptr || PQsendQuery(handle_, with_schema(sql).c_str()) == 0) fail_lost();
    last_result();
    try {
        send_rows(n_rows, append_row);
    } catch (...) {
        // Half a COPY can only be undone.
        close();
        throw;
    }
    last_result();
}

void PostgresConnection::send_rows(int64_t n_rows,
                                   const std::function<void(int64_t row, std::string& out)>& append_row) {
    std::string out("PGCOPY\n\377\r\n\0", 11);
    append_big_endian(out, int32_t{0});  // flags
    append_big_endian(out, int32_t{0});  // no further header
    const auto put = [&] {
        if (PQputCopyData(handle_, out.data(), static_cast<int>(out.size())) != 1) fail_lost();
        out.clear();
    };
    for (int64_t row = 0; row < n_rows; ++row) {
        append_row(row, out);
        REFRAG_CHECK(out.size() < size_t{1} << 30, Status::usage, place_.name,
                     ": a row of at most 2^30 bytes expected, found ", out.size());
        if (out.size() >= kCopyBytes) put();
    }
    append_big_endian(out, int16_t{-1});
    put();
    if (PQputCopyEnd(handle_, nullptr) != 1) fail_lost();
}

void PostgresConnection::fail_lost() {
    const std::string said =
        handle_ != nullptr ? first_line(PQerrorMessage(handle_)) : "closed after an error";
    close();
    throw PostgresLost(Status::runtime, str(place_.name, ": the connection was lost (", said, ")"));
}

void PostgresConnection::fail_with(const pg_result* result) {
    // An error without a code is libpq's own.
    const char* const field = PQresultErrorField(result, PG_DIAG_SQLSTATE);
    if (PQstatus(handle_) != CONNECTION_OK || field == nullptr) fail_lost();
    const std::string_view code = field;
    const std::string said = first_line(PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY));
    const std::string_view kind = code.substr(0, 2);
    if (kind == "08" || code == "57P01" || code == "57P02" || code == "57P03") {
        close();
        throw PostgresLost(Status::runtime, str(place_.name, ": the connection was lost (", said, ")"));
    }
    if (code == "40P01" || code == "40001" || code == "55P03")
        fail(Status::runtime, place_.name, ": another writer was in the way (", said, "): try again");
    if (code == "53100")
        fail(Status::runtime, place_.name, ": no space left on its disk (", said,
             "); what was committed is kept");
    if (code == "57014") fail(Status::runtime, place_.name, ": took too long (", said, ")");
    if (code == "42501" || code == "25006" || kind == "28")
        fail(Status::runtime, place_.name, ": no right to do that (", said, ")");
    // A table, column or type that is missing, or a page that cannot be read.
    if (kind == "42" || kind == "3F" || code == "XX001" || code == "XX002")
        fail(Status::bad_input, place_.name, ": damaged, or not a passage store (", said, ")");
    if (kind == "22" || kind == "23") fail(Status::bad_input, place_.name, ": refused a value (", said, ")");
    fail(Status::runtime, place_.name, ": failed (", said, ", SQLSTATE ", code, ")");
}

void append_row_begin(std::string& out, int16_t n_fields) {
    append_big_endian(out, n_fields);
}

void append_field(std::string& out, int64_t value) {
    append_big_endian(out, int32_t{8});
    append_big_endian(out, value);
}

void append_field(std::string& out, std::string_view bytes) {
    append_big_endian(out, static_cast<int32_t>(bytes.size()));
    out += bytes;
}

}  // namespace refrag
