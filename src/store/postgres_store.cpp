// See postgres_store.h.
#include "store/postgres_store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "io/file.h"
#include "refrag/bm25.h"
#include "store/postgres_filter.h"
#include "store/postgres_schema.h"
#include "store/postgres_words.h"

namespace refrag {
namespace {

constexpr int64_t kFormat = 1;
constexpr size_t kMostStems = size_t{1} << 18;
constexpr double kTitleWeight = 2.0;
// What FTS5 gives words that half of all passages hold.
constexpr double kLeastIdf = 1e-6;

constexpr const char* kDocumentColumns =
    "SELECT id, source, title, metadata, hash, n_passages, digest FROM @documents";

// digest_fits: whether the row is as it was written.
Document document_in(const PostgresResult& rows, bool& digest_fits) {
    Document document;
    document.id = rows.text(0, 0);
    document.source = rows.text(0, 1);
    document.title = rows.text(0, 2);
    document.metadata = rows.text(0, 3);
    document.hash = stored_digest(rows.bytes(0, 4));
    document.n_passages = rows.integer(0, 5);
    digest_fits = document_digest(document).view() == rows.bytes(0, 6);
    return document;
}

std::string joined_filter(const Filter& filter, PostgresParameters& parameters) {
    if (filter.empty()) return "";
    return " JOIN @documents d ON d.n = p.document" + postgres_filter(filter, parameters);
}

}  // namespace

PostgresStore::PostgresStore(const std::string& place, StoreMode mode)
    : place_(parse_postgres_place(place)), writes_(mode != StoreMode::read), write_(place_), read_(place_) {
    read_.connect();
    if (mode == StoreMode::create) make_schema();
    check_format();
    if (writes_) write_.connect();
}

PostgresStore::~PostgresStore() {
    abort();
}

void PostgresStore::make_schema() {
    const auto is_there = [this] {
        PostgresParameters asked;
        const std::string schema = asked.add_text(place_.schema);
        return read_.run(
            "SELECT (to_regclass('@format') IS NOT NULL)::int::int8, count(*) FROM pg_class c JOIN "
            "pg_namespace s ON s.oid = c.relnamespace WHERE s.nspname = " +
                schema,
            asked);
    };
    if (is_there().integer(0, 0) != 0) return;
    // One process at a time: others wait, and find the schema made.
    read_.run("BEGIN");
    read_.run("SELECT pg_advisory_xact_lock(hashtext('refrag schema'))");
    const PostgresResult now = is_there();
    if (now.integer(0, 0) == 0) {
        REFRAG_CHECK(now.integer(0, 1) == 0, Status::bad_input, place_.name,
                     ": expected a passage store or nothing, found a schema with other tables");
        PostgresParameters asked;
        const std::string schema = asked.add_text(place_.schema);
        // Who may not make schemas may use one that was made for him.
        if (read_.run("SELECT 1 FROM pg_namespace WHERE nspname = " + schema, asked).n_rows() == 0)
            read_.run_script("CREATE SCHEMA \"" + place_.schema + "\"");
        read_.run_script("SET LOCAL search_path = \"" + place_.schema + "\";" + postgres_schema_sql);
    }
    read_.run("COMMIT");
}

void PostgresStore::check_format() {
    REFRAG_CHECK(read_.run("SELECT 1 WHERE to_regclass('@format') IS NOT NULL").n_rows() == 1,
                 Status::bad_input, place_.name,
                 ": expected a passage store, found no such schema (refrag index makes it)");
    const PostgresResult rows = read_.run("SELECT format::int8 FROM @format");
    const int64_t format = rows.n_rows() == 1 ? rows.integer(0, 0) : 0;
    REFRAG_CHECK(format == kFormat, Status::bad_input, place_.name, ": expected a passage store of format ",
                 kFormat, ", found format ", format, format > kFormat ? ", which a newer refrag wrote" : "");
}

// A connection that broke since it was last used is made anew, and the reading done again.
template <typename Body>
auto PostgresStore::reading(Body&& body) {
    const std::lock_guard lock(read_mutex_);
    read_.connect();
    try {
        return body();
    } catch (const PostgresLost&) {
        read_.connect();
    }
    return body();
}

// Rows that were handed out cannot be taken back: a connection lost among them ends the reading.
void PostgresStore::read_rows(const std::string& sql, const PostgresParameters& parameters,
                              const std::function<void(const PostgresResult& row)>& use) {
    reading([&] {
        bool any = false;
        try {
            read_.stream(sql, parameters, [&](const PostgresResult& row) {
                any = true;
                use(row);
            });
        } catch (const PostgresLost& lost) {
            if (any) fail(lost.status(), lost.message());
            throw;
        }
    });
}

std::optional<StoreStamp> PostgresStore::stamp() {
    return reading([&]() -> std::optional<StoreStamp> {
        const PostgresResult rows =
            read_.run("SELECT model, maker, chunk_len::int8, form, d_enc::int8, n_vocab::int8 FROM @stamp");
        if (rows.n_rows() == 0) return std::nullopt;
        StoreStamp stamp;
        stamp.model = rows.text(0, 0);
        stamp.maker = stored_digest(rows.bytes(0, 1));
        stamp.chunk_len = static_cast<int32_t>(rows.integer(0, 2));
        stamp.form = parse_embedding_form(place_.name, rows.bytes(0, 3));
        stamp.d_enc = static_cast<int32_t>(rows.integer(0, 4));
        stamp.n_vocab = rows.integer(0, 5);
        return stamp;
    });
}

std::optional<Document> PostgresStore::find(std::string_view id) {
    return reading([&]() -> std::optional<Document> {
        PostgresParameters asked;
        const std::string given = asked.add_bytes(id);
        const PostgresResult rows =
            read_.run(str(kDocumentColumns, " WHERE sha256(id) = sha256(", given, ")"), asked);
        if (rows.n_rows() == 0) return std::nullopt;
        bool fits = false;
        Document document = document_in(rows, fits);
        if (!fits) document.hash = {};  // what was changed is indexed again
        return document;
    });
}

void PostgresStore::for_each_document(const std::function<void(const Document&)>& use) {
    read_rows(str(kDocumentColumns, " ORDER BY n"), {}, [&](const PostgresResult& row) {
        bool fits = false;
        use(document_in(row, fits));
    });
}

std::vector<std::string> PostgresStore::stems_of(PostgresConnection& connection,
                                                 const std::vector<std::string>& words) {
    std::unordered_map<std::string_view, std::string> stems;
    std::vector<std::string> missing;
    {
        const std::lock_guard lock(stem_mutex_);
        if (stems_.size() > kMostStems) stems_.clear();
        for (const std::string& word : words) {
            const auto [place, is_new] = stems.try_emplace(word);
            if (!is_new) continue;
            const auto known = stems_.find(word);
            if (known != stems_.end()) {
                place->second = known->second;
            } else {
                missing.push_back(word);
            }
        }
    }
    if (!missing.empty()) {
        PostgresParameters asked;
        const std::string all = asked.add_texts(missing);
        const PostgresResult rows =
            connection.run("SELECT coalesce((ts_lexize('@words', t.word))[1], t.word) FROM unnest(" + all +
                               ") WITH ORDINALITY AS t(word, place) ORDER BY t.place",
                           asked);
        const std::lock_guard lock(stem_mutex_);
        for (size_t i = 0; i < missing.size(); ++i)
            stems.find(missing[i])->second = stems_[missing[i]] = rows.text(static_cast<int64_t>(i), 0);
    }
    std::vector<std::string> out;
    out.reserve(words.size());
    for (const std::string& word : words) out.push_back(stems.find(word)->second);
    return out;
}

std::vector<Found> PostgresStore::search_words(std::span<const std::string> words, int64_t limit,
                                               const Filter& filter) {
    std::vector<std::string> asked_words;
    for (const std::string& word : words)
        for (std::string& one : index_words(word)) asked_words.push_back(std::move(one));
    if (asked_words.empty() || limit <= 0) return {};
    return reading([&] {
        const std::vector<std::string> stems = stems_of(read_, asked_words);
        const WordCounts counts = count_words(stems);
        // Words that most passages hold decide nothing, and make every passage a candidate.
        std::vector<std::string> rare;
        for (size_t i = 0; i < stems.size(); ++i)
            if (counts.idf[i] > kLeastIdf) rare.push_back(stems[i]);
        std::vector<Found> found;
        if (!rare.empty()) found = best_passages(stems, counts, rare, limit, filter);
        if (std::ssize(found) < limit && rare.size() < stems.size())
            found = best_passages(stems, counts, stems, limit, filter);
        return found;
    });
}

PostgresStore::WordCounts PostgresStore::count_words(const std::vector<std::string>& stems) {
    const PostgresResult sums =
        read_.run("SELECT coalesce(sum(passages), 0)::int8, coalesce(sum(words), 0)::int8 FROM @counters");
    const auto n = static_cast<double>(sums.integer(0, 0));
    WordCounts counts;
    counts.mean_words = n > 0 ? std::max(1.0, static_cast<double>(sums.integer(0, 1)) / n) : 1.0;
    std::vector<std::string> quoted;
    quoted.reserve(stems.size());
    for (const std::string& stem : stems) quoted.push_back(quoted_lexeme(stem));
    PostgresParameters asked;
    const std::string queries = asked.add_texts(quoted);
    const PostgresResult rows =
        read_.run("SELECT (SELECT count(*) FROM @passages WHERE words @@ t.query::tsquery) FROM unnest(" +
                      queries + ") WITH ORDINALITY AS t(query, place) ORDER BY t.place",
                  asked);
    for (int64_t i = 0; i < rows.n_rows(); ++i) {
        const auto having = static_cast<double>(rows.integer(i, 0));
        counts.idf.push_back(
            std::max(std::log((std::max(n, having) - having + 0.5) / (having + 0.5)), kLeastIdf));
    }
    return counts;
}

std::vector<Found> PostgresStore::best_passages(const std::vector<std::string>& stems,
                                                const WordCounts& counts,
                                                const std::vector<std::string>& candidates, int64_t limit,
                                                const Filter& filter) {
    PostgresParameters asked;
    const std::string all = asked.add_texts(stems);
    const std::string idf = asked.add_all(counts.idf);
    const std::string k1 = asked.add(bm25_k1);
    const std::string b = asked.add(bm25_b);
    const std::string mean = asked.add(counts.mean_words);
    const std::string title_more = asked.add(kTitleWeight - 1.0);
    const std::string query = asked.add_text(any_of(candidates));
    const std::string most = asked.add(limit);
    const std::string joined = joined_filter(filter, asked);
    const PostgresResult rows = read_.run(
        "SELECT p.n, sum(asked.idf * times.tf * (" + k1 + " + 1) / (times.tf + " + k1 + " * (1 - " + b +
            " + " + b + " * p.n_words / " + mean + "))) AS score FROM @passages p" + joined +
            " CROSS JOIN LATERAL unnest(p.words) AS w(lexeme, positions, weights) JOIN unnest(" + all + ", " +
            idf +
            ") AS asked(lexeme, idf) ON asked.lexeme = w.lexeme CROSS JOIN LATERAL (SELECT "
            "cardinality(w.positions) + " +
            title_more + " * cardinality(array_positions(w.weights, 'A')) AS tf) times WHERE p.words @@ (" +
            query + ")::tsquery GROUP BY p.n ORDER BY score DESC, p.n LIMIT " + most,
        asked);
    std::vector<Found> found;
    for (int64_t i = 0; i < rows.n_rows(); ++i) found.push_back({rows.integer(i, 0), rows.number(i, 1)});
    return found;
}

void PostgresStore::for_each_vector(const Filter& filter,
                                    const std::function<void(int64_t n, std::span<const uint16_t>)>& use) {
    PostgresParameters asked;
    std::string sql = "SELECT v.n, v.vector FROM @vectors v";
    if (!filter.empty()) sql += " JOIN @passages p ON p.n = v.n" + joined_filter(filter, asked);
    std::vector<uint16_t> vector;
    read_rows(sql + " ORDER BY v.n", asked, [&](const PostgresResult& row) {
        const std::string_view bytes = row.bytes(0, 1);
        if (bytes.size() < vector_check_bytes) return;
        vector.resize((bytes.size() - vector_check_bytes) / sizeof(uint16_t));
        std::memcpy(vector.data(), bytes.data(), vector.size() * sizeof(uint16_t));
        use(row.integer(0, 0), vector);
    });
}

StoredPassage PostgresStore::read_passage(const PostgresResult& rows, int64_t row) const {
    StoredPassage p;
    p.n = rows.integer(row, 0);
    p.place = rows.integer(row, 1);
    p.begin = rows.integer(row, 2);
    p.end = rows.integer(row, 3);
    p.title = rows.text(row, 4);
    p.text = rows.text(row, 5);
    p.record = rows.text(row, 7);
    p.document = rows.text(row, 8);
    p.metadata = rows.text(row, 9);
    const Sha256Digest of = passage_digest(p.document, p.place, p.begin, p.end, p.title, p.text, p.record);
    REFRAG_CHECK(of.view() == rows.bytes(row, 6), Status::bad_input, place_.name, ": damaged: passage ", p.n,
                 " of document ", printable(p.document, 60),
                 " is not what was written: index that document again");
    return p;
}

std::vector<StoredPassage> PostgresStore::get(std::span<const int64_t> numbers) {
    return reading([&] {
        PostgresParameters asked;
        const std::string all = asked.add_all(numbers);
        const PostgresResult rows = read_.run(
            "SELECT p.n, p.place, p.first, p.last, p.title, p.text, p.digest, p.record, d.id, d.metadata "
            "FROM unnest(" +
                all +
                ") WITH ORDINALITY AS asked(n, place) JOIN @passages p ON p.n = asked.n JOIN @documents d ON "
                "d.n = "
                "p.document ORDER BY asked.place",
            asked);
        std::vector<StoredPassage> passages;
        for (int64_t i = 0; i < rows.n_rows(); ++i) passages.push_back(read_passage(rows, i));
        return passages;
    });
}

std::vector<int64_t> PostgresStore::numbers(int64_t after, int64_t limit) {
    return reading([&] {
        PostgresParameters asked;
        const std::string from = asked.add(after);
        const std::string most = asked.add(limit);
        const PostgresResult rows =
            read_.run("SELECT n FROM @passages WHERE n > " + from + " ORDER BY n LIMIT " + most, asked);
        std::vector<int64_t> out;
        for (int64_t i = 0; i < rows.n_rows(); ++i) out.push_back(rows.integer(i, 0));
        return out;
    });
}

StoreStats PostgresStore::stats() {
    return reading([&] {
        const PostgresResult rows = read_.run(
            "SELECT (SELECT count(*) FROM @documents), count(*), (SELECT count(*) FROM @vectors), "
            "coalesce(sum(octet_length(record)), 0)::int8, coalesce(sum(octet_length(text)), 0)::int8, "
            "pg_total_relation_size('@documents') + pg_total_relation_size('@passages') + "
            "pg_total_relation_size('@vectors') FROM @passages");
        StoreStats stats;
        stats.n_documents = rows.integer(0, 0);
        stats.n_passages = rows.integer(0, 1);
        stats.n_vectors = rows.integer(0, 2);
        stats.record_bytes = rows.integer(0, 3);
        stats.text_bytes = rows.integer(0, 4);
        stats.store_bytes = rows.integer(0, 5);
        return stats;
    });
}

int64_t PostgresStore::version() {
    return reading(
        [&] { return read_.run("SELECT coalesce(sum(version), 0)::int8 FROM @counters").integer(0, 0); });
}

void PostgresStore::verify_structure(const std::function<void(const std::string&)>& problem) {
    read_rows(kDocumentColumns, {}, [&](const PostgresResult& row) {
        bool fits = false;
        const Document document = document_in(row, fits);
        if (!fits) problem(str("document ", printable(document.id, 60), ": not what was written"));
    });
    // A text with a zero byte is another one in jsonb.
    read_rows(
        "SELECT id FROM @documents WHERE position('\\u0000' in encode(metadata, 'escape')) = 0 AND fields IS "
        "DISTINCT FROM convert_from(metadata, 'UTF8')::jsonb",
        {}, [&](const PostgresResult& row) {
            problem(str("document ", printable(row.bytes(0, 0), 60), ": its fields are not its metadata's"));
        });
    read_rows("SELECT n, vector FROM @vectors", {}, [&](const PostgresResult& row) {
        if (!vector_fits(row.bytes(0, 1)))
            problem(str("vector of passage ", row.integer(0, 0), ": not what was written"));
    });
    check_words(problem);
    reading([&] {
        const PostgresResult rows = read_.run(
            "SELECT (SELECT sum(passages) FROM @counters) = count(*) AND (SELECT sum(words) FROM @counters) "
            "= coalesce(sum(n_words), 0) FROM @passages");
        if (rows.bytes(0, 0) != std::string_view("\1", 1)) problem("the counters do not fit the passages");
    });
}

// Made again from the texts, a batch at a time.
void PostgresStore::check_words(const std::function<void(const std::string&)>& problem) {
    constexpr int64_t kBatch = 256;
    int64_t after = -1;
    while (true) {
        const int64_t n_rows = reading([&] {
            PostgresParameters asked;
            const std::string from = asked.add(after);
            const std::string most = asked.add(kBatch);
            const PostgresResult rows =
                read_.run(str("SELECT n, title, text, words, n_words FROM @passages WHERE n > ", from,
                              " ORDER BY n LIMIT ", most),
                          asked);
            for (int64_t i = 0; i < rows.n_rows(); ++i) {
                const std::vector<std::string> title = stems_of(read_, index_words(rows.bytes(i, 1)));
                const std::vector<std::string> text = stems_of(read_, index_words(rows.bytes(i, 2)));
                const bool fits = word_vector(title, text) == rows.bytes(i, 3) &&
                                  std::ssize(title) + std::ssize(text) == rows.integer(i, 4);
                after = rows.integer(i, 0);
                if (!fits) problem(str("words of passage ", after, ": not those of its text"));
            }
            return rows.n_rows();
        });
        if (n_rows < kBatch) return;
    }
}

}  // namespace refrag
