// refrag.h: versions, models, tokenizing.
#include "api/device.h"
#include "api/handles.h"
#include "models/int8_weights.h"

using namespace refrag;
using namespace refrag::api;

extern "C" {

const char* refrag_version(void) {
    return REFRAG_VERSION;
}

int refrag_abi_matches(int abi_version) {
    return abi_version == REFRAG_ABI_VERSION ? 1 : 0;
}

const char* refrag_status_name(refrag_status status) {
    switch (status) {
        case REFRAG_OK:
            return "ok";
        case REFRAG_RUNTIME:
            return "failed at run time";
        case REFRAG_USAGE:
            return "wrong usage";
        case REFRAG_BAD_INPUT:
            return "bad input";
        case REFRAG_OUT_OF_MEMORY:
            return "out of memory";
        case REFRAG_CANCELLED:
            return "cancelled";
    }
    return "unknown status";
}

}  // extern "C"

namespace {

refrag_model_options default_options() {
    refrag_model_options options{};
    options.struct_size = sizeof options;
    options.device = "auto";
    options.gpu_memory_fraction = DeviceOptions().gpu_memory_fraction;
    options.weights = "auto";
    return options;
}

void log_line(const refrag_model_options& options, refrag_log_level level, const std::string& line) {
    if (options.log != nullptr) options.log(options.user, level, line.c_str());
}

std::shared_ptr<Loaded> load(const std::string& path, const refrag_model_options& options) {
    DeviceOptions device;
    device.device = or_default(options.device, "auto");
    device.threads = options.n_threads;
    device.deterministic = options.deterministic != 0;
    device.gpu_memory_fraction = options.gpu_memory_fraction;
    REFRAG_CHECK(device.threads >= 0 && device.threads <= 4096, Status::usage,
                 "n_threads: expected 0 to 4096, found ", device.threads);
    const WeightFormat format = parse_weight_format("weights", or_default(options.weights, "auto"));
    ChatOptions chat;
    if (options.chat_template != nullptr) chat.format = parse_chat_format(options.chat_template);
    if (options.system != nullptr) chat.system = options.system;
    if (options.n_adapters > 0) require(options.adapters, "adapters");
    std::vector<std::string> adapters;
    for (size_t i = 0; i < options.n_adapters; ++i) {
        require(options.adapters[i], "adapters");
        adapters.emplace_back(options.adapters[i]);
    }
    LoadProgress progress;
    if (options.progress != nullptr) {
        progress = [&options](uint64_t done, uint64_t total) {
            if (options.progress(options.user, done, total) == 0) throw Cancelled();
        };
    }
    ChosenDevice chosen = choose_device(device, own_gpu_runtime());
    if (!chosen.warning.empty()) log_line(options, REFRAG_LOG_WARNING, chosen.warning);
    auto loaded = std::make_shared<Loaded>();
    loaded->device = std::move(chosen.device);
    loaded->model = std::make_unique<Model>(*loaded->device, path, progress, format, chat, adapters);
    log_line(options, REFRAG_LOG_INFO, str("device ", loaded->device->description(), " (", chosen.why, ")"));
    if (loaded->model->chat_source() == ChatSource::unknown)
        log_line(options, REFRAG_LOG_WARNING, "its chat template is of no known format, prompts are plain");
    for (const std::string& warning : loaded->model->decoder().warnings())
        log_line(options, REFRAG_LOG_WARNING, warning);
    return loaded;
}

}  // namespace

extern "C" {

void refrag_model_options_init(refrag_model_options* options, size_t struct_size) {
    give_defaults(options, struct_size, default_options());
}

refrag_status refrag_model_load(const char* path, const refrag_model_options* options, refrag_model** model,
                                refrag_error* error) {
    return guarded(error, [&] {
        require(path, "path");
        require(model, "model");
        const refrag_model_options o = options_of(options, default_options(), "refrag_model_options");
        *model = new refrag_model{load(path, o)};
    });
}

void refrag_model_free(refrag_model* model) {
    delete model;
}

refrag_status refrag_model_get_info(const refrag_model* model, refrag_model_info* info, refrag_error* error) {
    return guarded(error, [&] {
        require(model, "model");
        const Model& m = model->model();
        refrag_model_info out{};
        out.has_encoder = m.has_encoder() ? 1 : 0;
        out.chunk_len = m.config().chunk_len;
        out.expand_fraction = m.config().expand_fraction;
        out.vocab_size = m.decoder().config().vocab_size;
        out.dim = m.decoder().config().dim;
        out.d_enc = m.has_encoder() ? m.d_enc() : 0;
        out.max_context = m.decoder().config().max_seq_len;
        out.bos_id = m.bos_id().value_or(-1);
        out.end_id = m.end_id();
        out.parameters = m.parameters();
        out.weight_bytes = m.weight_bytes();
        give_info(info, out, "refrag_model_info");
    });
}

refrag_status refrag_tokenize(const refrag_model* model, const char* text, size_t n_bytes, int parse_special,
                              int32_t* ids, size_t capacity, size_t* n_ids, refrag_error* error) {
    return guarded(error, [&] {
        require(model, "model");
        const std::vector<int32_t> all =
            model->model().tokenizer().encode_ids(text_of(text, n_bytes, "text"), parse_special != 0);
        give_values(all.data(), all.size(), ids, capacity, n_ids, "ids", "n_ids");
    });
}

refrag_status refrag_detokenize(const refrag_model* model, const int32_t* ids, size_t n_ids, char* text,
                                size_t capacity, size_t* n_bytes, refrag_error* error) {
    return guarded(error, [&] {
        require(model, "model");
        if (n_ids > 0) require(ids, "ids");
        const Tokenizer& tokenizer = model->model().tokenizer();
        for (size_t i = 0; i < n_ids; ++i)
            REFRAG_CHECK(ids[i] >= 0 && ids[i] < tokenizer.vocab_size(), Status::usage, "ids: expected 0 to ",
                         tokenizer.vocab_size() - 1, ", found ", ids[i]);
        const std::string all = tokenizer.decode({ids, n_ids}, false);
        give_values(all.data(), all.size(), text, capacity, n_bytes, "text", "n_bytes");
    });
}

}  // extern "C"
