// See choice.h.
#include "refrag/choice.h"

#include "refrag/remote_decoder.h"

namespace refrag {

bool reads_chunks_alone(SelectPolicy policy) {
    return policy == SelectPolicy::perplexity_asc || policy == SelectPolicy::perplexity_desc;
}

Choice choice_of(const Model& model, const AnswerOptions& options) {
    Choice choice;
    choice.policy = options.policy.value_or(model.default_policy());
    choice.unexpanded = options.unexpanded.value_or(model.default_unexpanded());
    choice.expand_fraction = options.expand_fraction.value_or(model.config().expand_fraction);
    if (choice.policy == SelectPolicy::none) choice.expand_fraction = 0.0;
    if (choice.policy == SelectPolicy::all) choice.expand_fraction = 1.0;
    choice.chunk_len = options.chunk_len == 0 ? model.config().chunk_len : options.chunk_len;
    return choice;
}

void check_model_can(const Model& model, const AnswerOptions& options) {
    const Choice choice = choice_of(model, options);
    const double p = choice.expand_fraction;
    const bool compresses = choice.unexpanded == Unexpanded::compress && p < 1.0;
    const bool asks_network =
        choice.policy == SelectPolicy::model && ((p > 0.0 && p < 1.0) || options.want_logits);
    if (compresses || asks_network) model.require_encoder();
    if (model.remote_decoder() == nullptr) return;
    const auto refuse = [&](const char* what) {
        fail(Status::usage, what, ": the decoder runs elsewhere (", model.remote_decoder()->name(),
             ") and cannot do this");
    };
    if (reads_chunks_alone(choice.policy) && p > 0.0 && p < 1.0) refuse("--policy perplexity-asc and -desc");
    if (options.prompt_logprobs) refuse("log-probabilities of the prompt");
    const SamplerOptions& sampler = options.sampler;
    const bool window = sampler.repeat_last_n != -1 &&
                        (sampler.presence_penalty != 0.0f || sampler.frequency_penalty != 0.0f);
    // It counts what was generated, and knows no tokens in a prompt of vectors.
    if (sampler.repetition_penalty != 1.0f) refuse("--repeat-penalty");
    if (window) refuse("--repeat-last-n");
}

}  // namespace refrag
