// What stands for --decoder-url in a build without libcurl.
#include "base/check.h"
#include "cli/decoder_options.h"
#include "refrag/remote_decoder.h"

namespace refrag {

std::shared_ptr<const RemoteDecoder> open_remote_decoder(const DecoderOptions& options) {
    REFRAG_CHECK(options.url.empty(), Status::usage,
                 "--decoder-url: this refrag was built without libcurl: install libcurl4-openssl-dev and "
                 "build again");
    return nullptr;
}

}  // namespace refrag
