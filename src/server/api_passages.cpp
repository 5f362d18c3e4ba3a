// See api.h: passages by id, embeddings, tokens.
#include <algorithm>
#include <cstring>

#include "io/base64.h"
#include "io/file.h"
#include "refrag/pooling.h"
#include "server/api.h"

namespace refrag {
namespace {

constexpr size_t max_inputs = 2048;
constexpr size_t max_id_bytes = 512;
constexpr size_t max_listed = 1000;

void write_passage(JsonWriter& json, const KeptPassage& kept, const Model& model, bool with_text) {
    const auto cut = kept.shared->cut(model);
    json.begin_object();
    json.key("id").string(kept.passage.id);
    json.key("object").string("passage");
    json.key("created").integer(kept.created);
    json.key("title").string(kept.passage.title);
    if (with_text) json.key("text").string(kept.passage.text);
    json.key("tokens").integer(static_cast<int64_t>(cut->n_tokens()));
    json.key("chunks").integer(std::ssize(cut->chunks()));
    json.key("encoded").boolean(kept.shared->encoded() != nullptr);
    json.end_object();
}

// Embedding endpoints' values, as numbers or as base64 of their bytes.
void write_vector(JsonWriter& json, std::span<const float> values, bool as_base64) {
    json.key("embedding");
    if (as_base64) {
        std::string bytes(values.size_bytes(), '\0');
        std::memcpy(bytes.data(), values.data(), values.size_bytes());
        json.string(base64_encode(bytes));
        return;
    }
    json.begin_array();
    for (const float value : values) json.number(value);
    json.end_array();
}

struct EmbeddingCall {
    std::vector<std::shared_ptr<SharedPassage>> inputs;
    bool chunks = false;  // a vector for each chunk, not pooled
    bool as_base64 = false;
    std::string model;
};

std::string embeddings_json(const EmbeddingCall& call, const Model& model, Backend& backend) {
    JsonWriter json;
    json.begin_object().key("object").string("list").key("data").begin_array();
    const auto dim = static_cast<size_t>(model.d_enc());
    int64_t n_tokens = 0;
    int64_t index = 0;
    for (size_t i = 0; i < call.inputs.size(); ++i) {
        const std::shared_ptr<const EncodedPassage> encoded = call.inputs[i]->encoded();
        const std::vector<float> values = encoded->download(backend);
        n_tokens += static_cast<int64_t>(encoded->cut()->n_tokens());
        const auto write = [&](std::span<const float> vector, const Chunk* chunk) {
            json.begin_object();
            json.key("object").string("embedding");
            json.key("index").integer(index++);
            if (chunk != nullptr) {
                json.key("input").integer(static_cast<int64_t>(i));
                json.key("begin").integer(static_cast<int64_t>(chunk->begin));
                json.key("end").integer(static_cast<int64_t>(chunk->end));
            }
            write_vector(json, vector, call.as_base64);
            json.end_object();
        };
        if (!call.chunks) {
            write(mean_direction(values, static_cast<int64_t>(dim)), nullptr);
            continue;
        }
        const std::vector<Chunk>& chunks = encoded->cut()->chunks();
        for (size_t c = 0; c < chunks.size(); ++c) write({values.data() + c * dim, dim}, &chunks[c]);
    }
    json.end_array();
    json.key("model").string(call.model);
    json.key("usage").begin_object();
    json.key("prompt_tokens").integer(n_tokens);
    json.key("total_tokens").integer(n_tokens);
    json.end_object().end_object();
    return json.text();
}

std::vector<std::string> read_inputs(BodyReader& body, const Model& model) {
    const std::optional<Json> given = body.find("input");
    if (!given) refuse_request("input", "input: expected a string, ids, or a list of either, found none");
    const auto of_ids = [&](const Json& list) {
        return model.tokenizer().decode(ids_of(list, model.decoder().config().vocab_size), false);
    };
    return body.within("input", [&] {
        std::vector<std::string> texts;
        if (given->is_string()) {
            texts.emplace_back(given->as_string());
        } else if (given->as_array().size() > 0 && given->at(0).is_number()) {
            texts.push_back(of_ids(*given));
        } else {
            if (given->size() > max_inputs)
                fail(Status::usage, "input: expected at most ", max_inputs, ", found ", given->size());
            for (size_t i = 0; i < given->size(); ++i)
                texts.push_back(given->at(i).is_string() ? std::string(given->at(i).as_string())
                                                         : of_ids(given->at(i)));
        }
        for (const std::string& text : texts)
            if (text.empty()) fail(Status::usage, "input: expected a text that is not empty");
        if (texts.empty()) given->refuse("at least one input");
        return texts;
    });
}

}  // namespace

void Api::encode(const std::shared_ptr<Exchange>& exchange,
                 std::vector<std::shared_ptr<SharedPassage>> passages, std::function<void(Backend&)> answer) {
    const auto done = [exchange, answer = std::move(answer)](const std::optional<Error>& error,
                                                             Backend& backend) {
        try {
            if (error) return respond_error(*exchange, api_error_of(*error));
            answer(backend);
        } catch (...) {
            respond_error(*exchange, caught_error());
        }
    };
    const std::optional<uint64_t> ticket = scheduler_.encode(std::move(passages), done);
    if (!ticket)
        throw ApiRefusal(
            {429, "the queue is full: try again later", "rate_limit_error", "", "queue_full", 1});
    exchange->on_leave([this, of = std::vector<uint64_t>{*ticket}] {
        ++metrics_.clients_left;
        scheduler_.cancel(of);
    });
}

void Api::embeddings(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    BodyReader body(exchange->request.body);
    check_model(body);
    if (!model_.has_encoder())
        refuse_request("model", "the model \"", options_.model_name,
                       "\" has no encoder: it has no embeddings");
    auto call = std::make_shared<EmbeddingCall>();
    call->model = options_.model_name;
    const std::string format = body.text("encoding_format").value_or("float");
    if (format != "float" && format != "base64")
        refuse_request("encoding_format", "encoding_format: expected float or base64, found ",
                       printable(format, 40));
    call->as_base64 = format == "base64";
    body.integer("dimensions", model_.d_enc(), model_.d_enc());
    const std::string pooling = body.text("pooling").value_or("mean");
    if (pooling != "mean" && pooling != "none")
        refuse_request(
            "pooling",
            "pooling: expected mean (a vector for each input) or none (one for each chunk), found ",
            printable(pooling, 40));
    call->chunks = pooling == "none";
    const std::vector<std::string> texts = read_inputs(body, model_);
    body.finish(harmless_fields());
    size_t n_chunks = 0;
    for (const std::string& text : texts) {
        call->inputs.push_back(cache_.share(model_, text, options_.defaults.chunk_len));
        n_chunks += call->inputs.back()->cut(model_)->chunks().size();
    }
    if (n_chunks > options_.limits.max_chunks)
        refuse_request("input", "input: expected at most ", options_.limits.max_chunks,
                       " chunks in all, found ", n_chunks);
    encode(exchange, call->inputs, [this, exchange, call](Backend& backend) {
        exchange->respond({}, embeddings_json(*call, model_, backend));
    });
}

void Api::list_passages(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    JsonWriter json;
    json.begin_object().key("object").string("list").key("data").begin_array();
    const std::vector<KeptPassage> listed = table_.list("", max_listed);
    for (const KeptPassage& kept : listed) write_passage(json, kept, model_, false);
    json.end_array();
    json.key("has_more").boolean(table_.size() > listed.size());
    json.end_object();
    exchange->respond({}, json.text());
}

void Api::put_passage(const std::shared_ptr<Exchange>& exchange, std::string_view rest) {
    if (rest.size() > max_id_bytes)
        refuse_request("id", "the passage's id: expected at most ", max_id_bytes, " bytes, found ",
                       rest.size());
    BodyReader body(exchange->request.body);
    KeptPassage kept;
    kept.passage.id = std::string(rest);
    kept.passage.title = body.text("title").value_or("");
    const std::optional<std::string> text = body.text("text");
    if (!text || text->empty()) refuse_request("text", "text: expected the passage's text, found none");
    kept.passage.text = *text;
    if (const auto id = body.text("id"); id && *id != rest)
        refuse_request("id", "id: expected the path's, \"", printable(rest, 60), "\", found \"",
                       printable(*id, 60), "\"");
    body.finish({});
    kept.created = seconds_now();
    kept.shared = cache_.share(model_, kept.passage.content(), options_.defaults.chunk_len);
    const size_t n_chunks = kept.shared->cut(model_)->chunks().size();
    if (n_chunks > options_.limits.max_chunks)
        refuse_request("text", "text: expected at most ", options_.limits.max_chunks, " chunks, found ",
                       n_chunks);
    const bool is_new = !table_.find(rest);
    const auto keep = [this, exchange, kept, is_new] {
        if (!table_.put(kept))
            return respond_error(
                *exchange, {507,
                            str("no room for another passage: at most ", table_.max_passages(), " of them, ",
                                table_.max_bytes(), " bytes in all"),
                            "server_error", "", "passages_full"});
        JsonWriter json;
        write_passage(json, kept, model_, false);
        exchange->respond({.status = is_new ? 201 : 200}, json.text());
    };
    if (!model_.has_encoder()) return keep();
    encode(exchange, {kept.shared}, [keep](Backend&) { keep(); });
}

namespace {

ApiRefusal no_such_passage(std::string_view id) {
    return ApiRefusal({404, str("no passage \"", printable(id, 60), "\" has been put"),
                       "invalid_request_error", "id", "passage_not_found"});
}

}  // namespace

void Api::get_passage(const std::shared_ptr<Exchange>& exchange, std::string_view rest) {
    const std::optional<KeptPassage> kept = table_.find(rest);
    if (!kept) throw no_such_passage(rest);
    JsonWriter json;
    write_passage(json, *kept, model_, true);
    exchange->respond({}, json.text());
}

void Api::delete_passage(const std::shared_ptr<Exchange>& exchange, std::string_view rest) {
    if (!table_.remove(rest)) throw no_such_passage(rest);
    JsonWriter json;
    json.begin_object().key("id").string(rest).key("object").string("passage");
    json.key("deleted").boolean(true).end_object();
    exchange->respond({}, json.text());
}

void Api::tokenize(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    BodyReader body(exchange->request.body);
    check_model(body);
    // llama.cpp's servers say "content" and add nothing by themselves; vLLM's say "prompt" and do.
    const auto content = body.text("content");
    const auto prompt = body.text("prompt");
    if (content.has_value() == prompt.has_value())
        refuse_request("content", "expected content or prompt, found ", content ? "both" : "neither");
    const bool adds = body.boolean("add_special").value_or(false);
    const bool add_special = body.boolean("add_special_tokens").value_or(prompt.has_value()) || adds;
    const bool parse_special = body.boolean("parse_special").value_or(true);
    const bool with_pieces = body.boolean("with_pieces").value_or(false);
    const bool with_strings = body.boolean("return_token_strs").value_or(false);
    body.finish({});
    std::vector<int32_t> ids = model_.tokenizer().encode_ids(content ? *content : *prompt, parse_special);
    if (add_special && model_.bos_id()) ids.insert(ids.begin(), *model_.bos_id());
    JsonWriter json;
    json.begin_object().key("tokens").begin_array();
    for (const int32_t id : ids) {
        if (with_pieces) {
            json.begin_object()
                .key("id")
                .integer(id)
                .key("piece")
                .string(model_.tokenizer().token_bytes(id))
                .end_object();
        } else {
            json.integer(id);
        }
    }
    json.end_array();
    if (with_strings) {
        json.key("token_strs").begin_array();
        for (const int32_t id : ids) json.string(model_.tokenizer().piece(id));
        json.end_array();
    }
    json.key("count").integer(std::ssize(ids));
    json.key("max_model_len").integer(model_.window());
    json.end_object();
    exchange->respond({}, json.text());
}

// As vLLM's server has it: evaluation harnesses take their tokenizer from here.
void Api::tokenizer_info(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    JsonWriter json;
    const auto write = [&](const char* key, std::optional<int32_t> id) {
        json.key(key);
        if (id) {
            json.string(model_.tokenizer().piece(*id));
        } else {
            json.null();
        }
    };
    json.begin_object();
    write("bos_token", model_.bos_id());
    write("eos_token", model_.end_id());
    write("pad_token", std::nullopt);
    json.key("chat_format").string(chat_format_name(model_.chat_format()));
    json.end_object();
    exchange->respond({}, json.text());
}

void Api::detokenize(const std::shared_ptr<Exchange>& exchange, std::string_view) {
    BodyReader body(exchange->request.body);
    check_model(body);
    const std::optional<Json> list = body.find("tokens");
    if (!list) refuse_request("tokens", "tokens: expected a list of ids, found none");
    body.finish({});
    const std::string text = body.within("tokens", [&] {
        return model_.tokenizer().decode(ids_of(*list, model_.tokenizer().vocab_size()), false);
    });
    JsonWriter json;
    json.begin_object();
    json.key("content").string(text);
    json.key("prompt").string(text);
    json.end_object();
    exchange->respond({}, json.text());
}

}  // namespace refrag
