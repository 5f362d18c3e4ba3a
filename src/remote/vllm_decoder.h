// vLLM as the decoder: its completions API, with a prompt's rows as "prompt_embeds" (it runs with
// --enable-prompt-embeds) and its tokens' ids coming back as they are drawn ("return_token_ids", vLLM 0.10.2
// and later). One server stands for whatever runs behind it: tensor and pipeline parallelism, several
// machines.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "refrag/remote_decoder.h"
#include "remote/http_client.h"

namespace refrag {

struct VllmOptions {
    std::string url = {};    // of the API: http://host:8000/v1
    std::string model = {};  // its name there; "": the only one
    std::string key = {};    // "": none
    double silent_seconds = 600.0;
    uint64_t max_body_bytes = uint64_t{256} << 20;  // of a request
};

class VllmDecoder final : public RemoteDecoder {
  public:
    // Asks the server for its models. Status::usage for a URL that is none, or where the model is not there,
    // naming those that are; Status::unavailable where the server does not answer.
    explicit VllmDecoder(VllmOptions options);

    std::string name() const override { return options_.model + " at " + options_.url; }
    int64_t max_context() const override { return max_context_; }
    std::unique_ptr<RemoteAnswers> open() const override;

  private:
    VllmOptions options_;
    int64_t max_context_ = 0;
};

}  // namespace refrag
