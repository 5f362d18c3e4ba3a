// See session.h.
#include "refrag/session.h"

#include <utility>

namespace refrag {

Session::Session(const Model& model, int64_t max_context, std::shared_ptr<PassageCache> cache)
    : Session(model, EngineOptions{.n_slots = 1, .max_context = max_context}, std::move(cache)) {}

Session::Session(const Model& model, EngineOptions options, std::shared_ptr<PassageCache> cache)
    : model_(model), cache_(cache ? std::move(cache) : std::make_shared<PassageCache>()), engine_(model, [&] {
          options.n_slots = 1;
          return options;
      }()) {}

Answer Session::answer(std::span<const Passage> passages, std::string_view question,
                       const AnswerOptions& options, const TextSink& sink, std::span<const Turn> history) {
    check_answer_options(options);
    const auto shared = share_passages(model_, passages, *cache_, options.chunk_len);
    return answer(make_segments(model_, history, shared, question, options.chunk_len), options, sink);
}

Answer Session::answer(std::vector<Segment> segments, const AnswerOptions& options, const TextSink& sink) {
    return *answer(std::move(segments), options, sink, AnswerLimits{});
}

std::optional<Answer> Session::answer(std::vector<Segment> segments, const AnswerOptions& options,
                                      const TextSink& sink, const AnswerLimits& limits) {
    // Whatever is thrown, the engine is empty afterwards.
    struct Leave {
        Engine& engine;
        uint64_t id;
        ~Leave() {
            engine.cancel(id);
            engine.take_finished();
        }
    };
    Request request;
    request.segments = std::move(segments);
    request.options = options;
    request.sink = sink;
    request.deadline = limits.deadline;
    const Leave leave{engine_, engine_.submit(std::move(request))};
    while (!engine_.idle()) {
        if (limits.keep_going && !limits.keep_going()) return std::nullopt;
        engine_.step();
    }
    Result result = std::move(engine_.take_finished().at(0));
    if (result.error) throw Error(*result.error);
    return std::move(result.answer);
}

}  // namespace refrag
