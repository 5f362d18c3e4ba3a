// See choice.h.
#include "refrag/choice.h"

namespace refrag {

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
}

}  // namespace refrag
