// --decoder-url and what belongs to it: a decoder that runs elsewhere.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace CLI {
class App;
}  // namespace CLI

namespace refrag {

class RemoteDecoder;

struct DecoderOptions {
    std::string url;  // "": the decoder runs here
    std::string model;
    std::string key_file;
    double silent_seconds = 600.0;
    int64_t max_body_mib = 256;
};

void add_decoder_options(CLI::App& app, DecoderOptions& options);

// Null where no URL was given. Asks it whether it is there. Status::usage in a build without libcurl.
std::shared_ptr<const RemoteDecoder> open_remote_decoder(const DecoderOptions& options);

}  // namespace refrag
