// `refrag eval perplexity`: the paper's Table 1 and Figure 3 on any text file.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "base/check.h"
#include "cli/common.h"
#include "cli/eval.h"
#include "cli/eval_table.h"
#include "cli/numbers.h"
#include "eval/perplexity.h"
#include "io/json.h"
#include "io/lines.h"
#include "io/output.h"

namespace refrag {
namespace {

struct EvalPerplexityOptions {
    std::string model_dir;
    DeviceOptions device;
    std::string text;
    std::vector<std::string> modes{"none", "full", "last", "refrag"};
    SelectionFlags selection;
    std::string format = "md";
    std::string windows;
    PerplexityOptions perplexity;
};

// A line of --windows: enough to find the same window of the same row in another run.
std::string window_line(const PerplexityRow& row, int64_t output, int64_t window, double log_perplexity) {
    JsonWriter json;
    json.begin_object();
    json.key("context").integer(row.context);
    json.key("output").integer(output);
    json.key("mode").string(eval_mode_name(row.mode));
    json_optional(json, "k", std::optional<int64_t>(row.chunk_len));
    json_optional(json, "p", row.expand_fraction);
    json_optional(json, "policy", policy_cell(row.policy));
    json_optional(json, "unexpanded", unexpanded_cell(row.unexpanded));
    json.key("window").integer(window);
    json.key("log_perplexity").number(log_perplexity);
    json.end_object();
    return json.text() + "\n";
}

ResultTable table_of(const std::vector<PerplexityRow>& rows, const PerplexityOptions& options) {
    std::vector<std::string> columns{
        "mode",           "context",        "output",          "k", "p", "policy",
        "log_perplexity", "standard_error", "share_recovered", "n"};
    const bool drops = options.unexpanded != std::vector{Unexpanded::compress};
    if (drops) columns.insert(std::find(columns.begin(), columns.end(), "log_perplexity"), "unexpanded");
    const bool compared = options.policies.size() > 1;
    if (compared) columns.insert(columns.end(), {"difference", "ci95"});
    ResultTable table(std::move(columns));
    for (const PerplexityRow& row : rows) {
        table.begin_row()
            .text(eval_mode_name(row.mode))
            .integer(row.context)
            .integer(options.output)
            .integer(row.chunk_len)
            .number(row.expand_fraction)
            .text(policy_cell(row.policy));
        if (drops) table.text(unexpanded_cell(row.unexpanded));
        table.number(row.log_perplexity, 4)
            .number(row.standard_error, 4)
            .number(row.share_recovered, 3)
            .integer(row.n);
        if (compared) table.number(row.difference, 4).number(row.ci95, 4);
    }
    return table;
}

void eval_perplexity(EvalPerplexityOptions& options) {
    check_table_format(options.format);
    PerplexityOptions& perplexity = options.perplexity;
    for (const std::string& mode : options.modes) perplexity.modes.push_back(parse_eval_mode(mode));
    take_selections(options.selection, nullptr, true, perplexity);
    chat_options(options.selection.chat);  // refuses a word that is no format
    check_perplexity_options(perplexity);
    check_output_paths({{"--windows", options.windows}});
    const std::string text = read_text(options.text);
    const std::unique_ptr<Device> device = make_device(options.device);
    const std::unique_ptr<Model> model =
        load_model(*device, options.model_dir, options.device, chat_options(options.selection.chat));
    take_selections(options.selection, model.get(), true, perplexity);
    std::vector<PerplexityRow> rows;
    std::string windows;
    WindowSink sink;
    if (!options.windows.empty()) {
        sink = [&](const PerplexityRow& row, int64_t window, double log_perplexity) {
            windows += window_line(row, perplexity.output, window, log_perplexity);
        };
    }
    {
        Progress progress("evaluating");
        rows = evaluate_perplexity(
            *model, text, perplexity, [&](int64_t done, int64_t total) { progress.update(done, total); },
            sink);
    }
    write_each({[&] {
                    write_stdout(table_of(rows, perplexity).write(options.format));
                    flush_stdout();
                },
                [&] {
                    if (!options.windows.empty()) write_result(options.windows, windows);
                }});
}

}  // namespace

void add_eval_perplexity(CLI::App& eval) {
    auto options = std::make_shared<EvalPerplexityOptions>();
    CLI::App& sub =
        *eval.add_subcommand("perplexity", "Log-perplexity of a text with compressed, full and no context");
    PerplexityOptions& p = options->perplexity;
    add_model_option(sub, options->model_dir);
    sub.add_option("--text", options->text, "Text that the model has not seen, UTF-8")
        ->required()
        ->type_name("FILE");
    sub.add_option("--context", p.contexts, "Comma list: context ids of a window")
        ->capture_default_str()
        ->delimiter(',')
        ->transform(whole_number(1, 1 << 28))
        ->type_name("LIST");
    sub.add_option("--output", p.output, "Target ids of a window")
        ->capture_default_str()
        ->transform(whole_number(1, 1 << 28))
        ->type_name("O");
    sub.add_option("--modes", options->modes, "Comma list of none, full, last, refrag")
        ->capture_default_str()
        ->delimiter(',')
        ->type_name("LIST");
    sub.add_option("-k,--chunk-len", p.chunk_lens, "Comma list of chunk lengths (default: the model's)")
        ->delimiter(',')
        ->transform(whole_number(1, 4096))
        ->type_name("LIST");
    add_selection_options(sub, options->selection);
    add_seed_option(sub, p.seed, "Seed of --policy random");
    sub.add_option(
           "--limit", p.limit,
           "Target spans at most, the same for every context length; 0: all that fit one after another")
        ->capture_default_str()
        ->transform(whole_number(0, INT64_MAX))
        ->type_name("N");
    sub.add_option("--windows", options->windows,
                   "Write JSON Lines: every window's log-perplexity in every row, to pair with another run's")
        ->type_name("FILE");
    sub.add_option("-o,--output-format", options->format, "How the table is written")
        ->capture_default_str()
        ->type_name("md|json|csv");
    add_device_options(sub, options->device);
    sub.final_callback([options] { eval_perplexity(*options); });
}

}  // namespace refrag
