// See explain.h.
#include "cli/explain.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "cli/common.h"
#include "cli/explain_page.h"

namespace refrag {

void Explanation::ask(const std::string& question, std::span<const Passage> passages,
                      const std::vector<Segment>& segments) {
    if (path_.empty()) return;
    asked_.emplace();
    asked_->question = question;
    for (const Passage& passage : passages) asked_->documents.push_back({passage.id, passage.title});
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
