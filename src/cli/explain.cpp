// See explain.h.
#include "cli/explain.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "cli/common.h"
#include "cli/explain_page.h"

namespace refrag {

std::vector<DocumentName> document_names(std::span<const Passage> passages) {
    std::vector<DocumentName> names;
    names.reserve(passages.size());
    for (const Passage& passage : passages) names.push_back({passage.id, passage.title});
    return names;
}

void Explanation::ask(const std::string& question, std::vector<DocumentName> documents,
                      const std::vector<Segment>& segments, std::optional<double> retrieve_ms) {
    if (path_.empty()) return;
    asked_.emplace();
    asked_->question = question;
    asked_->documents = std::move(documents);
    asked_->retrieve_ms = retrieve_ms;
    asked_->segments = segments;
    for (const Segment& segment : segments) {
        const auto* passage = std::get_if<PassageSegment>(&segment);
        asked_->was_cut.push_back(passage != nullptr && (passage->passage->encoded() != nullptr ||
                                                         seen_.contains(passage->passage.get())));
    }
}

void Explanation::answered(const Answer& answer) {
    if (!asked_) return;
    asked_->answer = answer;
    answered_.push_back(std::move(*asked_));
    asked_.reset();
    for (const Segment& segment : answered_.back().segments)
        if (const auto* passage = std::get_if<PassageSegment>(&segment)) seen_.insert(passage->passage.get());
}

std::string Explanation::json(const Model& model) const {
    JsonWriter json(1);
    if (several_) json.begin_array();
    for (const ExplainedQuestion& q : answered_) {
        json.begin_object();
        write_answer(json, model.tokenizer(), q.question, q.answer);
        if (q.retrieve_ms) json.key("retrieve_ms").number(*q.retrieve_ms);
        write_chunks(json, model, q.documents, q.segments, q.answer);
        json.end_object();
    }
    if (several_) json.end_array();
    return json.text() + "\n";
}

void Explanation::write(const Model& model, const EngineOptions& engine, const AnswerOptions& options) const {
    if (path_.empty()) return;
    const bool page = is_page_path(path_);
    write_result(path_, page ? explain_page(explain_data(model, engine, options, answered_)) : json(model));
}

}  // namespace refrag
