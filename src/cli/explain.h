// --explain FILE: what became of each question, written when all are answered. JSON, or, where the file's
// name ends in .html or .htm, one page to look at (explain_page.h).
#pragma once

#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "cli/explain_data.h"
#include "refrag/passages.h"

namespace refrag {

std::vector<DocumentName> document_names(std::span<const Passage> passages);

class Explanation {
  public:
    // path: of --explain; "": not given, and nothing is kept. several: questions are asked one after another,
    // and the JSON is an array.
    Explanation(std::string path, bool several) : path_(std::move(path)), several_(several) {}

    // A question is about to be answered. `documents` names the passage segments in their order; retrieve_ms:
    // what finding them took, where they were looked for.
    void ask(const std::string& question, std::vector<DocumentName> documents,
             const std::vector<Segment>& segments, std::optional<double> retrieve_ms = std::nullopt);
    // How. A question that is not answered is left out.
    void answered(const Answer& answer);

    // Writes the file, where one was asked for. For a page each question goes through the model twice more
    // (explain_data): whoever answered them has let go of the engine, whose options `engine` are.
    void write(const Model& model, const EngineOptions& engine, const AnswerOptions& options) const;

  private:
    std::string json(const Model& model) const;

    std::string path_;
    bool several_;
    std::optional<ExplainedQuestion> asked_;
    std::vector<ExplainedQuestion> answered_;
    std::unordered_set<const SharedPassage*> seen_;  // in earlier questions; these hold them
};

}  // namespace refrag
