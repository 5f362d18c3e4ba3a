// A model directory as a whole: an encoder with its own vocabulary, and directories whose parts do not fit
// together.
#include <doctest/doctest.h>

#include <filesystem>

#include "golden.h"
#include "io/file.h"
#include "refrag/session.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::error_of;
using refrag_test::TempDir;

namespace {

// A copy of the tiny model that a test may change.
class ModelCopy {
  public:
    ModelCopy() {
        std::filesystem::copy(refrag_test::tiny_refrag_path(), path(),
                              std::filesystem::copy_options::recursive);
    }
    std::string path() const { return dir_.file("model"); }
    void replace(const std::string& file, const std::string& from, const std::string& to) const {
        const std::string name = path() + "/" + file;
        std::string text = read_file(name, 1 << 24);
        const size_t at = text.find(from);
        REQUIRE(at != std::string::npos);
        text.replace(at, from.size(), to);
        write_file_atomic(name, text);
    }
    std::string load_error() const {
        return error_of([&] { const Model model(refrag_test::cpu().device(), path()); });
    }

  private:
    TempDir dir_;
};

}  // namespace

TEST_CASE("an encoder with its own vocabulary reads each chunk's text through its own tokenizer") {
    const ModelCopy copy;
    copy.replace("refrag.json", "\"vocabulary\":\"shared\"", "\"vocabulary\":\"own\"");
    // Another vocabulary than the decoder's: the same but for its last merge, so some texts split
    // differently.
    const std::string file = "/encoder/tokenizer.json";
    const Json tokenizer = Json::parse_file(copy.path() + file);
    const Json merges = tokenizer.get_object("model").get_array("merges");
    const std::string first_merge = merges.at(0).is_string()
                                        ? json_quote(merges.at(0).as_string())
                                        : "[" + json_quote(merges.at(0).at(0).as_string()) + "," +
                                              json_quote(merges.at(0).at(1).as_string()) + "]";
    copy.replace("encoder/tokenizer.json", first_merge + ",", "");
    const Model model(refrag_test::cpu().device(), copy.path());
    REQUIRE(model.encoder_vocabulary().own != nullptr);

    Passage passage{"a", "",
                    "Rivers and hills: the caf\xc3\xa9 at the old mill, then the sea and the islands."};
    const std::vector<Passage> passages{passage};
    const CutPassage cut(model, passage.content(), model.config().chunk_len);
    bool differs = false;
    std::string text;
    for (const Chunk& chunk : cut.chunks()) {
        const std::vector<int32_t> inner(chunk.encoder_ids.begin() + 1, chunk.encoder_ids.end() - 1);
        text += model.encoder_vocabulary().own->decode(inner, false);
        differs = differs || inner != chunk.ids;
    }
    CHECK(text == passage.text);
    CHECK(differs);
    Session session(model);
    AnswerOptions options;
    options.max_new_tokens = 4;
    const Answer answer = session.answer(passages, "Where?", options);
    CHECK(answer.n_expanded == static_cast<size_t>(n_expand(0.25, std::ssize(answer.chunks))));
}

TEST_CASE("a model directory whose parts do not fit is refused by name") {
    {
        const ModelCopy copy;  // "shared", but another tokenizer
        copy.replace("encoder/tokenizer.json", "{", "{ ");
        CHECK(contains(copy.load_error(), "expected the same file as the decoder's"));
    }
    {
        const ModelCopy copy;  // chunks longer than the encoder can read
        copy.replace("refrag.json", "\"chunk_len\":8,\"chunk_lens\":[4,8]",
                     "\"chunk_len\":4000,\"chunk_lens\":[4000]");
        CHECK(contains(copy.load_error(), "chunk_len 4000 needs 4002 encoder positions"));
    }
    {
        const ModelCopy copy;  // no end token anywhere
        copy.replace("decoder/config.json", "\"eos_token_id\":2", "\"eos_token_id\":null");
        std::filesystem::remove(copy.path() + "/decoder/generation_config.json");
        // tokenizer_config.json's is the last resort.
        CHECK(copy.load_error() == "(no error)");
        copy.replace("decoder/tokenizer_config.json", "\"eos_token\":\"</s>\"", "\"eos_token\":null");
        CHECK(contains(copy.load_error(), "eos_token_id"));
        CHECK(contains(copy.load_error(), "tokenizer_config.json has no eos_token"));
    }
    for (const char* file : {"refrag.json", "projector.safetensors", "policy.safetensors",
                             "decoder/tokenizer.json", "decoder/model.safetensors", "encoder/config.json"}) {
        CAPTURE(file);
        const ModelCopy copy;
        std::filesystem::remove(copy.path() + "/" + file);
        const std::string message = copy.load_error();
        CHECK(contains(message, copy.path()));
        CHECK(message != "(no error)");
        CHECK(message.find('\n') == std::string::npos);
    }
    {
        const ModelCopy copy;  // heads of another model
        std::filesystem::copy_file(copy.path() + "/policy.safetensors",
                                   copy.path() + "/projector.safetensors",
                                   std::filesystem::copy_options::overwrite_existing);
        CHECK(contains(copy.load_error(), "projector.safetensors: tensor \"fc1.weight\""));
    }
}
