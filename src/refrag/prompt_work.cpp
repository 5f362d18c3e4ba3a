// See prompt_work.h. PromptWork::advance() is the path of a request in the order of the paper's Figure 1.
#include "refrag/prompt_work.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>

#include "models/device_batch.h"
#include "refrag/bm25.h"
#include "refrag/scoring.h"
#include "refrag/timer.h"

namespace refrag {

PromptWork::PromptWork(const Model& model, std::vector<Segment> segments, const AnswerOptions& options,
                       int64_t max_context, Answer& answer)
    : model_(model),
      segments_(std::move(segments)),
      options_(options),
      choice_(choice_of(model, options)),
      max_context_(max_context),
      answer_(answer) {
    answer_.policy = choice_.policy;
    answer_.unexpanded = choice_.unexpanded;
    answer_.chunk_len = choice_.chunk_len;
    answer_.expand_fraction = choice_.expand_fraction;
    everything_ = answer_.expand_fraction == 1.0;
}

PromptWork::~PromptWork() {
    if (backend_ == nullptr) return;
    try {
        backend_->wait();
    } catch (...) {
        // A device that fails has nothing under way any more.
    }
}

bool PromptWork::advance(Backend& backend, Arena& arena, int64_t budget_rows, int64_t& used_rows) {
    used_rows = 0;
    backend_ = &backend;
    do {
        const int64_t left = budget_rows - used_rows;
        switch (phase_) {
            case Phase::tokenize: {
                tokenize();
                check_fits(assemble(fewest()), everything_ ? "" : "at least ");
                const int64_t n_open = std::ssize(open_);
                const int64_t wanted = n_expand(answer_.expand_fraction, n_open);
                const bool known = wanted == 0 || wanted == n_open;
                const bool scored = n_open > 0 && (!known || options_.want_logits);
                if (scored && choice_.policy == SelectPolicy::model) {
                    phase_ = Phase::encode_open;
                } else if (scored && reads_chunks_alone(choice_.policy)) {
                    phase_ = Phase::read_alone;
                } else {
                    if (scored && choice_.policy == SelectPolicy::bm25) read_words();
                    choose();
                }
                break;
            }
            case Phase::read_alone:
                if (read_alone(backend, arena, left, used_rows)) choose();
                break;
            case Phase::encode_open: {
                std::vector<size_t> parts;
                for (const size_t chunk : open_) parts.push_back(chunks_[chunk].part);
                if (encode(backend, arena, parts, left, used_rows)) phase_ = Phase::sense;
                break;
            }
            case Phase::sense:
                sense(backend, arena, used_rows);
                choose();
                break;
            case Phase::encode_rest: {
                std::vector<size_t> parts;
                for (const RowRef& row : rows_)
                    if (parts_[row.part].cut) parts.push_back(row.part);
                if (encode(backend, arena, parts, left, used_rows)) phase_ = Phase::project;
                break;
            }
            case Phase::project:
                if (project(backend, arena, left, used_rows)) phase_ = Phase::done;
                break;
            case Phase::done:
                break;
        }
    } while (phase_ != Phase::done && used_rows < budget_rows);
    return phase_ == Phase::done;
}

void PromptWork::tokenize() {
    check_model_can(model_, options_);
    const StageTimer timer(answer_.times.tokenize);
    parts_.reserve(segments_.size());
    for (const Segment& segment : segments_) {
        std::visit([&](const auto& alternative) { add_part(alternative); }, segment);
        parts_.back().segment = &segment;
    }
}

void PromptWork::add_part(const TokenSegment& segment) {
    for (const int32_t id : segment.ids)
        REFRAG_CHECK(id >= 0 && id < model_.decoder().config().vocab_size, Status::usage,
                     "a token segment: expected ids of 0 to ", model_.decoder().config().vocab_size - 1,
                     ", found ", id);
    Part part;
    part.ids = segment.ids;
    part.score = segment.score;
    parts_.push_back(std::move(part));
}

void PromptWork::add_part(const TextSegment& segment) {
    Part part;
    part.ids = model_.tokenizer().encode_ids(segment.text, segment.parse_special);
    parts_.push_back(std::move(part));
}

void PromptWork::add_part(const QuestionSegment& segment) {
    Part part;
    std::vector<Token> tokens = model_.tokenizer().encode(segment.text);
    if (segment.ids) {
        part.ids = *segment.ids;
    } else {
        part.ids.reserve(tokens.size());
        for (const Token& token : tokens) part.ids.push_back(token.id);
    }
    questions_.emplace_back(segment.text, std::move(tokens));
    parts_.push_back(std::move(part));
}

void PromptWork::add_part(const PassageSegment& segment) {
    Part part;
    part.encoded = segment.passage->encoded();
    part.cut = part.encoded ? part.encoded->cut() : segment.passage->cut(model_);
    const std::vector<Chunk>& chunks = part.cut->chunks();
    REFRAG_CHECK(!segment.expanded || segment.expanded->size() == chunks.size(), Status::usage,
                 "a passage's choice: expected one for each of its ", chunks.size(), " chunks, found ",
                 segment.expanded->size());
    for (size_t c = 0; c < chunks.size(); ++c) {
        ChunkReport report;
        report.segment = parts_.size();
        report.begin = chunks[c].begin;
        report.end = chunks[c].end;
        report.n_tokens = chunks[c].ids.size();
        report.cached = part.encoded != nullptr;
        report.expanded = segment.expanded && (*segment.expanded)[c];
        answer_.n_cached += report.cached ? 1 : 0;
        if (!segment.expanded) open_.push_back(chunks_.size());
        chunks_.push_back({parts_.size(), static_cast<int64_t>(c)});
        answer_.chunks.push_back(report);
    }
    parts_.push_back(std::move(part));
}

PromptWork::Part PromptWork::values_part(const std::vector<float>& values, int64_t dim,
                                         const char* what) const {
    REFRAG_CHECK(std::ssize(values) % dim == 0, Status::usage, what, ": expected rows of ", dim,
                 " values, found ", values.size(), " values");
    const std::string_view bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    Part part;
    part.n_rows = std::ssize(values) / dim;
    part.digest = Sha256().add_field(what).add(bytes).digest();
    return part;
}

void PromptWork::add_part(const ChunkEmbSegment& segment) {
    parts_.push_back(values_part(segment.values, model_.d_enc(), "chunk embeddings"));
}

void PromptWork::add_part(const VectorSegment& segment) {
    parts_.push_back(values_part(segment.values, model_.decoder().config().dim, "input vectors"));
}

std::vector<bool> PromptWork::parts_kept(const std::vector<bool>& open_expanded) const {
    std::vector<bool> kept(parts_.size(), true);
    if (choice_.unexpanded == Unexpanded::compress) return kept;
    std::vector<bool> expanded(chunks_.size());
    for (size_t c = 0; c < chunks_.size(); ++c) expanded[c] = answer_.chunks[c].expanded;
    for (size_t i = 0; i < open_.size(); ++i) expanded[open_[i]] = open_expanded[i];
    for (size_t begin = 0; begin < chunks_.size();) {
        size_t end = begin;
        bool any = false;
        for (; end < chunks_.size() && chunks_[end].part == chunks_[begin].part; ++end)
            any = any || expanded[end];
        kept[chunks_[begin].part] = any;
        begin = end;
    }
    for (size_t p = 0; p < parts_.size(); ++p) {
        const auto* tokens = std::get_if<TokenSegment>(parts_[p].segment);
        if (tokens == nullptr || tokens->around == 0) continue;
        const int64_t of = static_cast<int64_t>(p) + tokens->around;
        REFRAG_CHECK(of >= 0 && of < std::ssize(parts_), Status::usage,
                     "a token segment around a passage: expected one of ", parts_.size(),
                     " segments, found number ", of);
        kept[p] = kept[static_cast<size_t>(of)];
    }
    return kept;
}

DecoderInput PromptWork::assemble(const std::vector<bool>& open_expanded,
                                  const std::vector<bool>& kept) const {
    DecoderInput input;
    size_t chunk = 0;
    size_t open = 0;
    for (size_t p = 0; p < parts_.size(); ++p) {
        const Part& part = parts_[p];
        if (kept[p]) {
            input.add_tokens(part.ids);
        } else {
            input.plain_tokens += part.ids.size();
        }
        if (part.cut) {
            for (const Chunk& c : part.cut->chunks()) {
                const bool is_open = open < open_.size() && open_[open] == chunk;
                const bool expanded = is_open ? open_expanded[open] : answer_.chunks[chunk].expanded;
                if (expanded || choice_.unexpanded == Unexpanded::compress) {
                    input.add_chunk(c, expanded);
                } else {
                    input.skip_chunk(c);
                }
                open += is_open ? 1 : 0;
                ++chunk;
            }
        }
        for (int64_t i = 0; i < part.n_rows; ++i) input.add_row();
    }
    return input;
}

void PromptWork::check_fits(const DecoderInput& input, const char* at_least) const {
    REFRAG_CHECK(!input.source.empty(), Status::usage,
                 "the prompt is empty: no passage, no question, no template");
    // Without an answer the last row is left out, and nothing comes after it.
    const int64_t most = options_.max_new_tokens == 0 ? max_context_ + 1 : max_context_ - 1;
    const int64_t window = model_.window();
    REFRAG_CHECK(
        std::ssize(input.source) <= most, Status::too_long, "the prompt takes ", at_least,
        input.source.size(), " decoder positions (", input.plain_tokens,
        " tokens) and leaves no room for an answer in a context of ", max_context_,
        max_context_ < window
            ? str(": give fewer passages, expand less, or raise -c up to the decoder's window of ", window)
            : std::string(" (the decoder's window): give fewer passages or expand less"));
}

bool PromptWork::read_alone(Backend& backend, Arena& arena, int64_t budget_rows, int64_t& used_rows) {
    const StageTimer timer(answer_.times.sense);
    std::vector<std::vector<int32_t>> ids;
    int64_t rows = 0;
    for (size_t i = scores_.size(); i < open_.size() && (rows == 0 || rows < budget_rows); ++i) {
        const RowRef& chunk = chunks_[open_[i]];
        ids.push_back(parts_[chunk.part].cut->chunks()[static_cast<size_t>(chunk.index)].ids);
        rows += std::ssize(ids.back());
    }
    const std::vector<float> scores = mean_nll_alone(backend, model_, ids, arena);
    scores_.insert(scores_.end(), scores.begin(), scores.end());
    used_rows += rows;
    return scores_.size() == open_.size();
}

void PromptWork::read_words() {
    const StageTimer timer(answer_.times.sense);
    std::vector<ChunkedText> texts;  // a passage's chunks are open together
    for (const size_t chunk : open_) {
        const CutPassage& cut = *parts_[chunks_[chunk].part].cut;
        const auto index = static_cast<size_t>(chunks_[chunk].index);
        if (index == 0) texts.emplace_back().text = cut.text();
        texts.back().chunk_ends.push_back(cut.chunks()[index].end);
    }
    std::string question;
    for (const auto& [text, tokens] : questions_) question.append(text).append("\n");
    scores_ = bm25_scores(texts, question);
}

bool PromptWork::encode(Backend& backend, Arena& arena, const std::vector<size_t>& parts, int64_t budget_rows,
                        int64_t& used_rows) {
    const StageTimer timer(answer_.times.encode);
    std::vector<std::shared_ptr<SharedPassage>> missing;
    const auto passage_of = [&](size_t part) -> const std::shared_ptr<SharedPassage>& {
        return std::get<PassageSegment>(*parts_[part].segment).passage;
    };
    for (size_t i = 0; i < parts.size(); ++i) {
        if ((i == 0 || parts[i] != parts[i - 1]) && !parts_[parts[i]].encoded)
            missing.push_back(passage_of(parts[i]));
    }
    if (!missing.empty()) used_rows += encode_passages(backend, model_, missing, budget_rows, arena);
    bool all = true;
    for (const size_t part : parts) {
        if (!parts_[part].encoded) parts_[part].encoded = passage_of(part)->encoded();
        all = all && parts_[part].encoded;
    }
    return all;
}

void PromptWork::sense(Backend& backend, Arena& arena, int64_t& used_rows) {
    const StageTimer timer(answer_.times.sense);
    const ArenaScope scratch(arena);
    std::vector<RowRef> rows;
    for (const size_t chunk : open_) rows.push_back(chunks_[chunk]);
    const Tensor chunk_emb = arena.tensor(std::ssize(rows), model_.d_enc());
    gather(backend, arena, rows, chunk_emb);
    used_rows += chunk_emb.rows;
    Tensor question_emb;
    if (model_.policy().config().sees_question) {
        std::vector<std::vector<int32_t>> pieces;
        for (const auto& [text, tokens] : questions_) {
            for (Chunk& piece : cut_chunks(text, tokens, answer_.chunk_len, model_.encoder_vocabulary())) {
                used_rows += std::ssize(piece.encoder_ids) + 1;
                pieces.push_back(std::move(piece.encoder_ids));
            }
        }
        question_emb = arena.tensor(std::ssize(pieces), model_.d_enc());
        model_.encoder().encode(backend, pieces, question_emb, arena);
    }
    scores_ = model_.policy().logits(backend, chunk_emb, question_emb, arena);
}

void PromptWork::choose() {
    const int64_t n_open = std::ssize(open_);
    std::vector<bool> expanded;
    {
        const StageTimer timer(answer_.times.sense);
        for (size_t i = 0; i < scores_.size(); ++i) answer_.chunks[open_[i]].logit = scores_[i];
        expanded = select_chunks(choice_.policy, scores_, n_open, n_expand(answer_.expand_fraction, n_open),
                                 options_.sampler.seed);
    }
    const StageTimer timer(answer_.times.prefill);
    const std::vector<bool> kept = parts_kept(expanded);
    prompt_.input = assemble(expanded, kept);
    check_fits(prompt_.input, "");
    for (size_t i = 0; i < open_.size(); ++i) answer_.chunks[open_[i]].expanded = expanded[i];
    for (size_t i = 0; i < chunks_.size(); ++i) {
        answer_.chunks[i].position = prompt_.input.chunk_position[i];
        answer_.chunks[i].n_positions = prompt_.input.chunk_n_positions[i];
        answer_.n_expanded += answer_.chunks[i].expanded ? 1 : 0;
    }
    answer_.positions = prompt_.input.source.size();
    answer_.plain_tokens = prompt_.input.plain_tokens;
    name_rows(kept);
    std::vector<int32_t>& source = prompt_.input.source;
    if (options_.prompt_logprobs) {
        for (size_t i = 1; i < source.size(); ++i) {
            if (source[i] >= 0) prompt_.scores.push_back({static_cast<int64_t>(i) - 1, source[i]});
        }
    }
    if (options_.max_new_tokens == 0 && source.size() > 1) source.pop_back();
    phase_ = Phase::encode_rest;
}

void PromptWork::name_rows(const std::vector<bool>& kept) {
    size_t chunk = 0;
    int64_t position = 0;
    for (size_t p = 0; p < parts_.size(); ++p) {
        const Part& part = parts_[p];
        for (const int32_t id : kept[p] ? part.ids : std::vector<int32_t>()) {
            if (part.score && !options_.prompt_logprobs) {
                REFRAG_CHECK(position > 0, Status::usage,
                             "a scored token segment: expected a row before it, found none");
                prompt_.scores.push_back({position - 1, id});
            }
            ++position;
        }
        const size_t n_chunks = part.cut ? part.cut->chunks().size() : 0;
        for (size_t c = 0; c < n_chunks; ++c, ++chunk) {
            position += answer_.chunks[chunk].n_positions;
            if (answer_.chunks[chunk].expanded || answer_.chunks[chunk].n_positions == 0) continue;
            rows_.push_back(chunks_[chunk]);
            const auto& passage = std::get<PassageSegment>(*part.segment).passage;
            prompt_.row_keys.push_back({passage->key(), static_cast<int64_t>(c)});
        }
        for (int64_t i = 0; i < part.n_rows; ++i) {
            rows_.push_back({p, i});
            prompt_.row_keys.push_back({part.digest, i});
        }
        position += part.n_rows;
    }
}

bool PromptWork::project(Backend& backend, Arena& arena, int64_t budget_rows, int64_t& used_rows) {
    const StageTimer timer(answer_.times.project);
    const int64_t n_rows = std::ssize(rows_);
    const int32_t dim = model_.decoder().config().dim;
    if (n_rows == 0) return true;
    if (prompt_.chunk_rows.bytes() == 0)
        prompt_.chunk_rows = Buffer(backend, static_cast<size_t>(n_rows * dim) * sizeof(float));
    const Tensor all{prompt_.chunk_rows.data(), DType::f32, n_rows, dim};
    const auto is_vector = [&](int64_t row) {
        const Segment& segment = *parts_[rows_[static_cast<size_t>(row)].part].segment;
        return std::holds_alternative<VectorSegment>(segment);
    };
    // The next rows of one kind.
    const bool vectors = is_vector(n_projected_);
    int64_t end = n_projected_ + 1;
    while (end < n_rows && end - n_projected_ < budget_rows && is_vector(end) == vectors) ++end;
    const auto rows =
        std::span(rows_).subspan(static_cast<size_t>(n_projected_), static_cast<size_t>(end - n_projected_));
    const Tensor out = all.row_slice(n_projected_, std::ssize(rows));
    if (vectors) {
        for (int64_t i = 0; i < out.rows; ++i) {
            const RowRef& row = rows[static_cast<size_t>(i)];
            const std::vector<float>& values = std::get<VectorSegment>(*parts_[row.part].segment).values;
            const Tensor to = out.row_slice(i, 1);
            backend.upload(to.data, values.data() + row.index * dim, to.bytes());
        }
    } else {
        const ArenaScope scratch(arena);
        const Tensor chunk_emb = arena.tensor(out.rows, model_.d_enc());
        gather(backend, arena, rows, chunk_emb);
        model_.projector().forward(backend, out, chunk_emb, arena);
    }
    used_rows += out.rows;
    n_projected_ = end;
    if (n_projected_ < n_rows) return false;
    // The passages may be let go of now: nothing that reads them is under way.
    backend.wait();
    backend_ = nullptr;
    return true;
}

void PromptWork::gather(Backend& backend, Arena& arena, std::span<const RowRef> rows, Tensor out) const {
    for (size_t begin = 0; begin < rows.size();) {
        const Part& part = parts_[rows[begin].part];
        size_t end = begin;
        std::vector<int32_t> index;
        while (end < rows.size() && rows[end].part == rows[begin].part)
            index.push_back(static_cast<int32_t>(rows[end++].index));
        const auto n = static_cast<int64_t>(end - begin);
        const Tensor to = out.row_slice(static_cast<int64_t>(begin), n);
        const bool in_a_row = index.back() - index.front() + 1 == n;
        if (part.encoded && in_a_row) {
            backend.copy(to, part.encoded->chunk_emb().row_slice(index.front(), n));
        } else if (part.encoded) {
            backend.gather_rows(to, part.encoded->chunk_emb(), upload_vector(backend, arena, index));
        } else {
            const std::vector<float>& values = std::get<ChunkEmbSegment>(*part.segment).values;
            backend.upload(to.data, values.data() + index.front() * out.cols, to.bytes());
        }
        begin = end;
    }
}

Prompt make_prompt(Backend& backend, const Model& model, std::vector<Segment> segments,
                   const AnswerOptions& options, int64_t max_context, Arena& arena, Answer& answer) {
    PromptWork work(model, std::move(segments), options, max_context, answer);
    int64_t used_rows = 0;
    while (!work.advance(backend, arena, kPrefillRows, used_rows)) {
    }
    return work.take();
}

int64_t most_positions(const Model& model, std::vector<Segment> segments, const AnswerOptions& options) {
    Answer answer;
    PromptWork work(model, std::move(segments), options, 0, answer);
    work.tokenize();
    // With every piece of the template: any passage may be among those that keep rows.
    const auto positions = std::ssize(work.assemble(std::vector<bool>(work.open_.size(), false),
                                                    std::vector<bool>(work.parts_.size(), true))
                                          .source);
    std::vector<int64_t> more;  // positions that expanding an open chunk adds
    for (const size_t chunk : work.open_)
        more.push_back(static_cast<int64_t>(answer.chunks[chunk].n_tokens) -
                       (work.choice_.unexpanded == Unexpanded::compress ? 1 : 0));
    std::sort(more.begin(), more.end(), std::greater<>());
    more.resize(static_cast<size_t>(n_expand(answer.expand_fraction, std::ssize(more))));
    return std::accumulate(more.begin(), more.end(), positions);
}

std::vector<int32_t> token_ids(const Model& model, std::span<const Segment> segments) {
    std::vector<int32_t> ids;
    const auto add = [&](const std::vector<int32_t>& more) {
        ids.insert(ids.end(), more.begin(), more.end());
    };
    for (const Segment& segment : segments) {
        if (const auto* tokens = std::get_if<TokenSegment>(&segment)) {
            add(tokens->ids);
        } else if (const auto* text = std::get_if<TextSegment>(&segment)) {
            add(model.tokenizer().encode_ids(text->text, text->parse_special));
        } else if (const auto* question = std::get_if<QuestionSegment>(&segment)) {
            add(question->ids ? *question->ids : model.tokenizer().encode_ids(question->text));
        } else if (const auto* passage = std::get_if<PassageSegment>(&segment)) {
            for (const Chunk& chunk : passage->passage->cut(model)->chunks()) add(chunk.ids);
        } else {
            fail(Status::usage, "full context: given vectors have no tokens");
        }
    }
    return ids;
}

}  // namespace refrag
