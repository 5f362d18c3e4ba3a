// See prompt.h. make_prompt() is the path of a request in the order of the paper's Figure 1.
#include "refrag/prompt.h"

#include "refrag/bm25.h"
#include "refrag/scoring.h"
#include "refrag/timer.h"

namespace refrag {
namespace {

std::vector<int32_t> template_ids(const Tokenizer& tokenizer, const std::string& piece) {
    return piece.empty() ? std::vector<int32_t>{} : tokenizer.encode_ids(piece, /*parse_special=*/true);
}

int32_t chosen_chunk_len(const Model& model, const AnswerOptions& options) {
    return options.chunk_len == 0 ? model.config().chunk_len : options.chunk_len;
}

double chosen_fraction(const Model& model, const AnswerOptions& options) {
    if (options.policy == SelectPolicy::none) return 0.0;
    if (options.policy == SelectPolicy::all) return 1.0;
    return options.expand_fraction.value_or(model.config().expand_fraction);
}

// `conversation`: the question's ids, template and earlier turns included.
DecoderInput assemble(const Model& model, PassageRefs passages, const std::vector<int32_t>& conversation,
                      const std::vector<bool>& expanded) {
    const Tokenizer& tokenizer = model.tokenizer();
    const PromptTemplate& pieces = model.config().prompt;
    DecoderInput input;
    if (model.bos_id()) input.add_token(*model.bos_id());
    input.add_tokens(template_ids(tokenizer, pieces.before));
    if (model.config().order == SegmentOrder::question_first) input.add_tokens(conversation);
    const std::vector<int32_t> prefix = template_ids(tokenizer, pieces.passage_prefix);
    const std::vector<int32_t> suffix = template_ids(tokenizer, pieces.passage_suffix);
    size_t index = 0;
    for (const ContextPassage* passage : passages) {
        input.add_tokens(prefix);
        for (const Chunk& chunk : passage->chunks()) input.add_chunk(chunk, expanded[index++]);
        input.add_tokens(suffix);
    }
    if (model.config().order == SegmentOrder::passages_first) input.add_tokens(conversation);
    return input;
}

// Refuses a prompt that is empty, or that leaves no position for an answer.
void check_fits(const Model& model, const DecoderInput& input, int64_t max_context, const char* at_least) {
    REFRAG_CHECK(!input.source.empty(), Status::usage,
                 "the prompt is empty: no passage, no question, no template");
    REFRAG_CHECK(std::ssize(input.source) < max_context, Status::runtime, "the prompt takes ", at_least,
                 input.source.size(), " decoder positions (", input.plain_tokens,
                 " tokens) and leaves no room for an answer in a context of ", max_context,
                 ": give fewer passages, expand less, or raise -c up to the decoder's window of ",
                 model.decoder().config().max_seq_len);
}

std::vector<float> policy_logits(Backend& backend, const Model& model, PassageRefs passages,
                                 std::string_view question, Arena& arena, Answer& answer) {
    {
        const StageTimer timer(answer.times.encode);
        encode_chunks(backend, model, passages, {}, arena);
    }
    const StageTimer timer(answer.times.sense);
    const ArenaScope scratch(arena);
    const Tensor chunk_emb = arena.tensor(std::ssize(answer.chunks), model.d_enc());
    std::vector<float> host;
    host.reserve(static_cast<size_t>(chunk_emb.size()));
    for (const ContextPassage* passage : passages) {
        for (size_t c = 0; c < passage->chunks().size(); ++c) {
            const std::span<const float> c_i = passage->embedding(c);
            host.insert(host.end(), c_i.begin(), c_i.end());
        }
    }
    if (!host.empty()) backend.upload(chunk_emb.data, host.data(), chunk_emb.bytes());
    Tensor question_emb;
    if (model.policy().config().sees_question) {
        const std::vector<Token> tokens = model.tokenizer().encode(question);
        std::vector<std::vector<int32_t>> pieces;
        for (Chunk& piece : cut_chunks(question, tokens, answer.chunk_len, model.encoder_vocabulary())) {
            pieces.push_back(std::move(piece.encoder_ids));
        }
        question_emb = arena.tensor(std::ssize(pieces), model.d_enc());
        model.encoder().encode(backend, pieces, question_emb, arena);
    }
    return model.policy().logits(backend, chunk_emb, question_emb, arena);
}

// Of every chunk, by the words of the question.
std::vector<float> word_scores(PassageRefs passages, std::string_view question) {
    std::vector<std::string> contents;  // what the chunks' spans are of
    for (const ContextPassage* passage : passages) contents.push_back(passage->passage().content());
    std::vector<ChunkedText> texts;
    for (size_t p = 0; p < passages.size(); ++p) {
        ChunkedText& text = texts.emplace_back();
        text.text = contents[p];
        for (const Chunk& chunk : passages[p]->chunks()) text.chunk_ends.push_back(chunk.end);
    }
    return bm25_scores(texts, question);
}

std::vector<bool> sense(Backend& backend, const Model& model, PassageRefs passages, std::string_view question,
                        const AnswerOptions& options, Arena& arena, Answer& answer) {
    const int64_t n_chunks = std::ssize(answer.chunks);
    const int64_t wanted = n_expand(answer.expand_fraction, n_chunks);
    const bool known = wanted == 0 || wanted == n_chunks;
    std::vector<float> scores;
    switch (options.policy) {
        case SelectPolicy::model:
            if (!known || options.want_logits)
                scores = policy_logits(backend, model, passages, question, arena, answer);
            break;
        case SelectPolicy::perplexity_asc:
        case SelectPolicy::perplexity_desc:
            if (!known || options.want_logits) {
                const StageTimer timer(answer.times.sense);
                std::vector<std::vector<int32_t>> ids;
                for (const ContextPassage* passage : passages) {
                    for (const Chunk& chunk : passage->chunks()) ids.push_back(chunk.ids);
                }
                scores = mean_nll_alone(backend, model, ids, arena);
            }
            break;
        case SelectPolicy::bm25:
            if (!known || options.want_logits) {
                const StageTimer timer(answer.times.sense);
                scores = word_scores(passages, question);
            }
            break;
        case SelectPolicy::none:
        case SelectPolicy::all:
        case SelectPolicy::random:
        case SelectPolicy::recent:
            break;
    }
    const StageTimer timer(answer.times.sense);
    for (size_t i = 0; i < scores.size(); ++i) answer.chunks[i].logit = scores[i];
    return select_chunks(options.policy, scores, n_chunks, wanted, options.sampler.seed);
}

// The projected chunks that stay compressed, [slot_chunk.size(), dim].
Buffer project(Backend& backend, const Model& model, PassageRefs passages,
               const std::vector<int32_t>& slot_chunk, Arena& arena) {
    const int32_t dim = model.decoder().config().dim;
    Tensor slots{nullptr, DType::f32, std::ssize(slot_chunk), dim};
    if (slot_chunk.empty()) return {};
    Buffer memory(backend, slots.bytes());
    slots.data = memory.data();
    std::vector<std::span<const float>> embeddings;  // of all chunks, null where none was needed
    for (const ContextPassage* passage : passages) {
        for (size_t c = 0; c < passage->chunks().size(); ++c) {
            embeddings.push_back(passage->has_embedding(c) ? passage->embedding(c)
                                                           : std::span<const float>{});
        }
    }
    std::vector<float> host;
    for (const int32_t chunk : slot_chunk) {
        const std::span<const float> c_i = embeddings[static_cast<size_t>(chunk)];
        host.insert(host.end(), c_i.begin(), c_i.end());
    }
    const ArenaScope scratch(arena);
    const Tensor chunk_emb = arena.tensor(slots.rows, model.d_enc());
    backend.upload(chunk_emb.data, host.data(), chunk_emb.bytes());
    model.projector().forward(backend, slots, chunk_emb, arena);
    return memory;
}

}  // namespace

std::vector<int32_t> conversation_ids(const Model& model, std::span<const Turn> history,
                                      std::string_view question) {
    const Tokenizer& tokenizer = model.tokenizer();
    const std::vector<int32_t> prefix = template_ids(tokenizer, model.config().prompt.question_prefix);
    const std::vector<int32_t> suffix = template_ids(tokenizer, model.config().prompt.question_suffix);
    std::vector<int32_t> ids;
    const auto add = [&](const std::vector<int32_t>& segment) {
        ids.insert(ids.end(), segment.begin(), segment.end());
    };
    const auto add_question = [&](std::string_view text) {
        add(prefix);
        add(tokenizer.encode_ids(text));
        add(suffix);
    };
    for (const Turn& turn : history) {
        add_question(turn.question);
        add(tokenizer.encode_ids(" " + turn.answer));
        ids.push_back(model.end_id());
    }
    add_question(question);
    return ids;
}

Prompt make_prompt(Backend& backend, const Model& model, PassageRefs passages, std::string_view question,
                   const AnswerOptions& options, int64_t max_context, Arena& arena, Answer& answer,
                   std::span<const Turn> history) {
    answer.chunk_len = chosen_chunk_len(model, options);
    answer.expand_fraction = chosen_fraction(model, options);
    std::vector<int32_t> conversation;
    {
        const StageTimer timer(answer.times.tokenize);
        conversation = conversation_ids(model, history, question);
        for (size_t p = 0; p < passages.size(); ++p) {
            passages[p]->tokenize(model, answer.chunk_len);
            for (size_t c = 0; c < passages[p]->chunks().size(); ++c) {
                const Chunk& chunk = passages[p]->chunks()[c];
                ChunkReport report;
                report.passage = p;
                report.begin = chunk.begin;
                report.end = chunk.end;
                report.n_tokens = chunk.ids.size();
                report.cached = passages[p]->has_embedding(c);
                answer.n_cached += report.cached ? 1 : 0;
                answer.chunks.push_back(report);
            }
        }
    }

    // What cannot fit is refused before the encoder works for nothing: with the fewest positions it can take.
    {
        const StageTimer timer(answer.times.prefill);
        const bool everything = answer.expand_fraction == 1.0;
        const std::vector<bool> fewest(answer.chunks.size(), everything);
        check_fits(model, assemble(model, passages, conversation, fewest), max_context,
                   everything ? "" : "at least ");
    }

    const ArenaScope scratch(arena);
    const std::vector<bool> expanded = sense(backend, model, passages, question, options, arena, answer);
    {
        // After a choice that needs no embeddings, only what stays compressed is encoded.
        const StageTimer timer(answer.times.encode);
        std::vector<bool> compressed(expanded);
        compressed.flip();
        if (!compressed.empty()) encode_chunks(backend, model, passages, compressed, arena);
    }

    Prompt prompt;
    {
        const StageTimer timer(answer.times.prefill);
        prompt.input = assemble(model, passages, conversation, expanded);
    }
    for (size_t i = 0; i < answer.chunks.size(); ++i) {
        answer.chunks[i].expanded = expanded[i];
        answer.chunks[i].position = prompt.input.chunk_position[i];
        answer.chunks[i].slots = prompt.input.chunk_rows[i];
        answer.n_expanded += expanded[i] ? 1 : 0;
    }
    answer.positions = prompt.input.source.size();
    answer.plain_tokens = prompt.input.plain_tokens;
    check_fits(model, prompt.input, max_context, "");
    {
        const StageTimer timer(answer.times.project);
        prompt.slots = project(backend, model, passages, prompt.input.slot_chunk, arena);
    }
    return prompt;
}

int64_t most_positions(const Model& model, PassageRefs passages, std::string_view question,
                       const AnswerOptions& options, std::span<const Turn> history) {
    const int32_t k = chosen_chunk_len(model, options);
    int64_t n_chunks = 0;
    int64_t chunk_tokens = 0;
    for (ContextPassage* passage : passages) {
        passage->tokenize(model, k);
        n_chunks += std::ssize(passage->chunks());
        chunk_tokens += static_cast<int64_t>(passage->n_tokens());
    }
    const std::vector<bool> none(static_cast<size_t>(n_chunks), false);
    const DecoderInput input = assemble(model, passages, conversation_ids(model, history, question), none);
    // Every expanded chunk may be a full one, but all together are no more than the tokens there are.
    const int64_t expanded = n_expand(chosen_fraction(model, options), n_chunks);
    const int64_t compressed = std::ssize(input.source);
    return std::min(compressed + expanded * (k - 1), compressed - n_chunks + chunk_tokens);
}

}  // namespace refrag
