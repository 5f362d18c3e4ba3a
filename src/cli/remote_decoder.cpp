// What --decoder-url opens, in a build with libcurl.
#include <memory>
#include <utility>

#include "cli/common.h"
#include "cli/decoder_options.h"
#include "remote/vllm_decoder.h"

namespace refrag {

std::shared_ptr<const RemoteDecoder> open_remote_decoder(const DecoderOptions& options) {
    if (options.url.empty()) return nullptr;
    VllmOptions vllm;
    vllm.url = options.url;
    vllm.model = options.model;
    if (!options.key_file.empty()) vllm.key = read_keys(options.key_file)[0];
    vllm.silent_seconds = options.silent_seconds;
    vllm.max_body_bytes = static_cast<uint64_t>(options.max_body_mib) << 20;
    return std::make_shared<VllmDecoder>(std::move(vllm));
}

}  // namespace refrag
