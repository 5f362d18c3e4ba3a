// `refrag eval perplexity`: the paper's Table 1 on any text file.
#include <CLI/CLI.hpp>
#include <memory>

#include "base/check.h"
#include "cli/common.h"
#include "cli/eval.h"
#include "cli/eval_table.h"
#include "io/file.h"
#include "refrag/perplexity.h"

namespace refrag {
namespace {

constexpr uint64_t kMaxTextBytes = 1ull << 30;

struct EvalPerplexityOptions {
    std::string model_dir;
    DeviceOptions device;
    std::string text;
    std::vector<std::string> modes{"none", "full", "last", "refrag"};
    std::string policy = "model";
    std::string format = "md";
    PerplexityOptions perplexity;
};

ResultTable table_of(const std::vector<PerplexityRow>& rows, const PerplexityOptions& options) {
    ResultTable table({"mode", "context", "output", "k", "p", "policy", "log_perplexity", "standard_error",
                       "share_recovered", "n"});
    for (const PerplexityRow& row : rows) {
        std::optional<std::string> policy;
        if (row.policy) policy = select_policy_name(*row.policy);
        table.begin_row()
            .text(eval_mode_name(row.mode))
            .integer(options.context)
            .integer(options.output)
            .integer(row.chunk_len)
            .number(row.expand_fraction)
            .text(policy)
            .number(row.log_perplexity, 4)
            .number(row.standard_error, 4)
            .number(row.share_recovered, 3)
            .integer(row.n);
    }
    return table;
}

void eval_perplexity(EvalPerplexityOptions& options) {
    check_table_format(options.format);
    for (const std::string& mode : options.modes) options.perplexity.modes.push_back(parse_eval_mode(mode));
    options.perplexity.policy = parse_select_policy(options.policy);
    const std::string text = read_file(options.text, kMaxTextBytes);
    const std::unique_ptr<Backend> backend = make_backend(options.device);
    const std::unique_ptr<Model> model = load_model(*backend, options.model_dir, options.device);
    std::vector<PerplexityRow> rows;
    {
        Progress progress("evaluating");
        rows = evaluate_perplexity(*model, text, options.perplexity,
                                   [&](int64_t done, int64_t total) { progress.update(done, total); });
    }
    write_stdout(table_of(rows, options.perplexity).write(options.format));
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
    sub.add_option("--context", p.context, "Context ids of a window")
        ->capture_default_str()
        ->check(CLI::Range(1, 1 << 28))
        ->type_name("S");
    sub.add_option("--output", p.output, "Target ids of a window")
        ->capture_default_str()
        ->check(CLI::Range(1, 1 << 28))
        ->type_name("O");
    sub.add_option("--modes", options->modes, "Comma list of none, full, last, refrag")
        ->capture_default_str()
        ->delimiter(',')
        ->type_name("LIST");
    sub.add_option("-k,--chunk-len", p.chunk_lens, "Comma list of chunk lengths (default: the model's)")
        ->delimiter(',')
        ->check(CLI::Range(1, 4096))
        ->type_name("LIST");
    sub.add_option("-p,--expand-fraction", p.expand_fractions, "Comma list of shares of chunks expanded")
        ->capture_default_str()
        ->delimiter(',')
        ->check(CLI::Range(0.0, 1.0))
        ->type_name("LIST");
    add_policy_option(sub, options->policy);
    sub.add_option("-s,--seed", p.seed, "Seed of --policy random")->capture_default_str()->type_name("N");
    sub.add_option("--limit", p.limit, "Windows at most; 0: all")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber)
        ->type_name("N");
    sub.add_option("-o,--output-format", options->format, "How the table is written")
        ->capture_default_str()
        ->type_name("md|json|csv");
    add_device_options(sub, options->device);
    sub.final_callback([options] { eval_perplexity(*options); });
}

}  // namespace refrag
