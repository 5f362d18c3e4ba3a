// See record_cache.h.
#include "store/record_cache.h"

#include <filesystem>
#include <utility>

#include "base/check.h"
#include "io/file.h"

namespace refrag {
namespace {

constexpr const char* kCacheSchema =
    "CREATE TABLE records (n INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, used INTEGER NOT NULL, "
    "record BLOB NOT NULL);"
    "CREATE INDEX records_used ON records (used)";
constexpr DatabaseKind kCacheKind = {"a chunk-embedding cache", 0x52464743 /* RFGC */, 1, kCacheSchema};

// How exact "last used" is: a hit writes no more often than this.
constexpr int kUsedSeconds = 3600;

void remove_database(const std::string& path) {
    for (const char* suffix : {"-wal", "-shm", ""}) {
        std::error_code error;
        std::filesystem::remove(path + suffix, error);
    }
}

}  // namespace

RecordCache::RecordCache(const std::string& dir, EmbeddingForm form, uint64_t max_bytes, CacheWarning warn)
    : WriteBehind(form, std::move(warn)),
      path_(path_join(dir, "chunk-embeddings.db")),
      max_bytes_(max_bytes) {
    std::error_code error;
    std::filesystem::create_directories(dir, error);
    REFRAG_CHECK(is_directory(dir), Status::runtime, "cache ", printable(dir), ": cannot be made (",
                 error ? error.message() : "something else has that name", ")");
    try {
        open();
    } catch (const Error& first) {
        // Damaged: it holds nothing that cannot be computed again. Not ours: hands off.
        const std::string& said = first.message();
        if (first.status() != Status::bad_input || said.find(": damaged") == std::string::npos) throw;
        this->warn(said + ": begun anew");
        reader_.reset();
        writer_.reset();
        remove_database(path_);
        open();
    }
    start();
}

void RecordCache::open() {
    writer_ = std::make_unique<Database>(path_, kCacheKind, DatabaseMode::create);
    reader_ = std::make_unique<Database>(path_, kCacheKind, DatabaseMode::read);
    reader_->prepare("SELECT record FROM records ORDER BY used LIMIT 1").step();
}

RecordCache::~RecordCache() {
    stop();
    // The last connection to close puts the log into the file, which a reading one cannot.
    reader_.reset();
    writer_.reset();
    if (is_broken()) remove_database(path_);
}

std::optional<std::string> RecordCache::look_up(const Sha256Digest& key) {
    std::string record;
    bool stale = false;
    {
        const std::lock_guard lock(read_mutex_);
        Statement select = reader_->prepare("SELECT record, unixepoch() - used FROM records WHERE key = ?");
        select.bind_blob(1, key.view());
        if (!select.step()) return std::nullopt;
        record = select.text(0);
        stale = select.integer(1) >= kUsedSeconds;
    }
    if (stale) keep(key, record);
    return record;
}

void RecordCache::write(const std::vector<Entry>& entries) {
    Transaction transaction(*writer_);
    Statement insert = writer_->prepare(
        "INSERT INTO records (key, used, record) VALUES (?, unixepoch(), ?) "
        "ON CONFLICT (key) DO UPDATE SET used = excluded.used, record = excluded.record");
    Statement remove = writer_->prepare("DELETE FROM records WHERE key = ?");
    for (const Entry& entry : entries) {
        Statement& statement = entry.record ? insert : remove;
        statement.bind_blob(1, entry.key.view());
        if (entry.record) statement.bind_blob(2, *entry.record);
        statement.run();
    }
    evict();
    transaction.commit();
}

// Pages that hold something.
uint64_t RecordCache::used_bytes() {
    const auto number = [this](const char* pragma) {
        Statement statement = writer_->prepare(pragma);
        return statement.step() ? static_cast<uint64_t>(statement.integer(0)) : 0;
    };
    return (number("PRAGMA page_count") - number("PRAGMA freelist_count")) * number("PRAGMA page_size");
}

// Down to nine tenths, so that not every write has to.
void RecordCache::evict() {
    if (used_bytes() <= max_bytes_) return;
    Statement remove =
        writer_->prepare("DELETE FROM records WHERE n IN (SELECT n FROM records ORDER BY used, n LIMIT 8)");
    do {
        remove.run();
    } while (writer_->changes() > 0 && used_bytes() > max_bytes_ / 10 * 9);
}

}  // namespace refrag
