// See segment.h.
#include "refrag/segment.h"

#include <iterator>
#include <utility>

namespace refrag {
namespace {

// A template's pieces are the same in every place: each is tokenised once.
TokenSegment template_piece(const Model& model, const std::string& piece) {
    if (piece.empty()) return {};
    return {model.tokenizer().encode_ids(piece, /*parse_special=*/true)};
}

// around: see TokenSegment.
void add_tokens(std::vector<Segment>& segments, const TokenSegment& tokens, int32_t around = 0) {
    if (!tokens.ids.empty()) segments.emplace_back(TokenSegment{tokens.ids, false, around});
}

// A turn's question or answer; its part of the turn's choice is the next of `choice` after `used`.
PassageSegment compressed_text(const Model& model, std::string text, int32_t chunk_len,
                               const std::optional<std::vector<bool>>& choice, size_t& used) {
    PassageSegment segment{std::make_shared<SharedPassage>(model, std::move(text), chunk_len), {}};
    if (!choice) return segment;
    const size_t n = segment.passage->cut(model)->chunks().size();
    REFRAG_CHECK(used + n <= choice->size(), Status::usage,
                 "an earlier turn's choice: expected one for each ", "of its chunks, found ", choice->size());
    const auto begin = choice->begin() + static_cast<std::ptrdiff_t>(used);
    segment.expanded.emplace(begin, begin + static_cast<std::ptrdiff_t>(n));
    used += n;
    return segment;
}

void check_choice_used(const Turn& turn, size_t used) {
    REFRAG_CHECK(!turn.compress || !turn.expanded || used == turn.expanded->size(), Status::usage,
                 "an earlier turn's choice: expected one for each of its ", used, " chunks, found ",
                 turn.expanded ? turn.expanded->size() : 0);
}

// The prompt in the model's chat format. The last stretch of ids, which holds the question, is its segment.
std::vector<Segment> chat_prompt(const Model& model, std::span<const Turn> history,
                                 std::span<const std::shared_ptr<SharedPassage>> passages,
                                 std::string_view question, int32_t chunk_len) {
    std::vector<ChatTurn> turns;
    std::vector<PassageSegment> places;
    for (const auto& passage : passages) places.push_back({passage, {}});
    for (const Turn& turn : history) {
        turns.push_back({turn.question, turn.answer, turn.compress});
        size_t used = 0;
        for (const std::string* text : {&turn.question, &turn.answer}) {
            // A turn that is read as text has no use for its place.
            places.push_back(turn.compress ? compressed_text(model, *text, chunk_len, turn.expanded, used)
                                           : PassageSegment{});
        }
        check_choice_used(turn, used);
    }
    const ChatPrompt prompt{model.system_message(), passages.size(), turns, question};
    std::vector<Segment> segments;
    for (ChatSegment& part :
         chat_segments(model.chat_format(), model.tokenizer(), prompt, model.bos_id(), model.end_id())) {
        if (part.passage) {
            segments.emplace_back(std::move(places[*part.passage]));
        } else {
            segments.emplace_back(TokenSegment{std::move(part.ids)});
        }
    }
    auto& last = std::get<TokenSegment>(segments.back());
    segments.back() = QuestionSegment{std::string(question), std::move(last.ids)};
    return segments;
}

}  // namespace

std::vector<std::shared_ptr<SharedPassage>> share_passages(const Model& model,
                                                           std::span<const Passage> passages,
                                                           PassageCache& cache, int32_t chunk_len) {
    std::vector<std::shared_ptr<SharedPassage>> shared;
    shared.reserve(passages.size());
    for (const Passage& passage : passages)
        shared.push_back(cache.share(model, passage.content(), chunk_len));
    return shared;
}

std::vector<Segment> conversation_segments(const Model& model, std::span<const Turn> history,
                                           std::string_view question, int32_t chunk_len) {
    const TokenSegment prefix = template_piece(model, model.config().prompt.question_prefix);
    const TokenSegment suffix = template_piece(model, model.config().prompt.question_suffix);
    std::vector<Segment> segments;
    for (const Turn& turn : history) {
        size_t used = 0;
        add_tokens(segments, prefix);
        if (turn.compress) {
            segments.emplace_back(compressed_text(model, turn.question, chunk_len, turn.expanded, used));
        } else {
            segments.emplace_back(TextSegment{turn.question});
        }
        add_tokens(segments, suffix);
        if (turn.compress) {
            segments.emplace_back(compressed_text(model, " " + turn.answer, chunk_len, turn.expanded, used));
            check_choice_used(turn, used);
        } else {
            segments.emplace_back(TextSegment{" " + turn.answer});
        }
        segments.emplace_back(TokenSegment{{model.end_id()}});
    }
    add_tokens(segments, prefix);
    segments.emplace_back(QuestionSegment{std::string(question)});
    add_tokens(segments, suffix);
    return segments;
}

std::vector<Segment> make_segments(const Model& model, std::span<const Turn> history,
                                   std::span<const std::shared_ptr<SharedPassage>> passages,
                                   std::string_view question, int32_t chunk_len) {
    if (model.chat_format() != ChatFormat::plain)
        return chat_prompt(model, history, passages, question, chunk_len);
    const PromptTemplate& pieces = model.config().prompt;
    std::vector<Segment> conversation = conversation_segments(model, history, question, chunk_len);
    std::vector<Segment> segments;
    const auto add_conversation = [&] {
        segments.insert(segments.end(), std::make_move_iterator(conversation.begin()),
                        std::make_move_iterator(conversation.end()));
    };
    if (model.bos_id()) segments.emplace_back(TokenSegment{{*model.bos_id()}});
    if (!model.system_message().empty()) {
        segments.emplace_back(TextSegment{model.system_message()});
        add_tokens(segments, template_piece(model, "\n\n"));
    }
    add_tokens(segments, template_piece(model, pieces.before));
    if (model.config().order == SegmentOrder::question_first) add_conversation();
    const TokenSegment prefix = template_piece(model, pieces.passage_prefix);
    const TokenSegment suffix = template_piece(model, pieces.passage_suffix);
    for (const auto& passage : passages) {
        add_tokens(segments, prefix, 1);
        segments.emplace_back(PassageSegment{passage, {}});
        add_tokens(segments, suffix, -1);
    }
    if (model.config().order == SegmentOrder::passages_first) add_conversation();
    return segments;
}

}  // namespace refrag
