// `refrag ask`: a question to a passage store. Retrieve, take the stored embeddings, answer, and say what the
// answer drew on.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <utility>

#include "base/check.h"
#include "cli/answer_json.h"
#include "cli/explain.h"
#include "cli/numbers.h"
#include "cli/run.h"
#include "cli/store_commands.h"
#include "io/file.h"
#include "io/output.h"
#include "refrag/citation_json.h"
#include "refrag/session.h"
#include "refrag/timer.h"
#include "store/retriever.h"

namespace refrag {
namespace {

struct AskCommand {
    std::string store;
    RunOptions run;  // without passages
    RetrieveFlags retrieve;
};

std::vector<float> parse_embedding(const std::string& given) {
    std::vector<float> values;
    if (given.empty()) return values;
    const bool is_text = given.front() == '[';
    const std::string text = is_text ? given : read_input(given, uint64_t{16} << 20);
    const Json json = Json::parse(text, is_text ? "--embedding" : input_name(given));
    for (size_t i = 0; i < json.as_array().size(); ++i)
        values.push_back(static_cast<float>(json.at(i).as_number(-1e18, 1e18)));
    REFRAG_CHECK(!values.empty(), Status::bad_input,
                 "--embedding: expected a JSON array of numbers, found none");
    make_unit(values);
    return values;
}

class Asker {
  public:
    Asker(PassageStore& store, const Model& model, const AskCommand& command, const AnswerOptions& answer,
          Explanation& explanation)
        : store_(store),
          model_(model),
          command_(command),
          answer_options_(answer),
          explanation_(explanation),
          cache_(std::make_shared<PassageCache>()),
          session_(model, engine_options(command), cache_),
          retriever_(store, model, cache_, retrieve_options(command.retrieve), [](const std::string& line) {
              std::fprintf(stderr, "refrag: warning: %s\n", line.c_str());
          }) {}

    static EngineOptions engine_options(const AskCommand& command) {
        return {.max_context = command.run.context, .prefix_cache = !command.run.no_prefix_cache};
    }

    void ask(const std::string& question) {
        const Retrieved retrieved = retriever_.find(question);
        REFRAG_CHECK(!retrieved.passages.empty(), Status::runtime, printable(store_.name()), ": no passage ",
                     command_.retrieve.where.empty() ? "" : "that --where leaves ",
                     "has a word of the question");
        std::vector<Segment> segments =
            make_segments(model_, {}, retrieved.shared, question, retriever_.chunk_len());
        TextSink sink;
        if (!command_.run.json) {
            sink = [](std::string_view text) {
                write_stdout(text);
                flush_stdout();
                return true;
            };
        }
        std::vector<DocumentName> documents;
        for (const StoredPassage& passage : retrieved.passages)
            documents.push_back({passage.document, passage.title});
        explanation_.ask(question, std::move(documents), segments, retrieved.ms);
        const Answer answer = session_.answer(segments, answer_options_, sink);
        explanation_.answered(answer);
        if (command_.run.json) {
            print_json(question, retrieved, segments, answer);
        } else {
            print_passages(retrieved, segments, answer);
        }
        flush_stdout();
        std::fprintf(stderr, "retrieved %zu passages in %.1f ms | ", retrieved.passages.size(), retrieved.ms);
        print_summary(answer);
    }

  private:
    // Chunks of each passage: read as tokens, and all.
    static std::vector<std::pair<size_t, size_t>> chunks_read(const std::vector<Segment>& segments,
                                                              const Answer& answer) {
        std::vector<std::pair<size_t, size_t>> out;
        for (size_t s = 0; s < segments.size(); ++s) {
            if (!std::holds_alternative<PassageSegment>(segments[s])) continue;
            auto& [expanded, all] = out.emplace_back();
            for (const ChunkReport& chunk : answer.chunks) {
                if (chunk.segment != s) continue;
                ++all;
                expanded += chunk.expanded ? 1 : 0;
            }
        }
        return out;
    }

    void print_passages(const Retrieved& retrieved, const std::vector<Segment>& segments,
                        const Answer& answer) {
        const auto chunks = chunks_read(segments, answer);
        write_stdout("\n\n");
        for (size_t i = 0; i < retrieved.passages.size(); ++i) {
            const StoredPassage& passage = retrieved.passages[i];
            write_stdout(str("[", i + 1, "] ", printable(passage.document, 80),
                             passage.title.empty() ? "" : "  ", printable(passage.title, 60), "  (",
                             chunks[i].first, " of ", chunks[i].second, " chunks read as tokens)\n"));
        }
        for (const Citation& citation : find_citations(model_, segments, answer)) {
            std::string of;
            for (const size_t passage : citation.passages)
                of += str(of.empty() ? "" : ", ", "[", passage + 1, "]");
            write_stdout(str("\"",
                             printable(answer.text.substr(citation.begin, citation.end - citation.begin), 80),
                             "\" stands in ", of, "\n"));
        }
    }

    void print_json(const std::string& question, const Retrieved& retrieved,
                    const std::vector<Segment>& segments, const Answer& answer) {
        const auto chunks = chunks_read(segments, answer);
        JsonWriter json;
        json.begin_object();
        write_answer(json, model_.tokenizer(), question, answer);
        json.key("retrieve_ms").number(retrieved.ms);
        json.key("passages").begin_array();
        for (size_t i = 0; i < retrieved.passages.size(); ++i) {
            const StoredPassage& passage = retrieved.passages[i];
            json.begin_object().key("id").string(passage.document).key("place").integer(passage.place);
            json.key("begin").integer(passage.begin).key("end").integer(passage.end);
            json.key("title").string(passage.title).key("text").string(passage.text);
            json.key("n_chunks").integer(static_cast<int64_t>(chunks[i].second));
            json.key("n_expanded").integer(static_cast<int64_t>(chunks[i].first)).end_object();
        }
        json.end_array();
        std::vector<CitedDocument> documents;
        for (const StoredPassage& passage : retrieved.passages)
            documents.push_back({passage.document, {{"title", passage.title}, {"text", passage.text}}});
        json.key("citations");
        write_citations(json, find_citations(model_, segments, answer), answer.text, documents);
        json.end_object();
        write_stdout(json.text() + "\n");
    }

    PassageStore& store_;
    const Model& model_;
    const AskCommand& command_;
    const AnswerOptions& answer_options_;
    Explanation& explanation_;
    const std::shared_ptr<PassageCache> cache_;
    Session session_;
    Retriever retriever_;
};

void run_ask(AskCommand& command) {
    REFRAG_CHECK(!command.run.questions.empty(), Status::usage, "ask: expected -q TEXT, found none");
    REFRAG_CHECK(!command.run.answer.logprobs || command.run.json, Status::usage,
                 "ask: --logprobs are written as JSON: add --json");
    check_output_paths({{"--explain", command.run.explain}});
    const std::unique_ptr<PassageStore> store = open_store(command.store, StoreMode::read);
    command.run.chunk_len = stamp_in(*store).chunk_len;
    const AnswerOptions answer = checked_answer_options(command.run);
    const std::unique_ptr<Device> device = make_device(command.run.device);
    const std::unique_ptr<Model> model = load_run_model(*device, command.run, answer);
    Explanation explanation(command.run.explain, command.run.questions.size() > 1);
    auto asker = std::make_unique<Asker>(*store, *model, command, answer, explanation);
    size_t n_failed = 0;
    for (const std::string& question : command.run.questions) {
        try {
            asker->ask(question);
        } catch (const Error& error) {
            if (command.run.questions.size() == 1) throw;
            std::fprintf(stderr, "refrag: question \"%s\": %s\n", printable(question, 60).c_str(),
                         error.what());
            ++n_failed;
        }
    }
    asker.reset();  // and its engine
    explanation.write(*model, Asker::engine_options(command), answer);
    REFRAG_CHECK(n_failed == 0, Status::runtime, n_failed, " of ", command.run.questions.size(),
                 " questions could not be answered");
}

}  // namespace

RetrieveOptions retrieve_options(const RetrieveFlags& flags) {
    RetrieveOptions options;
    options.top = flags.top;
    if (!flags.retrieval.empty()) options.retrieval = parse_retrieval("--retrieve", flags.retrieval);
    options.embedding = parse_embedding(flags.embedding);
    for (const std::string& text : flags.where) options.filter.push_back(parse_condition(text));
    return options;
}

void add_retrieve_options(CLI::App& app, RetrieveFlags& flags) {
    const char* group = "Retrieval";
    app.add_option("--top", flags.top, "Passages to answer from")
        ->group(group)
        ->capture_default_str()
        ->transform(whole_number(1, 4096))
        ->type_name("N");
    app.add_option(
           "--retrieve", flags.retrieval,
           "By words (bm25), by vectors (dense), or both, fused by reciprocal rank (the default where "
           "the model has an encoder)")
        ->group(group)
        ->type_name("bm25|dense|both");
    add_texts(
        app, "--where", flags.where,
        "Only documents whose metadata fulfil this, KEY OP VALUE (lang=en, year>=2020); several: all of them")
        ->group(group);
    app.add_option(
           "--embedding", flags.embedding,
           "The question's vector, where documents were indexed with an \"embedding\" of their own: a "
           "JSON array, or a file with one")
        ->group(group)
        ->type_name("ARRAY");
}

void add_ask(CLI::App& app) {
    const auto command = std::make_shared<AskCommand>();
    CLI::App& sub = *app.add_subcommand("ask", "Answers questions from a passage store");
    sub.add_option("STORE", command->store, "The store that `refrag index` made: a file, or postgresql://...")
        ->required()
        ->type_name("STORE");
    add_model_option(sub, command->run.model_dir);
    add_texts(sub, "-q,--question", command->run.questions, "The question; may be given several times");
    add_retrieve_options(sub, command->retrieve);
    add_expansion_options(sub, command->run);
    add_generation_options(sub, command->run);
    add_sampling_options(sub, command->run.answer.sampler);
    sub.add_flag("--json", command->run.json,
                 "One JSON object a question: answer, passages, citations with their places in the answer");
    add_logprobs_option(sub, command->run.answer);
    add_explain_option(sub, command->run);
    add_chat_options(sub, command->run.chat);
    add_decoder_options(sub, command->run.decoder);
    add_device_options(sub, command->run.device);
    sub.final_callback([command] { run_ask(*command); });
}

}  // namespace refrag
