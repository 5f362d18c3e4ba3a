// `refrag eval qa`: exact match, F1 and ROUGE-L on SQuAD, facts, summaries or conversations, with none, all
// or compressed passages.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <memory>

#include "base/check.h"
#include "cli/common.h"
#include "cli/eval.h"
#include "cli/eval_table.h"
#include "cli/numbers.h"
#include "eval/qa.h"
#include "io/json.h"
#include "io/output.h"

namespace refrag {
namespace {

struct EvalQaOptions {
    std::string model_dir;
    DeviceOptions device;
    std::string data;
    std::vector<std::string> modes{"none", "full", "refrag"};
    SelectionFlags selection;
    std::string format = "md";
    std::string predictions;
    QaOptions qa;
};

std::string prediction_line(const QaRow& row, const QaQuestion& question, const std::string& prediction,
                            const QaScore& score, bool has_turns) {
    JsonWriter json;
    json.begin_object();
    json.key("id").string(question.id);
    if (has_turns) json.key("turn").integer(static_cast<int64_t>(question.turn));
    json.key("mode").string(qa_mode_name(row.mode));
    json_optional(json, "k", std::optional<int64_t>(row.chunk_len));
    json_optional(json, "p", row.expand_fraction);
    json_optional(json, "policy", policy_cell(row.policy));
    json_optional(json, "unexpanded", unexpanded_cell(row.unexpanded));
    json_optional(json, "distractors", row.distractors);
    json.key("question").string(question.question);
    json.key("prediction").string(prediction);
    json.key("answers").begin_array();
    for (const std::string& answer : question.answers) json.string(answer);
    json.end_array();
    json.key("exact_match").number(score.exact_match);
    json.key("f1").number(score.f1);
    json.key("rouge_l").number(score.rouge_l);
    json.end_object();
    return json.text() + "\n";
}

ResultTable table_of(const std::vector<QaRow>& rows, bool has_turns, const QaOptions& options) {
    std::vector<std::string> columns{"mode", "distractors", "k", "p", "policy"};
    const bool compared = options.policies.size() > 1;
    const bool drops = options.unexpanded != std::vector{Unexpanded::compress};
    if (drops) columns.emplace_back("unexpanded");
    if (has_turns) columns.emplace_back("turn");
    columns.insert(columns.end(), {"exact_match", "f1", "rouge_l", "standard_error", "n"});
    if (compared) columns.insert(columns.end(), {"em_difference", "em_ci95", "f1_difference", "f1_ci95"});
    ResultTable table(std::move(columns));
    for (const QaRow& row : rows) {
        table.begin_row()
            .text(qa_mode_name(row.mode))
            .integer(row.distractors)
            .integer(row.chunk_len)
            .number(row.expand_fraction)
            .text(policy_cell(row.policy));
        if (drops) table.text(unexpanded_cell(row.unexpanded));
        if (has_turns) table.integer(row.turn);
        table.number(row.exact_match, 3)
            .number(row.f1, 3)
            .number(row.rouge_l, 3)
            .number(row.standard_error, 3)
            .integer(row.n);
        if (!compared) continue;
        table.number(row.em_difference, 3)
            .number(row.em_ci95, 3)
            .number(row.f1_difference, 3)
            .number(row.f1_ci95, 3);
    }
    return table;
}

void eval_qa(EvalQaOptions& options) {
    check_table_format(options.format);
    for (const std::string& mode : options.modes) options.qa.modes.push_back(parse_qa_mode(mode));
    take_selections(options.selection, nullptr, false, options.qa);
    chat_options(options.selection.chat);  // refuses a word that is no format
    check_qa_options(options.qa);
    check_output_paths({{"--predictions", options.predictions}});
    const QaData data = read_qa_data(options.data);
    const std::unique_ptr<Device> device = make_device(options.device);
    const std::unique_ptr<Model> model =
        load_model(*device, options.model_dir, options.device, chat_options(options.selection.chat));
    take_selections(options.selection, model.get(), false, options.qa);
    std::vector<QaRow> rows;
    std::string predictions;
    int64_t answers = 0;
    const auto started = std::chrono::steady_clock::now();
    {
        Progress progress("answering");
        rows = evaluate_qa(
            *model, data, options.qa, [&](int64_t done, int64_t total) { progress.update(done, total); },
            [&](const QaRow& row, const QaQuestion& question, const std::string& prediction,
                const QaScore& score) {
                ++answers;
                if (!options.predictions.empty())
                    predictions += prediction_line(row, question, prediction, score, data.has_turns);
            });
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    write_each({[&] {
                    write_stdout(table_of(rows, data.has_turns, options.qa).write(options.format));
                    flush_stdout();
                },
                [&] {
                    if (!options.predictions.empty()) write_result(options.predictions, predictions);
                }});
    std::fprintf(stderr, "answers %lld | %.1f s | %.1f answers/s\n", static_cast<long long>(answers), seconds,
                 seconds > 0.0 ? static_cast<double>(answers) / seconds : 0.0);
    for (const QaRow& row : rows) {
        if (row.exact_match || row.turn) continue;
        std::fprintf(
            stderr,
            "refrag: warning: mode %s, distractors %lld: only %lld questions fit the decoder's window "
            "of %lld positions with their answers; no figures\n",
            qa_mode_name(row.mode), static_cast<long long>(row.distractors.value_or(0)),
            static_cast<long long>(row.n), static_cast<long long>(model->decoder().config().max_seq_len));
    }
}

}  // namespace

void add_eval_qa(CLI::App& eval) {
    auto options = std::make_shared<EvalQaOptions>();
    CLI::App& sub = *eval.add_subcommand(
        "qa",
        "Exact match, F1 and ROUGE-L of answers from compressed, full and no passages (greedy decoding)");
    QaOptions& qa = options->qa;
    add_model_option(sub, options->model_dir);
    sub.add_option(
           "--data", options->data,
           "Questions: SQuAD 1.1 or 2.0 JSON, or JSON Lines of {\"id\", \"title\", \"text\", \"question\", "
           "\"answers\"}; in place of the last two a line may have \"turns\": [{\"question\", \"answers\"}, "
           "...], of which each is asked after the earlier ones and their first answers")
        ->required()
        ->type_name("FILE");
    sub.add_option("--distractors", qa.distractors,
                   "Comma list: passages of other articles beside the one that answers")
        ->capture_default_str()
        ->delimiter(',')
        ->transform(whole_number(0, 1 << 20))
        ->type_name("LIST");
    sub.add_option("--modes", options->modes, "Comma list of none, full, refrag, replug")
        ->capture_default_str()
        ->delimiter(',')
        ->type_name("LIST");
    sub.add_option("-k,--chunk-len", qa.chunk_lens, "Comma list of chunk lengths (default: the model's)")
        ->delimiter(',')
        ->transform(whole_number(1, 4096))
        ->type_name("LIST");
    add_selection_options(sub, options->selection);
    sub.add_option("--limit", qa.limit,
                   "Questions at most, drawn by the seed, a line with turns being one question; 0: all")
        ->capture_default_str()
        ->transform(whole_number(0, INT64_MAX))
        ->type_name("N");
    sub.add_option("--max-turns", qa.max_turns,
                   "Turns of a line that are asked at most; each number of a turn has rows of its own beside "
                   "those of all")
        ->capture_default_str()
        ->transform(whole_number(1, 1 << 20))
        ->type_name("N");
    sub.add_option("--no-answer", qa.no_answer,
                   "What the model says where there is no answer: counts as the empty answer, which is the "
                   "right one to an unanswerable question")
        ->type_name("TEXT");
    add_seed_option(sub, qa.seed,
                    "Seed of questions, distractors, the order of passages, and --policy random");
    sub.add_option("-n,--n-predict", qa.max_new_tokens, "Tokens of an answer at most")
        ->capture_default_str()
        ->transform(whole_number(1, 1 << 28))
        ->type_name("N");
    sub.add_option("--predictions", options->predictions,
                   "Write JSON Lines: every question's answer and scores in every row")
        ->type_name("FILE");
    sub.add_option("-o,--output-format", options->format, "How the table is written")
        ->capture_default_str()
        ->type_name("md|json|csv");
    add_device_options(sub, options->device);
    sub.final_callback([options] { eval_qa(*options); });
}

}  // namespace refrag
