// See sources.h.
#include "server/sources.h"

#include <set>

#include "io/file.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

// A value as it is read: texts as they are, numbers and the like as JSON has them.
std::string shown_value(const Json& value) {
    switch (value.kind()) {
        case Json::Kind::string:
            return std::string(value.as_string());
        case Json::Kind::boolean:
            return value.as_bool() ? "true" : "false";
        case Json::Kind::integer:
            return std::to_string(value.as_int());
        case Json::Kind::number:
            return JsonWriter().number(value.as_number()).text();
        case Json::Kind::null:
            return "";
        case Json::Kind::array:
        case Json::Kind::object:
            break;
    }
    value.refuse("a string, a number or a boolean");
}

bool is_text_key(std::string_view key) {
    return key == "text" || key == "snippet" || key == "content";
}

// {"title", "text"} and whatever else is there: the title, the text, and a line "key: value" for each other.
void read_data(const Json& data, Passage& passage, CitedDocument& cited) {
    if (data.is_string()) {
        passage.text = std::string(data.as_string());
        cited.fields.emplace_back("text", passage.text);
        if (passage.text.empty()) data.refuse("a text that is not empty");
        return;
    }
    std::string lines;
    for (size_t i = 0; i < data.as_object().size(); ++i) {
        const std::string key(data.key_at(i));
        const Json value = data.at(i);
        if (value.is_null() || key == "id") continue;
        std::string text = shown_value(value);
        cited.fields.emplace_back(key, text);
        if (key == "title") {
            passage.title = std::move(text);
        } else if (is_text_key(key)) {
            passage.text += (passage.text.empty() ? "" : "\n") + text;
        } else {
            lines += str(lines.empty() ? "" : "\n", key, ": ", text);
        }
    }
    if (!lines.empty()) passage.text += (passage.text.empty() ? "" : "\n") + lines;
    if (passage.text.empty()) data.refuse("\"text\", or another key with something to read");
}

}  // namespace

Sources SourceReader::read(BodyReader& body, const std::string& question) const {
    Sources sources;
    sources.chunk_len = chunk_len_;
    const auto add = [&](CitedDocument cited, std::shared_ptr<SharedPassage> passage) {
        sources.documents.push_back(std::move(cited));
        sources.passages.push_back(std::move(passage));
    };
    const auto check_number = [&](const char* key, size_t n) {
        if (sources.passages.size() + n > limits_.max_documents)
            refuse_request(key, key, ": expected at most ", limits_.max_documents, " passages in all, found ",
                           sources.passages.size() + n);
    };
    if (const std::optional<Json> list = body.find("documents")) {
        body.within("documents", [&] {
            check_number("documents", list->as_array().size());
            std::set<std::string> ids;
            std::vector<std::string> texts;
            for (size_t i = 0; i < list->size(); ++i) {
                const Json document = list->at(i);
                Passage passage;
                CitedDocument cited{str("doc:", i), {}};
                if (document.is_object()) {
                    if (const auto id = document.find_id()) cited.id = id_text(*id);
                    const std::optional<Json> data = document.find("data");
                    if (data) document.check_keys({"id", "data"});
                    read_data(data ? *data : document, passage, cited);
                } else if (document.is_string()) {
                    read_data(document, passage, cited);
                } else {
                    document.refuse("a string, or an object with \"text\" or \"data\"");
                }
                if (!ids.insert(cited.id).second)
                    document.refuse(str("an id of its own, found ", cited.id, " twice"));
                texts.push_back(passage.content());
                sources.documents.push_back(std::move(cited));
            }
            sources.passages = cache_.share_all(model_, std::move(texts), chunk_len_);
        });
    }
    if (const std::optional<Json> list = body.find("passage_ids")) {
        body.within("passage_ids", [&] {
            check_number("passage_ids", list->as_array().size());
            for (size_t i = 0; i < list->size(); ++i) {
                const std::string id(list->at(i).as_string());
                const std::optional<KeptPassage> kept = table_.find(id);
                if (!kept)
                    throw ApiRefusal({404,
                                      str("passage_ids: no passage \"", printable(id, 60), "\" has been put"),
                                      "invalid_request_error", "passage_ids", "passage_not_found"});
                CitedDocument cited{id, {}};
                if (!kept->passage.title.empty()) cited.fields.emplace_back("title", kept->passage.title);
                cited.fields.emplace_back("text", kept->passage.text);
                add(std::move(cited), kept->shared);
            }
        });
    }
    const std::optional<Json> store = body.find("store");
    // OpenAI's field of this name is a boolean, and says nothing about the answer.
    if (store && !store->is_bool()) {
        StoreQuery query;
        body.within("store", [&] {
            store->as_object().check_keys({"query", "top", "where"});
            query.query = store->get_string_or("query", question);
            if (store->find("top"))
                query.top = store->get_int("top", 1, static_cast<int64_t>(limits_.max_documents));
            if (const auto where = store->find("where")) {
                for (size_t i = 0; i < where->as_array().size(); ++i)
                    query.where.emplace_back(where->at(i).as_string());
            }
        });
        if (!find_) refuse_request("store", "store: this server was started without --store");
        const double started_ms = now_ms();
        for (FoundPassage& found : body.within("store", [&] { return find_(query); }))
            add({std::move(found.id), {{"title", std::move(found.title)}, {"text", std::move(found.text)}}},
                std::move(found.passage));
        sources.retrieve_ms = now_ms() - started_ms;
        check_number("store", 0);
    }
    size_t n_chunks = 0;
    for (const auto& passage : sources.passages) n_chunks += passage->cut(model_)->chunks().size();
    if (n_chunks > limits_.max_chunks)
        refuse_request("documents", "documents: expected at most ", limits_.max_chunks,
                       " chunks in all, found ", n_chunks);
    return sources;
}

}  // namespace refrag
