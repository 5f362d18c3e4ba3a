// `refrag index`: documents into a passage store, and what is in it.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <thread>

#include "base/check.h"
#include "cli/common.h"
#include "cli/interrupt.h"
#include "cli/numbers.h"
#include "cli/store_commands.h"
#include "io/file.h"
#include "io/json.h"
#include "refrag/passage_record.h"
#include "refrag/timer.h"
#include "store/documents.h"
#include "store/indexer.h"

namespace refrag {
namespace {

struct IndexCommand {
    std::string store;
    std::vector<std::string> files;
    std::string model_dir;
    DeviceOptions device;
    IndexOptions index;
    std::string form = "bf16";
    bool encoded = false;
    bool skip_bad = false;
    bool follow = false;
    int32_t follow_seconds = 2;
    std::vector<std::string> remove;
    bool list = false;
    bool stats = false;
    bool verify = false;
    bool reencode = false;
    bool json = false;
};

void check_command(const IndexCommand& command) {
    const bool writes = !command.files.empty() || command.reencode;
    const bool looks = command.list || command.stats || command.verify;
    REFRAG_CHECK(
        writes || looks || !command.remove.empty(), Status::usage,
        "index: expected FILES to index, or --delete, --list, --stats, --verify or --reencode, found none");
    REFRAG_CHECK(!command.follow || !command.files.empty(), Status::usage,
                 "index: --follow: expected a directory to follow, found none");
    REFRAG_CHECK(!command.follow || !command.encoded, Status::usage,
                 "index: expected --follow or --encoded, found both");
    REFRAG_CHECK(!writes || command.encoded || !command.model_dir.empty(), Status::usage,
                 "index: expected -m MODEL (or REFRAG_MODEL) to encode with, found none");
    for (const std::string& file : command.files)
        REFRAG_CHECK(!command.follow || is_directory(file), Status::usage, "index: --follow ",
                     printable(file), ": expected a directory");
}

void print_counts(const IndexCounts& counts, double seconds) {
    std::fprintf(stderr,
                 "documents %lld: new %lld, changed %lld, unchanged %lld | passages %lld (%lld chunks), "
                 "the same text before %lld | %.1f s, %.0f passages/s\n",
                 static_cast<long long>(counts.n_documents), static_cast<long long>(counts.n_added),
                 static_cast<long long>(counts.n_replaced), static_cast<long long>(counts.n_unchanged),
                 static_cast<long long>(counts.n_passages), static_cast<long long>(counts.n_chunks),
                 static_cast<long long>(counts.n_repeated), seconds,
                 static_cast<double>(counts.n_passages) / std::max(seconds, 1e-9));
}

int64_t size_of(const std::string& file) {
    std::error_code ignored;
    const uintmax_t bytes = file == "-" ? 0 : std::filesystem::file_size(file, ignored);
    return ignored ? 0 : static_cast<int64_t>(bytes);
}

void index_files(Indexer& indexer, const std::vector<std::string>& files, const Interrupt& interrupt) {
    int64_t total = 0;
    for (const std::string& file : files) total += size_of(file);
    Progress progress("indexing", ProgressUnit::bytes);
    int64_t before = 0;
    for (const std::string& file : files) {
        indexer.add_file(
            file, [&] { return !interrupt.asked(); },
            [&](uint64_t bytes) { progress.update(before + static_cast<int64_t>(bytes), total); });
        before += size_of(file);
        if (interrupt.asked()) break;
    }
    indexer.finish();
}

// What `refrag encode` wrote. The stamp is the store's, or the model's where the store is empty.
void load_encoded(PassageStore& store, const IndexCommand& command) {
    std::optional<StoreStamp> stamp = store.stamp();
    if (!stamp) {
        REFRAG_CHECK(!command.model_dir.empty(), Status::usage,
                     "index --encoded: an empty store: expected -m MODEL, the one that encoded, found none");
        const std::unique_ptr<Device> device = make_device(command.device);
        const std::unique_ptr<Model> model = load_model(*device, command.model_dir, command.device);
        const StoreStamp own = stamp_of(*model, command.index);
        stamp = store.stamp_if_empty(own);
        check_stamp(store.name(), *stamp, own);
    }
    IndexCounts counts;
    const double started_ms = now_ms();
    std::vector<EncodedDocument> batch;
    const auto flush = [&] {
        write_batch(store, batch);
        batch.clear();
    };
    for (const std::string& file : command.files) {
        LineStream lines(file);
        std::string_view text;
        while (lines.next(text)) {
            if (is_blank(text)) continue;
            try {
                const Json json = Json::parse(text, str(lines.name(), ": line ", lines.number()));
                EncodedDocument encoded = read_encoded_line(json, *stamp);
                ++counts.n_documents;
                const std::optional<Document> old = store.find(encoded.document.id);
                if (old && old->hash == encoded.document.hash) {
                    ++counts.n_unchanged;
                    continue;
                }
                ++(old ? counts.n_replaced : counts.n_added);
                counts.n_passages += encoded.document.n_passages;
                counts.n_chunks += encoded.n_chunks;
                batch.push_back(std::move(encoded));
            } catch (const Error& error) {
                if (!command.skip_bad || error.status() != Status::bad_input) throw;
                command.index.on_bad(error);
            }
            if (batch.size() >= 256) flush();
        }
    }
    flush();
    print_counts(counts, (now_ms() - started_ms) / 1e3);
}

// Size and time of a file's last change: another pair, another content.
std::pair<int64_t, int64_t> look_of(const std::string& file) {
    std::error_code ignored;
    const auto time = std::filesystem::last_write_time(file, ignored);
    return {size_of(file), ignored ? 0 : time.time_since_epoch().count()};
}

// Looks again and again: changed files are indexed, what came from files that are gone is removed.
void follow(PassageStore& store, const Model& model, const IndexCommand& command,
            const Interrupt& interrupt) {
    std::map<std::string, std::pair<int64_t, int64_t>> known;
    while (!interrupt.asked()) {
        const std::vector<std::string> files = document_files(command.files);
        std::vector<std::string> changed;
        std::map<std::string, std::pair<int64_t, int64_t>> now;
        for (const std::string& file : files) {
            now[file] = look_of(file);
            const auto old = known.find(file);
            if (old == known.end() || old->second != now[file]) changed.push_back(file);
        }
        std::vector<std::string> gone;
        store.for_each_document([&](const Document& document) {
            if (document.source.empty() || now.contains(document.source)) return;
            for (const std::string& dir : command.files)
                if (document.source.starts_with(path_join(dir, ""))) gone.push_back(document.id);
        });
        for (const std::string& id : gone) store.remove(id);
        if (!changed.empty() || !gone.empty()) {
            const double started_ms = now_ms();
            Indexer indexer(store, model, command.index);
            index_files(indexer, changed, interrupt);
            if (!gone.empty())
                std::fprintf(stderr, "removed %zu documents whose files are gone\n", gone.size());
            const IndexCounts& counts = indexer.counts();
            if (counts.n_added + counts.n_replaced > 0) print_counts(counts, (now_ms() - started_ms) / 1e3);
        }
        known = std::move(now);
        for (int tenth = 0; tenth < command.follow_seconds * 10 && !interrupt.asked(); ++tenth)
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
}

void print_list(PassageStore& store, bool json) {
    store.for_each_document([&](const Document& document) {
        if (!json) {
            write_stdout(str(printable(document.id), "\t", document.n_passages, "\t",
                             printable(document.title), "\n"));
            return;
        }
        JsonWriter line;
        line.begin_object().key("id").string(document.id).key("title").string(document.title);
        line.key("source").string(document.source).key("passages").integer(document.n_passages);
        line.key("metadata").string(document.metadata).end_object();
        write_stdout(line.text() + "\n");
    });
}

void print_stats(PassageStore& store, bool json) {
    const StoreStats stats = store.stats();
    const std::optional<StoreStamp> stamp = store.stamp();
    if (json) {
        JsonWriter out;
        out.begin_object()
            .key("documents")
            .integer(stats.n_documents)
            .key("passages")
            .integer(stats.n_passages);
        out.key("vectors").integer(stats.n_vectors).key("record_bytes").integer(stats.record_bytes);
        out.key("text_bytes").integer(stats.text_bytes).key("store_bytes").integer(stats.store_bytes);
        if (stamp) {
            out.key("model").string(stamp->model).key("maker").string(stamp->maker.hex());
            out.key("chunk_len")
                .integer(stamp->chunk_len)
                .key("embeddings")
                .string(embedding_form_name(stamp->form));
            out.key("d_enc").integer(stamp->d_enc);
        }
        write_stdout(out.end_object().text() + "\n");
        return;
    }
    const auto per = [&](int64_t bytes) {
        return stats.n_passages > 0 ? str(" (", bytes / stats.n_passages, " a passage)") : std::string();
    };
    write_stdout(str("documents   ", stats.n_documents, "\npassages    ", stats.n_passages, "\nvectors     ",
                     stats.n_vectors, "\ntext        ", stats.text_bytes, " bytes", per(stats.text_bytes),
                     "\nrecords     ", stats.record_bytes, " bytes", per(stats.record_bytes),
                     "\nstore       ", stats.store_bytes, " bytes", per(stats.store_bytes), "\n"));
    if (!stamp) return;
    write_stdout(str("model       ", printable(stamp->model), ", maker ", stamp->maker.hex(),
                     "\nchunks      k = ", stamp->chunk_len, ", ",
                     stamp->d_enc > 0 ? str("embeddings of ", stamp->d_enc, " values in ",
                                            embedding_form_name(stamp->form))
                                      : std::string("no embeddings (a model without encoder)"),
                     "\n"));
}

void verify(PassageStore& store) {
    int64_t n_problems = 0;
    const auto problem = [&](const std::string& line) {
        ++n_problems;
        write_stdout(line + "\n");
    };
    store.verify_structure(problem);
    const std::optional<StoreStamp> stamp = store.stamp();
    const int64_t total = store.stats().n_passages;
    int64_t n = 0;
    {
        Progress progress("verifying");
        constexpr int64_t kBatch = 256;
        std::vector<int64_t> numbers;
        for (int64_t after = -1; !(numbers = store.numbers(after, kBatch)).empty(); after = numbers.back()) {
            for (const int64_t number : numbers) {
                try {
                    const int64_t one[] = {number};
                    const std::vector<StoredPassage> found = store.get(one);
                    REFRAG_CHECK(!found.empty(), Status::bad_input, "passage ", number,
                                 ": its document is missing");
                    const std::string content = found[0].content();
                    if (stamp)
                        read_passage_record(found[0].record, passage_key(stamp->maker, sha256(content)),
                                            content, stamp->n_vocab);
                } catch (const Error& error) {
                    problem(error.message());
                }
                progress.update(++n, total);
            }
        }
    }
    REFRAG_CHECK(n_problems == 0, Status::bad_input, printable(store.name()), ": ", n_problems, " faults in ",
                 n, " passages (above)");
    write_stdout(str("whole: ", n, " passages\n"));
}

void write_store(const IndexCommand& command) {
    const std::vector<std::string> files = command.encoded ? command.files : document_files(command.files);
    REFRAG_CHECK(command.files.empty() || command.follow || !files.empty(), Status::bad_input,
                 printable(command.files.front()),
                 ": expected .jsonl, .ndjson, .txt, .md or .markdown files, found none in it");
    const std::unique_ptr<PassageStore> store = open_store(command.store, StoreMode::create);
    if (command.encoded) {
        load_encoded(*store, command);
        return;
    }
    const std::unique_ptr<Device> device = make_device(command.device);
    const std::unique_ptr<Model> model = load_model(*device, command.model_dir, command.device);
    if (command.reencode) {
        Progress progress("encoding anew");
        reencode(*store, *model, command.index,
                 [&](int64_t done, int64_t total) { progress.update(done, total); });
    }
    if (command.files.empty()) return;
    // Ctrl-C and SIGTERM end the work after the batch that is under way.
    const Interrupt interrupt(true);
    if (command.follow) {
        follow(*store, *model, command, interrupt);
        return;
    }
    const double started_ms = now_ms();
    Indexer indexer(*store, *model, command.index);
    index_files(indexer, files, interrupt);
    print_counts(indexer.counts(), (now_ms() - started_ms) / 1e3);
    REFRAG_CHECK(!interrupt.asked(), Status::runtime,
                 "stopped: what was indexed is kept, and the same command goes on from there");
}

void run_index(IndexCommand& command) {
    check_command(command);
    command.index.form = parse_embedding_form("--embeddings", command.form);
    command.index.on_bad = bad_lines_named(command.skip_bad);
    if (!command.remove.empty()) {
        const std::unique_ptr<PassageStore> store = open_store(command.store, StoreMode::write);
        for (const std::string& id : command.remove)
            REFRAG_CHECK(store->remove(id), Status::bad_input, printable(store->name()),
                         ": no document of the id ", printable(id, 60));
    }
    if (!command.files.empty() || command.reencode) write_store(command);
    if (!command.list && !command.stats && !command.verify) return;
    const std::unique_ptr<PassageStore> store =
        open_store(command.store, command.verify ? StoreMode::write : StoreMode::read);
    if (command.list) print_list(*store, command.json);
    if (command.stats) print_stats(*store, command.json);
    if (command.verify) verify(*store);
}

}  // namespace

void add_index_options(CLI::App& sub, IndexOptions& index, std::string& form) {
    sub.add_option("-k,--chunk-len", index.chunk_len, "Decoder tokens to a chunk (default: the model's)")
        ->transform(whole_number(1, 4096))
        ->type_name("K");
    sub.add_option("--passage-tokens", index.passage_tokens,
                   "Longer documents are cut into passages of at most this many tokens, at paragraph borders")
        ->capture_default_str()
        ->transform(whole_number(8, 1 << 20))
        ->type_name("N");
    sub.add_option("--embeddings", form, "How chunk embeddings are stored: bf16, or int8 (half the size)")
        ->capture_default_str()
        ->type_name("bf16|int8|f32");
}

void add_index(CLI::App& app) {
    const auto command = std::make_shared<IndexCommand>();
    CLI::App& sub = *app.add_subcommand(
        "index", "Puts documents into a passage store, encoded once; lists, checks, removes what is in it");
    sub.add_option("STORE", command->store,
                   "The store: a file, or postgresql://... (made where it is missing)")
        ->required()
        ->type_name("STORE");
    sub.add_option(
           "FILES", command->files,
           "JSON Lines of {\"id\", \"title\", \"text\", \"metadata\", \"embedding\"}, text, Markdown, "
           "directories of them; - is standard input (JSON Lines)")
        ->type_name("FILES");
    add_optional_model_option(sub, command->model_dir);
    add_index_options(sub, command->index, command->form);
    sub.add_flag("--encoded", command->encoded, "FILES are what `refrag encode` wrote");
    sub.add_flag("--skip-bad", command->skip_bad, "Name a line that cannot be indexed, and go on without it");
    sub.add_flag("--follow", command->follow,
                 "Stay, and keep the store as the directories are: new and changed files are indexed, what "
                 "came from files that are gone is removed");
    sub.add_option("--follow-seconds", command->follow_seconds, "How often --follow looks")
        ->capture_default_str()
        ->transform(whole_number(1, 86400))
        ->type_name("S");
    sub.add_option("--delete", command->remove, "Remove the document of this id; may be given several times")
        ->type_name("ID")
        ->type_size(1)
        ->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
        ->allow_extra_args(false);
    sub.add_flag("--list", command->list, "List the documents: id, passages, title");
    sub.add_flag("--stats", command->stats, "Say what the store holds, and how large it is");
    sub.add_flag("--verify", command->verify,
                 "Check every digest and index; exit code 3 where something is wrong");
    sub.add_flag("--reencode", command->reencode,
                 "Encode all passages anew with this model; interrupted, the same command goes on");
    sub.add_flag("--json", command->json, "--list and --stats as JSON");
    add_device_options(sub, command->device);
    sub.final_callback([command] { run_index(*command); });
}

}  // namespace refrag
