// What a GGUF file's metadata say of the network, checked. Files of the architecture "llama" are read; every
// key of that architecture that is not known is refused, since it may change the maths.
#pragma once

#include "io/gguf.h"
#include "models/transformer_config.h"

namespace refrag {

// The table of factors that LLaMA 3.1's frequencies are divided by; part of the configuration.
inline constexpr const char* kGgufRopeFactors = "rope_freqs.weight";

// Status::bad_input with file, key, expected, found. eos_ids: the ends of a text, of a turn and of a message,
// as far as the file names them.
DecoderConfig read_gguf_config(const GgufFile& file);

}  // namespace refrag
