// `refrag chat`: a conversation in the terminal over the documents of a store, or of files that are indexed
// for it.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>

#include "base/check.h"
#include "cli/interrupt.h"
#include "cli/line_editor.h"
#include "cli/numbers.h"
#include "cli/run.h"
#include "cli/store_commands.h"
#include "io/file.h"
#include "refrag/citations.h"
#include "refrag/session.h"
#include "store/documents.h"
#include "store/indexer.h"
#include "store/retriever.h"

namespace refrag {
namespace {

struct ChatCommand {
    std::vector<std::string> sources;
    RunOptions run;  // without passages
    RetrieveFlags retrieve{.top = 4, .retrieval = {}, .where = {}, .embedding = {}};
    int64_t most_passages = 12;
};

constexpr const char* kHelp =
    "/documents   the passages that this conversation has before it\n"
    "/explain     the last answer's chunks: which were read as tokens, and what the policy gave them\n"
    "/retry       the last question once more\n"
    "/clear       forget what was said, and the passages\n"
    "/quit        leave, as Ctrl-D does; Ctrl-C stops an answer\n";

// A directory of its own that goes with it.
class TemporaryDirectory {
  public:
    TemporaryDirectory() {
        path_ = (std::filesystem::temp_directory_path() / "refrag-chat-XXXXXX").string();
        REFRAG_CHECK(mkdtemp(path_.data()) != nullptr, Status::runtime, printable(path_), ": cannot be made");
    }
    ~TemporaryDirectory() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    std::string file(const char* name) const { return path_join(path_, name); }

  private:
    std::string path_;
};

bool is_store(const std::string& path) {
    if (is_postgres_place(path)) return true;
    if (path == "-" || !is_file(path)) return false;
    const File file(path);
    std::string head(std::min<uint64_t>(file.size(), 16), '\0');
    file.read_at(0, head.data(), head.size());
    return head.starts_with("SQLite format 3");
}

class Chat {
  public:
    Chat(PassageStore& store, const Model& model, const ChatCommand& command, const AnswerOptions& answer,
         const Interrupt& interrupt)
        : model_(model),
          command_(command),
          answer_options_(answer),
          interrupt_(interrupt),
          cache_(std::make_shared<PassageCache>()),
          retriever_(store, model, cache_, retrieve_options(command.retrieve)),
          session_(
              model,
              EngineOptions{.max_context = command.run.context, .prefix_cache = !command.run.no_prefix_cache},
              cache_) {}

    // Whether to go on.
    bool take(const std::string& line) {
        const size_t first = line.find_first_not_of(" \t");
        if (first == std::string::npos) return true;
        const std::string text = line.substr(first, line.find_last_not_of(" \t\r") + 1 - first);
        if (text == "/quit" || text == "/exit") return false;
        if (text == "/help") {
            write_stdout(kHelp);
        } else if (text == "/documents") {
            list_documents();
        } else if (text == "/explain") {
            explain();
        } else if (text == "/clear") {
            history_.clear();
            passages_.clear();
            last_.reset();
        } else if (text == "/retry") {
            retry();
        } else if (text.front() == '/') {
            write_stdout(str("no such command: ", printable(text, 40), " (/help lists them)\n"));
        } else {
            ask(text);
        }
        flush_stdout();
        return true;
    }

  private:
    struct InView {
        std::string document;
        std::string title;
        std::shared_ptr<SharedPassage> shared;
    };
    struct Last {
        std::string question;
        std::vector<Segment> segments;
        Answer answer;
        std::vector<InView> passages;
    };

    void ask(const std::string& question) {
        const size_t n_new = look_up(question);
        try {
            answer(question, n_new);
        } catch (const Error& error) {
            // The question alone, if the conversation has grown too long for the window.
            if (error.status() != Status::runtime || history_.empty()) throw;
            std::fprintf(stderr, "refrag: %s: going on without what was said before\n", error.what());
            history_.clear();
            answer(question, n_new);
        }
    }

    void retry() {
        if (!last_) {
            write_stdout("nothing has been asked yet\n");
            return;
        }
        if (!history_.empty()) history_.pop_back();
        ++answer_options_.sampler.seed;  // where answers are drawn, another one
        answer(std::string(last_->question), 0);
    }

    // Passages for this question, behind those that are in view; the oldest go. How many are new.
    size_t look_up(const std::string& question) {
        const Retrieved found = retriever_.find(question);
        size_t n_new = 0;
        for (size_t i = 0; i < found.shared.size(); ++i) {
            const auto same = [&](const InView& one) { return one.shared->key() == found.shared[i]->key(); };
            if (std::any_of(passages_.begin(), passages_.end(), same)) continue;
            passages_.push_back({found.passages[i].document, found.passages[i].title, found.shared[i]});
            ++n_new;
        }
        while (std::ssize(passages_) > command_.most_passages) passages_.erase(passages_.begin());
        return n_new;
    }

    void answer(const std::string& question, size_t n_new) {
        std::vector<std::shared_ptr<SharedPassage>> shared;
        for (const InView& one : passages_) shared.push_back(one.shared);
        const std::vector<Segment> segments =
            make_segments(model_, history_, shared, question, retriever_.chunk_len());
        const auto print = [this](std::string_view text) {
            write_stdout(text);
            flush_stdout();
            return !interrupt_.asked();
        };
        std::optional<Answer> answer = session_.answer(
            segments, answer_options_, print, {.keep_going = [this] { return !interrupt_.asked(); }});
        if (!answer) {
            write_stdout("\n(stopped)\n");
            return;
        }
        write_stdout(answer->finish == FinishReason::cancelled ? " (stopped)\n" : "\n");
        history_.push_back({.question = question, .answer = answer->text});
        report(*answer, n_new);
        last_ = Last{question, segments, std::move(*answer), passages_};
    }

    void report(const Answer& answer, size_t n_new) const {
        std::fprintf(stderr,
                     "passages %zu, new %zu | chunks %zu: compressed %zu, as tokens %zu, kept %zu | "
                     "positions %zu for %zu tokens, reused %zu | TTFT %.1f ms\n",
                     passages_.size(), n_new, answer.chunks.size(), answer.chunks.size() - answer.n_expanded,
                     answer.n_expanded, answer.n_cached, answer.positions, answer.plain_tokens,
                     answer.n_reused, answer.ttft_ms);
    }

    void list_documents() const {
        if (passages_.empty()) write_stdout("none yet: they are looked up for each question\n");
        for (size_t i = 0; i < passages_.size(); ++i) {
            const std::shared_ptr<const CutPassage> cut = passages_[i].shared->cut(model_);
            write_stdout(str("[", i + 1, "] ", printable(passages_[i].document, 60),
                             passages_[i].title.empty() ? "" : "  ", printable(passages_[i].title, 60), "  (",
                             cut->chunks().size(), " chunks, ", cut->n_tokens(), " tokens)\n"));
        }
    }

    void explain() const {
        if (!last_) {
            write_stdout("nothing has been asked yet\n");
            return;
        }
        size_t passage = 0;
        for (size_t s = 0; s < last_->segments.size(); ++s) {
            const auto* segment = std::get_if<PassageSegment>(&last_->segments[s]);
            if (segment == nullptr) continue;
            const InView& of = last_->passages[passage++];
            write_stdout(str("[", passage, "] ", printable(of.document, 60), "\n"));
            const std::string& text = segment->passage->cut(model_)->text();
            for (const ChunkReport& chunk : last_->answer.chunks) {
                if (chunk.segment != s) continue;
                char score[32] = "        ";
                if (chunk.logit)
                    std::snprintf(score, sizeof score, "%8.2f", static_cast<double>(*chunk.logit));
                write_stdout(str(chunk.expanded ? "  tokens  " : "  1 vector", score, "  ",
                                 printable(text.substr(chunk.begin, chunk.end - chunk.begin), 90), "\n"));
            }
        }
        for (const Citation& citation : find_citations(model_, last_->segments, last_->answer)) {
            std::string of;
            for (const size_t at : citation.passages) of += str(of.empty() ? "" : ", ", "[", at + 1, "]");
            const std::string words =
                last_->answer.text.substr(citation.begin, citation.end - citation.begin);
            write_stdout(str("\"", printable(words, 80), "\" stands in ", of, "\n"));
        }
    }

    const Model& model_;
    const ChatCommand& command_;
    AnswerOptions answer_options_;
    const Interrupt& interrupt_;
    const std::shared_ptr<PassageCache> cache_;
    Retriever retriever_;
    Session session_;
    std::vector<Turn> history_;
    std::vector<InView> passages_;
    std::optional<Last> last_;
};

// Files as a store that lasts as long as the conversation.
std::unique_ptr<PassageStore> index_for_now(const std::string& path, const Model& model,
                                            const ChatCommand& command) {
    auto store = open_store(path, StoreMode::create);
    const std::vector<std::string> files = document_files(command.sources);
    const Progress progress("indexing");
    Indexer indexer(*store, model, IndexOptions{.chunk_len = command.run.chunk_len});
    for (const std::string& file : files) indexer.add_file(file);
    indexer.finish();
    REFRAG_CHECK(indexer.counts().n_passages > 0, Status::bad_input, printable(command.sources.front()),
                 ": expected documents, found no text");
    return store;
}

void run_chat(ChatCommand& command) {
    const bool has_store = command.sources.size() == 1 && is_store(command.sources[0]);
    retrieve_options(command.retrieve);  // refuses what makes no sense
    std::unique_ptr<PassageStore> store;
    if (has_store) {
        store = open_store(command.sources[0], StoreMode::read);
        command.run.chunk_len = stamp_in(*store).chunk_len;
    } else {
        document_files(command.sources);
    }
    const AnswerOptions answer = checked_answer_options(command.run);
    const std::unique_ptr<Device> device = make_device(command.run.device);
    const std::unique_ptr<Model> model = load_run_model(*device, command.run, answer);
    std::optional<TemporaryDirectory> now;
    if (!store) store = index_for_now(now.emplace().file("store.db"), *model, command);
    Interrupt interrupt(false);
    Chat chat(*store, *model, command, answer, interrupt);
    LineEditor editor(chat_history_path());
    if (editor.is_terminal())
        write_stdout(str(store->stats().n_passages, " passages; /help lists the commands\n"));
    flush_stdout();
    while (!interrupt.terminated()) {
        interrupt.forget();
        const std::optional<std::string> line = editor.read("> ");
        if (!line) break;
        try {
            if (!chat.take(*line)) break;
        } catch (const Error& error) {
            if (!editor.is_terminal()) throw;
            std::fprintf(stderr, "refrag: %s\n", error.what());
        }
    }
    if (editor.is_terminal()) write_stdout("\n");
}

}  // namespace

void add_chat(CLI::App& app) {
    const auto command = std::make_shared<ChatCommand>();
    CLI::App& sub = *app.add_subcommand("chat", "A conversation in the terminal over a store or files");
    sub.add_option("STORE|FILES", command->sources,
                   "A store that `refrag index` made, or files and directories as it takes them")
        ->required()
        ->type_name("PATH");
    add_model_option(sub, command->run.model_dir);
    add_retrieve_options(sub, command->retrieve);
    sub.add_option("--most-passages", command->most_passages,
                   "Passages in view at most: those of earlier questions stay until they are the oldest")
        ->group("Retrieval")
        ->capture_default_str()
        ->transform(whole_number(1, 4096))
        ->type_name("N");
    sub.add_option("-k,--chunk-len", command->run.chunk_len,
                   "Decoder tokens to a chunk, of files (default: the model's; a store has its own)")
        ->group("Compression")
        ->transform(whole_number(1, 4096))
        ->type_name("K");
    add_expansion_options(sub, command->run);
    add_generation_options(sub, command->run);
    add_sampling_options(sub, command->run.answer.sampler);
    add_chat_options(sub, command->run.chat);
    add_decoder_options(sub, command->run.decoder);
    add_device_options(sub, command->run.device);
    sub.final_callback([command] { run_chat(*command); });
}

}  // namespace refrag
