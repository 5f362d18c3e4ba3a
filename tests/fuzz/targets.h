// The fuzz targets: each takes any bytes and holds one reader to its promises. Built twice: with libFuzzer
// (`make fuzz`), where an uncaught exception or a sanitizer's report ends the run, and into the tests, which
// replay tests/fuzz/corpus/. The only exception a reader may throw is refrag::Error with a message fit to
// print; what it accepts must keep the reader's documented promises.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

namespace refrag_fuzz {

// The bytes of a .safetensors file.
void fuzz_safetensors(std::string_view input);
// The bytes of a GGUF file.
void fuzz_gguf(std::string_view input);
// config.json of both networks and refrag.json at once, then after a zero byte generation_config.json.
void fuzz_config(std::string_view input);
// tokenizer.json, then after a zero byte a text for it; without one, the file's own bytes are the text.
void fuzz_tokenizer(std::string_view input);
// vocab.json, merges.txt and what lies beside them, then a text, with zero bytes between.
void fuzz_vocabulary(std::string_view input);
// A passage file.
void fuzz_passages(std::string_view input);
// A request file and, once more, a question file.
void fuzz_requests(std::string_view input);

// ---- for the targets ----------------------------------------------------------------------------

// Throws std::logic_error, which no target catches, unless the promise holds.
void promise(bool holds, const char* what);

// Calls read(), and lets it throw refrag::Error alone, with one printable line that is not empty. False where
// it did.
bool refused(void (*read)(void*), void* context);
template <typename Read>
bool refused(Read&& read) {
    using Body = std::remove_reference_t<Read>;
    return refused([](void* body) { (*static_cast<Body*>(body))(); },
                   const_cast<void*>(static_cast<const void*>(&read)));
}

// A directory in memory (or where temporary files go) that lasts as long as the process; files in it are
// rewritten in place, which is faster than making new ones.
class ScratchDir {
  public:
    ScratchDir();
    ~ScratchDir();
    ScratchDir(const ScratchDir&) = delete;
    ScratchDir& operator=(const ScratchDir&) = delete;
    const std::string& path() const { return path_; }
    std::string file(const char* name) const { return path_ + "/" + name; }
    void write(const char* name, std::string_view bytes) const;
    void remove(const char* name) const;

  private:
    std::string path_;
};

}  // namespace refrag_fuzz
