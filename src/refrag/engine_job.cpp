// See engine_job.h.
#include "refrag/engine_job.h"

#include <algorithm>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "refrag/timer.h"

namespace refrag {

Error error_from(const std::exception_ptr& thrown) {
    try {
        try {
            std::rethrow_exception(thrown);
        } catch (const Error& error) {
            return error;
        } catch (const std::bad_alloc&) {
            throw;
        } catch (const std::exception& error) {
            return Error(Status::runtime, error.what());
        }
    } catch (const std::bad_alloc&) {
        return Error(Status::out_of_memory, "out of memory");
    } catch (...) {
        return Error(Status::runtime, "unknown error");
    }
}

EngineJob::EngineJob(const Model& model, uint64_t id_, Request&& from, double submitted_ms,
                     int64_t max_context, int64_t& n_generated)
    : id(id_),
      request(std::move(from)),
      model_(model),
      sampler_(request.options.sampler,
               request.options.ignore_eos ? model.end_ids() : std::span<const int32_t>{}),
      stream_(model.tokenizer(), /*skip_special_tokens=*/true, request.options.continues_text),
      stops_(request.options.stop),
      n_generated_(n_generated),
      at_start_(!request.options.continues_text),
      started_ms_(now_ms()) {
    answer.times.queue = started_ms_ - submitted_ms;
    work = std::make_unique<PromptWork>(model, std::move(request.segments), request.options, max_context,
                                        answer);
}

void EngineJob::list_positions(const Prompt& prompt) {
    if (!request.options.prompt_logprobs) return;
    answer.scores.resize(answer.positions);
    const std::vector<int32_t>& source = prompt.input.source;
    for (size_t i = 0; i < answer.scores.size(); ++i) {
        answer.scores[i].position = static_cast<int64_t>(i);
        if (i < source.size() && source[i] >= 0) answer.scores[i].id = source[i];
    }
    // The last token of a prompt that nothing follows is predicted, not read.
    for (const ScoredRow& score : prompt.scores)
        answer.scores[static_cast<size_t>(score.row) + 1].id = score.target;
}

void EngineJob::make_start(bool name_rows) {
    Prompt prompt = work->take();
    work.reset();
    const std::vector<int32_t>& source = prompt.input.source;
    std::vector<int32_t> said;
    for (const int32_t row : source) {
        if (row >= 0) said.push_back(row);
    }
    sampler_.read_prompt(said);
    if (name_rows) {
        start.names.reserve(source.size());
        for (const int32_t row : source) {
            const auto chunk_row = static_cast<size_t>(-1 - row);
            start.names.push_back(
                row >= 0 ? token_row_name(row)
                         : chunk_row_name(prompt.row_keys[chunk_row].of, prompt.row_keys[chunk_row].index));
        }
    }
    list_positions(prompt);
    const AnswerOptions& options = request.options;
    start.source = std::move(prompt.input.source);
    start.chunk_rows = std::move(prompt.chunk_rows);
    start.max_new = options.max_new_tokens;
    start.next = [this](const Logits& logits, double logits_ms) { return next(logits, logits_ms); };
    start.n_logits = options.logprobs ? 0 : sampler_.needed();
    start.draw = [this]() -> std::optional<TokenDraw> {
        if (request.options.logprobs) return std::nullopt;
        return sampler_.draw_elsewhere();
    };
    start.drawing = {options.sampler, std::vector<int32_t>(model_.end_ids().begin(), model_.end_ids().end()),
                     options.ignore_eos, options.logprobs};
    start.scores = std::move(prompt.scores);
    start.n_top = options.prompt_logprobs.value_or(0);
    // Room for the answer: a step that generates asks for no memory, but for penalties, log-probabilities and
    // what is longer than this.
    constexpr int32_t kTokens = 4096, kBytesOfToken = 16, kBytesOfPiece = 256;
    const int32_t most = options.max_new_tokens;
    const auto n_tokens = static_cast<size_t>(most < 0 ? kTokens : std::min(most, kTokens));
    answer.ids.reserve(n_tokens);
    answer.text.reserve(n_tokens * kBytesOfToken);
    piece_.reserve(kBytesOfPiece);
    decided_.reserve(kBytesOfPiece);
    start.scored = [this](const ScoredRow& row, TokenLogprobs&& logprobs) {
        take_score(row, std::move(logprobs));
    };
    prompted_ms_ = now_ms();
}

void EngineJob::take_score(const ScoredRow& row, TokenLogprobs&& logprobs) {
    if (request.options.prompt_logprobs) {
        answer.scores[static_cast<size_t>(row.row) + 1].logprobs = std::move(logprobs);
    } else {
        answer.scores.push_back({row.row + 1, row.target, std::move(logprobs)});
    }
}

std::optional<int32_t> EngineJob::next(const Logits& logits, double logits_ms) {
    const double sampling_ms = now_ms();
    const int32_t token = sampler_.sample(logits);
    if (first_token_ms_ == 0.0) {
        first_token_ms_ = now_ms();
        answer.times.sample = logits_ms + first_token_ms_ - sampling_ms;
        answer.times.prefill += sampling_ms - logits_ms - prompted_ms_;
        answer.ttft_ms = first_token_ms_ - started_ms_;
    }
    ++n_generated_;
    if (model_.is_end(token)) {
        answer.finish = FinishReason::end_token;
        return std::nullopt;
    }
    if (request.options.logprobs) {
        answer.logprobs.push_back(logits.told != nullptr
                                      ? *logits.told
                                      : token_logprobs(logits.values, token, *request.options.logprobs));
    }
    answer.ids.push_back(token);
    piece_.clear();
    stream_.push(token, piece_);
    say();
    if (stops_.found() || stopped_ || cancelled) return std::nullopt;
    if (std::ssize(answer.ids) == request.options.max_new_tokens) {
        answer.finish = FinishReason::max_tokens;
        return std::nullopt;
    }
    return token;
}

void EngineJob::end(std::optional<FinishReason> reason) {
    if (reason) answer.finish = *reason;
    if (!stopped_) {
        piece_ = stream_.flush();
        say();
        if (!stops_.found()) emit(stops_.flush());
    }
    if (stopped_) {
        answer.finish = FinishReason::cancelled;
    } else if (stops_.found()) {
        answer.finish = FinishReason::stop_string;
        answer.stop = stops_.found();
    }
    if (first_token_ms_ == 0.0) {
        if (prompted_ms_ != 0.0) answer.times.prefill += now_ms() - prompted_ms_;
        return;
    }
    answer.times.decode = now_ms() - first_token_ms_;
    // The end token was generated too; the first token's time is TTFT.
    const bool ended = answer.finish == FinishReason::end_token;
    const double further = static_cast<double>(answer.ids.size()) - (ended ? 0.0 : 1.0);
    if (further > 0.0 && answer.times.decode > 0.0)
        answer.tokens_per_s = further * 1000.0 / answer.times.decode;
}

void EngineJob::say() {
    // Answers are trained with a space before them. It is no text, so a stop string never meets it.
    if (at_start_ && !piece_.empty()) {
        at_start_ = false;
        if (piece_[0] == ' ') piece_.erase(0, 1);
    }
    decided_.clear();
    stops_.push(piece_, decided_);
    emit(decided_);
}

void EngineJob::emit(const std::string& piece) {
    if (piece.empty() || cancelled) return;
    answer.text += piece;
    if (request.sink && !request.sink(piece)) stopped_ = true;
    if (request.progress && !request.progress(piece, answer)) stopped_ = true;
}

}  // namespace refrag
