// See session.h.
#include "refrag/session.h"

namespace refrag {

Session::Session(const Model& model, int64_t max_context) : engine_(model, 1, max_context) {}

Answer Session::answer(std::span<ContextPassage> passages, std::string_view question,
                       const AnswerOptions& options, const TextSink& sink, std::span<const Turn> history) {
    Request request;
    for (ContextPassage& passage : passages) {
        // The caller owns them and waits for the answer.
        request.passages.emplace_back(std::shared_ptr<void>(), &passage);
    }
    request.history.assign(history.begin(), history.end());
    request.question = question;
    request.options = options;
    request.sink = sink;
    // Whatever is thrown, the engine is empty afterwards.
    struct Leave {
        Engine& engine;
        uint64_t id;
        ~Leave() {
            engine.cancel(id);
            engine.take_finished();
        }
    };
    const Leave leave{engine_, engine_.submit(std::move(request))};
    while (!engine_.idle()) engine_.step();
    Result result = std::move(engine_.take_finished().at(0));
    if (result.error) throw Error(result.error->status(), result.error->message());
    return std::move(result.answer);
}

}  // namespace refrag
