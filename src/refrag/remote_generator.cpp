// See remote_generator.h.
#include "refrag/remote_generator.h"

#include <algorithm>
#include <utility>

#include "base/dtype.h"
#include "refrag/generator.h"
#include "refrag/model.h"

namespace refrag {
namespace {

std::vector<uint16_t> rounded(const std::vector<float>& values) {
    std::vector<uint16_t> out(values.size());
    std::transform(values.begin(), values.end(), out.begin(), f32_to_bf16);
    return out;
}

}  // namespace

RemoteGenerator::RemoteGenerator(Backend& backend, const Llama& decoder, const RemoteDecoder& remote,
                                 int32_t n_slots, int64_t max_context)
    : backend_(backend),
      decoder_(decoder),
      max_context_(max_context),
      arena_(backend),
      answers_(remote.open()),
      sequences_(static_cast<size_t>(n_slots)) {}

bool RemoteGenerator::can_hold(int64_t n_rows, int64_t max_new) const {
    return n_rows + (max_new == 0 ? 0 : 1) <= max_context_;
}

RemotePrompt RemoteGenerator::prompt_of(const Start& start) {
    RemotePrompt prompt;
    prompt.n_rows = std::ssize(start.source);
    prompt.dim = decoder_.config().dim;
    prompt.drawing = start.drawing;
    const bool tokens_alone =
        std::all_of(start.source.begin(), start.source.end(), [](int32_t row) { return row >= 0; });
    if (tokens_alone) {
        prompt.ids = start.source;
        return prompt;
    }
    const ArenaScope scratch(arena_);
    Tensor chunk_rows;
    if (start.chunk_rows.bytes() > 0) {
        const auto n = static_cast<int64_t>(start.chunk_rows.bytes() / sizeof(float)) / prompt.dim;
        chunk_rows = {start.chunk_rows.data(), DType::f32, n, prompt.dim};
    }
    const Tensor rows = decoder_.embed(backend_, start.source, chunk_rows, arena_);
    std::vector<float> values(static_cast<size_t>(prompt.n_rows * prompt.dim));
    backend_.download(values.data(), rows.data, rows.bytes());
    prompt.rows = rounded(values);
    return prompt;
}

std::optional<int32_t> RemoteGenerator::start(Start& start) {
    REFRAG_CHECK(start.scores.empty(), Status::usage,
                 "log-probabilities of a prompt's tokens: not with a decoder that runs elsewhere");
    const auto free = std::find_if(sequences_.begin(), sequences_.end(),
                                   [](const Sequence& sequence) { return !sequence.next; });
    if (free == sequences_.end()) return std::nullopt;
    const int64_t room = max_context_ - std::ssize(start.source);
    Sequence sequence;
    sequence.ticket = next_ticket_++;
    sequence.limited = start.max_new >= 0 && start.max_new <= room;
    sequence.n_left = sequence.limited ? start.max_new : room;
    sequence.end_ids = start.drawing.end_ids;
    sequence.asked = sequence.n_left > 0;
    if (sequence.asked) {
        RemotePrompt prompt = prompt_of(start);
        prompt.max_new = sequence.n_left;
        answers_->start(sequence.ticket, prompt);
    }
    sequence.next = std::move(start.next);
    start.chunk_rows = Buffer();
    *free = std::move(sequence);
    ++n_running_;
    ++counts_.prompts;
    return static_cast<int32_t>(free - sequences_.begin());
}

void RemoteGenerator::stop(int32_t slot) noexcept {
    Sequence& sequence = sequences_[static_cast<size_t>(slot)];
    if (!sequence.next) return;
    answers_->stop(sequence.ticket);
    sequence = Sequence();
    --n_running_;
}

size_t RemoteGenerator::n_generating() const {
    return static_cast<size_t>(std::count_if(sequences_.begin(), sequences_.end(),
                                             [](const Sequence& s) { return s.next && s.generating; }));
}

bool RemoteGenerator::hear(Sequence& sequence, Ended& ended) {
    if (!sequence.asked) return true;
    RemoteNews news = answers_->take(sequence.ticket);
    for (const RemoteToken& token : news.tokens) {
        Logits logits;
        logits.drawn = token.id;
        if (token.logprobs) logits.told = &*token.logprobs;
        const int32_t vocab_size = decoder_.config().vocab_size;
        REFRAG_CHECK(token.id < vocab_size, Status::unavailable, "the decoder elsewhere drew token ",
                     token.id, ": expected one of 0 to ", vocab_size - 1, ", as in this model's vocabulary");
        sequence.generating = true;
        --sequence.n_left;
        if (!sequence.next(logits, 0.0)) return true;
    }
    if (news.error) throw Error(*news.error);
    if (!news.ended && sequence.n_left > 0) return false;
    if (news.at_end && !sequence.end_ids.empty()) {
        Logits logits;
        logits.drawn = sequence.end_ids[0];
        sequence.next(logits, 0.0);
    } else {
        ended.context_full = !sequence.limited;
    }
    return true;
}

void RemoteGenerator::wait(std::chrono::milliseconds most) {
    try {
        answers_->wait(most);
    } catch (const Error&) {
        failure_ = std::current_exception();
    }
}

const std::vector<SequenceRunner::Ended>& RemoteGenerator::step(int64_t /*max_rows*/) {
    ended_.clear();
    ended_.reserve(sequences_.size());
    wait(std::chrono::milliseconds(0));
    const std::exception_ptr failure = std::exchange(failure_, nullptr);
    for (size_t slot = 0; slot < sequences_.size(); ++slot) {
        if (!sequences_[slot].next) continue;
        Ended ended{static_cast<int32_t>(slot), false, nullptr};
        bool over = true;
        try {
            if (failure) std::rethrow_exception(failure);
            over = hear(sequences_[slot], ended);
        } catch (...) {
            ended.error = std::current_exception();
        }
        if (!over) continue;
        stop(ended.slot);
        ended_.push_back(std::move(ended));
    }
    return ended_;
}

std::optional<std::string> check_remote_decoder(const Model& model) {
    const std::unique_ptr<Backend> backend = model.device().make_backend();
    RemoteGenerator generator(*backend, model.decoder(), *model.remote_decoder(), 1,
                              model.remote_decoder()->max_context());
    std::vector<int32_t> ids = model.tokenizer().encode_ids("The sun rises in the east and sets in the");
    ids.insert(ids.begin(), model.first_id());
    std::vector<float> values;  // of the first token, which so becomes a chunk's row
    {
        Arena arena(*backend);
        const Tensor row = model.decoder().embed(*backend, {ids[0]}, Tensor{}, arena);
        values.resize(static_cast<size_t>(row.cols));
        backend->download(values.data(), row.data, row.bytes());
    }
    const auto token_after = [&](bool as_vectors) {
        std::optional<int32_t> found;
        SequenceRunner::Start start;
        start.source = ids;
        if (as_vectors) {
            start.source[0] = -1;
            start.chunk_rows = Buffer(*backend, values.size() * sizeof(float));
            backend->upload(start.chunk_rows.data(), values.data(), values.size() * sizeof(float));
        }
        start.max_new = 1;
        start.next = [&](const Logits& logits, double) -> std::optional<int32_t> {
            found = logits.drawn;
            return std::nullopt;
        };
        generator.start(start);
        while (generator.n_running() > 0) {
            generator.wait(std::chrono::milliseconds(50));
            for (const SequenceRunner::Ended& ended : generator.step(1)) {
                if (ended.error) std::rethrow_exception(ended.error);
            }
        }
        return found;
    };
    if (token_after(false) == token_after(true)) return std::nullopt;
    return model.remote_decoder()->name() +
           ": goes on differently from the same tokens as ids and as vectors: is it the decoder of this "
           "model?";
}

}  // namespace refrag
