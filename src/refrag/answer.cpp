// See answer.h.
#include "refrag/answer.h"

#include <utility>

#include "base/check.h"
#include "refrag/stop.h"

namespace refrag {

const char* finish_reason_name(FinishReason reason) {
    switch (reason) {
        case FinishReason::end_token:
            return "end";
        case FinishReason::stop_string:
            return "stop";
        case FinishReason::max_tokens:
            return "length";
        case FinishReason::context_full:
            return "context";
        case FinishReason::cancelled:
            return "cancelled";
        case FinishReason::deadline:
            return "deadline";
    }
    return "?";
}

void check_answer_options(const AnswerOptions& options) {
    check_sampler_options(options.sampler);
    check_stop_strings(options.stop);
    REFRAG_CHECK(options.max_new_tokens >= -1, Status::usage,
                 "tokens to generate: expected 0 or more, or -1 for no limit, found ",
                 options.max_new_tokens);
    for (const auto& [what, wanted] :
         {std::pair("logprobs", options.logprobs), {"logprobs of the prompt", options.prompt_logprobs}}) {
        const int32_t n_top = wanted.value_or(0);
        REFRAG_CHECK(n_top >= 0 && n_top <= max_top_logprobs, Status::usage, what, ": expected 0 to ",
                     max_top_logprobs, " alternatives, found ", n_top);
    }
}

}  // namespace refrag
