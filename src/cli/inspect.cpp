// `refrag inspect`: loads a model directory as `run` does and says what is in it: shapes, parameters, memory,
// the tensors that were found and not used.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>

#include "cli/common.h"
#include "io/file.h"
#include "io/json.h"
#include "refrag/memory_plan.h"
#include "refrag/model.h"

namespace refrag {
namespace {

struct InspectOptions {
    std::string model_dir;
    DeviceOptions device;
    ChatFlags chat;
    bool json = false;
};

const char* pooling_name(ChunkPooling pooling) {
    switch (pooling) {
        case ChunkPooling::cls:
            return "cls";
        case ChunkPooling::mean:
            return "mean";
        case ChunkPooling::pooler:
            return "pooler";
    }
    return "?";
}

// Bytes of K and V for one decoder position in the KV cache as `run` makes it.
int64_t kv_bytes_per_position(const Llama& decoder) {
    const DecoderConfig& c = decoder.config();
    const auto element = static_cast<int64_t>(dtype_bytes(decoder.kv_dtype()));
    return 2 * element * c.n_layers * c.n_kv_heads * c.head_dim;
}

std::string join(const std::vector<std::string>& words) {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : ", ") + printable(word);
    return text.empty() ? "none" : text;
}

std::string join(const std::vector<int32_t>& numbers) {
    std::string text;
    for (const int32_t n : numbers) text += str(text.empty() ? "" : ", ", n);
    return text.empty() ? "none" : text;
}

// Weights, cache and workspace of one request over the whole window, against what there is.
std::string shown(const MemoryPlan& plan) {
    return str("weights ", plan.weight_bytes, " bytes; for a request over the whole window KV cache ",
               plan.request_bytes, " and workspace ", plan.workspace_bytes,
               plan.fits() ? ", of " : ", MORE THAN the ", plan.available_bytes,
               plan.fits() ? " available" : " that are available");
}

const char* chat_source_name(ChatSource source) {
    switch (source) {
        case ChatSource::model_directory:
            return "refrag.json's template";
        case ChatSource::given:
            return "given";
        case ChatSource::recognized:
            return "recognised";
        case ChatSource::none:
            return "no chat template found";
        case ChatSource::unknown:
            return "chat template of no known format";
    }
    return "?";
}

std::string as_text(const Model& model, const std::string& choice) {
    const RefragConfig& r = model.config();
    const DecoderConfig& d = model.decoder().config();
    std::string out;
    const auto line = [&](const char* name, const std::string& value) {
        char padded[32];
        std::snprintf(padded, sizeof padded, "%-12s", name);
        out += padded + value + "\n";
    };
    line("model", model.dir());
    line("device", str(model.device().description(), " (", choice, ")"));
    const std::string defaults = str("; defaults: --policy ", select_policy_name(model.default_policy()),
                                     ", --unexpanded ", unexpanded_name(model.default_unexpanded()));
    if (model.has_encoder()) {
        const RobertaConfig& e = model.encoder().config();
        const PolicyConfig& p = r.policy;
        line("parameters", str(model.parameters(), " (encoder ", model.encoder().parameters(), ", projector ",
                               model.projector().parameters(), ", policy ", model.policy().parameters(),
                               ", decoder ", model.decoder().parameters(), ")"));
        line("weights",
             str(model.weight_bytes(), " bytes in memory (encoder ", model.encoder().weight_bytes(),
                 ", projector ", model.projector().weight_bytes(), ", policy ", model.policy().weight_bytes(),
                 ", decoder ", model.decoder().weight_bytes(), ")"));
        line("chunks", str("k = ", r.chunk_len, " decoder tokens (trained for ", join(r.chunk_lens),
                           "), expand fraction ", r.expand_fraction, defaults));
        line("encoder",
             str(e.is_bert ? "BERT, dim " : "RoBERTa, dim ", e.dim, ", hidden ", e.hidden_dim, ", ",
                 e.n_layers, " layers, ", e.n_heads, " heads, vocabulary ", e.vocab_size,
                 r.shared_vocabulary ? " (shared)" : " (own)", ", at most ", e.max_seq_len(),
                 " tokens a chunk, pooling ", pooling_name(r.pooling), r.normalize ? ", normalised" : ""));
        line("projector", str(e.dim, " -> ", d.dim, " -> ", d.dim, ", gelu"));
        line("policy", str("dim ", p.dim, ", hidden ", p.hidden_dim, ", ", p.n_layers, " layers, ", p.n_heads,
                           " heads, ", p.sees_question ? "sees the question" : "does not see the question"));
    } else {
        line("parameters", str(model.parameters(), " (a plain decoder: no encoder, projector and policy)"));
        line("weights", str(model.weight_bytes(), " bytes in memory"));
        line("chunks",
             str("k = ", r.chunk_len, " decoder tokens, expand fraction ", r.expand_fraction, defaults));
    }
    line("decoder",
         str(d.family, ", dim ", d.dim, ", hidden ", d.hidden_dim, ", ", d.n_layers, " layers, ", d.n_heads,
             " heads, ", d.n_kv_heads, " KV heads of ", d.head_dim, ", vocabulary ", d.vocab_size,
             ", window ", d.max_seq_len, ", ", d.tied_embeddings ? "tied" : "untied", " head",
             std::all_of(d.windows.begin(), d.windows.end(), [](int32_t w) { return w == 0; })
                 ? ""
                 : str("; entries that a row sees, by layer (0: all): ", join(d.windows))));
    if (!model.gguf_types().empty()) line("GGUF", model.gguf_types() + " tensors");
    for (const AdapterInfo& adapter : model.adapters())
        line("adapter", str(adapter.dir, ": LoRA of rank ", adapter.rank, ", alpha ", adapter.alpha,
                            ", merged into ", adapter.n_matrices, " matrices"));
    line("tokens",
         str("first ", model.bos_id() ? str(*model.bos_id()) : "none", ", end ", join(model.end_ids())));
    line("chat", str(chat_format_name(model.chat_format()), " (", chat_source_name(model.chat_source()), ")",
                     model.system_message().empty() ? "" : "; system message: ",
                     printable(model.system_message(), 100)));
    line("KV cache", str(kv_bytes_per_position(model.decoder()), " bytes a position, ",
                         kv_bytes_per_position(model.decoder()) * d.max_seq_len, " for the whole window"));
    line("memory", shown(plan_memory(model, 1, d.max_seq_len)));
    line("unused",
         str(model.has_encoder() ? str("encoder: ", join(model.encoder().unused_tensors()), "; ") : "",
             "decoder: ", join(model.decoder().unused_tensors())));
    return out;
}

void write_names(JsonWriter& json, const char* key, const std::vector<std::string>& names) {
    json.key(key).begin_array();
    for (const std::string& name : names) json.string(name);
    json.end_array();
}

void write_ids(JsonWriter& json, const char* key, const std::vector<int32_t>& ids) {
    json.key(key).begin_array();
    for (const int32_t id : ids) json.integer(id);
    json.end_array();
}

// Encoder, projector and policy; null where there are none.
void write_heads(JsonWriter& json, const Model& model) {
    if (!model.has_encoder()) {
        for (const char* name : {"encoder", "projector", "policy"}) json.key(name).null();
        return;
    }
    const RefragConfig& r = model.config();
    const RobertaConfig& e = model.encoder().config();
    json.key("encoder").begin_object();
    json.key("parameters").integer(static_cast<int64_t>(model.encoder().parameters()));
    json.key("weight_bytes").integer(static_cast<int64_t>(model.encoder().weight_bytes()));
    json.key("dim").integer(e.dim);
    json.key("hidden_dim").integer(e.hidden_dim);
    json.key("n_layers").integer(e.n_layers);
    json.key("n_heads").integer(e.n_heads);
    json.key("vocab_size").integer(e.vocab_size);
    json.key("vocabulary").string(r.shared_vocabulary ? "shared" : "own");
    json.key("max_seq_len").integer(e.max_seq_len());
    json.key("pooling").string(pooling_name(r.pooling));
    json.key("normalize").boolean(r.normalize);
    write_names(json, "unused_tensors", model.encoder().unused_tensors());
    json.end_object();
    json.key("projector").begin_object();
    json.key("parameters").integer(static_cast<int64_t>(model.projector().parameters()));
    json.key("weight_bytes").integer(static_cast<int64_t>(model.projector().weight_bytes()));
    json.end_object();
    json.key("policy").begin_object();
    json.key("parameters").integer(static_cast<int64_t>(model.policy().parameters()));
    json.key("weight_bytes").integer(static_cast<int64_t>(model.policy().weight_bytes()));
    json.key("dim").integer(r.policy.dim);
    json.key("hidden_dim").integer(r.policy.hidden_dim);
    json.key("n_layers").integer(r.policy.n_layers);
    json.key("n_heads").integer(r.policy.n_heads);
    json.key("sees_question").boolean(r.policy.sees_question);
    json.end_object();
}

std::string as_json(const Model& model, const std::string& choice) {
    const RefragConfig& r = model.config();
    const DecoderConfig& d = model.decoder().config();
    JsonWriter json(1);
    json.begin_object();
    json.key("model").string(model.dir());
    json.key("device").string(model.device().description());
    json.key("device_choice").string(choice);
    const MemoryPlan plan = plan_memory(model, 1, d.max_seq_len);
    json.key("memory").begin_object();
    json.key("weight_bytes").integer(static_cast<int64_t>(plan.weight_bytes));
    json.key("kv_bytes").integer(static_cast<int64_t>(plan.request_bytes));
    json.key("workspace_bytes").integer(static_cast<int64_t>(plan.workspace_bytes));
    json.key("available_bytes").integer(static_cast<int64_t>(plan.available_bytes));
    json.key("fits").boolean(plan.fits());
    json.end_object();
    json.key("parameters").integer(static_cast<int64_t>(model.parameters()));
    json.key("weight_bytes").integer(static_cast<int64_t>(model.weight_bytes()));
    json.key("chunk_len").integer(r.chunk_len);
    write_ids(json, "chunk_lens", r.chunk_lens);
    json.key("expand_fraction").number(r.expand_fraction);
    json.key("policy_default").string(select_policy_name(model.default_policy()));
    json.key("unexpanded_default").string(unexpanded_name(model.default_unexpanded()));
    json.key("chat_template").string(chat_format_name(model.chat_format()));
    json.key("chat_template_source").string(chat_source_name(model.chat_source()));
    json.key("system_message").string(model.system_message());
    write_heads(json, model);
    json.key("decoder").begin_object();
    json.key("family").string(d.family);
    json.key("parameters").integer(static_cast<int64_t>(model.decoder().parameters()));
    json.key("weight_bytes").integer(static_cast<int64_t>(model.decoder().weight_bytes()));
    json.key("dim").integer(d.dim);
    json.key("hidden_dim").integer(d.hidden_dim);
    json.key("n_layers").integer(d.n_layers);
    json.key("n_heads").integer(d.n_heads);
    json.key("n_kv_heads").integer(d.n_kv_heads);
    json.key("head_dim").integer(d.head_dim);
    json.key("vocab_size").integer(d.vocab_size);
    json.key("max_seq_len").integer(d.max_seq_len);
    write_ids(json, "windows", d.windows);
    json.key("tied_embeddings").boolean(d.tied_embeddings);
    json.key("bos_id");
    if (model.bos_id()) {
        json.integer(*model.bos_id());
    } else {
        json.null();
    }
    write_ids(json, "eos_ids", model.end_ids());
    json.key("gguf_types");
    if (model.gguf_types().empty()) {
        json.null();
    } else {
        json.string(model.gguf_types());
    }
    json.key("adapters").begin_array();
    for (const AdapterInfo& adapter : model.adapters()) {
        json.begin_object().key("dir").string(adapter.dir).key("rank").integer(adapter.rank);
        json.key("alpha").number(adapter.alpha);
        json.key("n_matrices").integer(static_cast<int64_t>(adapter.n_matrices)).end_object();
    }
    json.end_array();
    json.key("kv_bytes_per_position").integer(kv_bytes_per_position(model.decoder()));
    write_names(json, "unused_tensors", model.decoder().unused_tensors());
    json.end_object();
    json.end_object();
    return json.text() + "\n";
}

void inspect(const InspectOptions& options) {
    std::string choice;
    const std::unique_ptr<Device> device = make_device(options.device, &choice);
    const std::unique_ptr<Model> model =
        load_model(*device, options.model_dir, options.device, chat_options(options.chat));
    write_stdout(options.json ? as_json(*model, choice) : as_text(*model, choice));
}

}  // namespace

void add_inspect(CLI::App& app) {
    auto options = std::make_shared<InspectOptions>();
    CLI::App& sub = *app.add_subcommand("inspect", "Loads a model directory and says what is in it");
    add_model_option(sub, options->model_dir);
    add_chat_options(sub, options->chat);
    add_device_options(sub, options->device);
    sub.add_flag("--json", options->json, "As one JSON object");
    sub.final_callback([options] { inspect(*options); });
}

}  // namespace refrag
