// `refrag eval`: measures a model. `eval perplexity` is the paper's Table 1 on any text file.
#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <memory>

#include "base/check.h"
#include "cli/common.h"
#include "io/file.h"
#include "io/json.h"
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

std::string number_or(const std::optional<double>& value, const char* absent, int digits) {
    if (!value) return absent;
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", digits, *value);
    return text;
}

std::string shortest(const std::optional<double>& value, const char* absent) {
    if (!value) return absent;
    JsonWriter json;
    json.number(*value);
    return json.text();
}

// One row's cells in the order of the columns.
std::vector<std::string> cells(const PerplexityRow& row, const PerplexityOptions& options, const char* absent,
                               bool rounded) {
    const auto number = [&](const std::optional<double>& value, int digits) {
        return rounded ? number_or(value, absent, digits) : shortest(value, absent);
    };
    return {eval_mode_name(row.mode),
            str(options.context),
            str(options.output),
            row.chunk_len ? str(*row.chunk_len) : absent,
            shortest(row.expand_fraction, absent),
            row.policy ? select_policy_name(*row.policy) : absent,
            number(row.log_perplexity, 4),
            number(row.standard_error, 4),
            number(row.share_recovered, 3),
            str(row.n)};
}

constexpr const char* kColumns[] = {"mode",           "context",        "output",          "k", "p", "policy",
                                    "log_perplexity", "standard_error", "share_recovered", "n"};

std::string as_table(const std::vector<PerplexityRow>& rows, const PerplexityOptions& options,
                     bool markdown) {
    std::string out;
    const auto line = [&](const auto& values) {
        std::string joined;
        for (const auto& value : values)
            joined += (joined.empty() ? "" : markdown ? " | " : ",") + std::string(value);
        out += markdown ? "| " + joined + " |\n" : joined + "\n";
    };
    line(kColumns);
    if (markdown) {
        for (size_t i = 0; i < std::size(kColumns); ++i) out += "|---";
        out += "|\n";
    }
    for (const PerplexityRow& row : rows) {
        if (markdown) {
            line(cells(row, options, "-", true));
        } else {
            // An empty cell stands for null; the first is never empty, so joining stays right.
            std::string joined;
            for (const std::string& cell : cells(row, options, "", false)) joined += cell + ",";
            joined.pop_back();
            out += joined + "\n";
        }
    }
    return out;
}

std::string as_json(const std::vector<PerplexityRow>& rows, const PerplexityOptions& options) {
    JsonWriter json(1);
    const auto number = [&](const char* key, const std::optional<double>& value) {
        json.key(key);
        if (value) {
            json.number(*value);
        } else {
            json.null();
        }
    };
    json.begin_array();
    for (const PerplexityRow& row : rows) {
        json.begin_object();
        json.key("mode").string(eval_mode_name(row.mode));
        json.key("context").integer(options.context);
        json.key("output").integer(options.output);
        json.key("k");
        if (row.chunk_len) {
            json.integer(*row.chunk_len);
        } else {
            json.null();
        }
        number("p", row.expand_fraction);
        json.key("policy");
        if (row.policy) {
            json.string(select_policy_name(*row.policy));
        } else {
            json.null();
        }
        number("log_perplexity", row.log_perplexity);
        number("standard_error", row.standard_error);
        number("share_recovered", row.share_recovered);
        json.key("n").integer(row.n);
        json.end_object();
    }
    json.end_array();
    return json.text() + "\n";
}

void eval_perplexity(EvalPerplexityOptions& options) {
    REFRAG_CHECK(options.format == "md" || options.format == "json" || options.format == "csv", Status::usage,
                 "-o: expected md, json or csv; found \"", options.format, "\"");
    for (const std::string& mode : options.modes) options.perplexity.modes.push_back(parse_eval_mode(mode));
    options.perplexity.policy = parse_select_policy(options.policy);
    const std::string text = read_file(options.text, kMaxTextBytes);
    const std::unique_ptr<Backend> backend = make_backend(options.device);
    const std::unique_ptr<Model> model = load_model(*backend, options.model_dir);
    std::vector<PerplexityRow> rows;
    {
        Progress progress("evaluating");
        rows = evaluate_perplexity(*model, text, options.perplexity,
                                   [&](int64_t done, int64_t total) { progress.update(done, total); });
    }
    write_stdout(options.format == "json" ? as_json(rows, options.perplexity)
                                          : as_table(rows, options.perplexity, options.format == "md"));
}

}  // namespace

void add_eval(CLI::App& app) {
    CLI::App& eval = *app.add_subcommand("eval", "Measures a model");
    eval.require_subcommand(1);
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
    sub.add_option("--policy", options->policy,
                   "Which chunks are expanded: model, none, all, random, perplexity-asc, perplexity-desc")
        ->capture_default_str()
        ->type_name("NAME");
    sub.add_option("-s,--seed", p.seed, "Seed of --policy random")->capture_default_str()->type_name("N");
    sub.add_option("--limit", p.limit, "Windows at most; 0: all")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber)
        ->type_name("N");
    sub.add_option("-o,--output-format", options->format, "md, json or csv")
        ->capture_default_str()
        ->type_name("FORM");
    add_device_options(sub, options->device);
    sub.final_callback([options] { eval_perplexity(*options); });
}

}  // namespace refrag
