// The default model: what the runtime computes equals what the trainer's own networks compute from the same
// files (weights_tools/make_golden_nano.py): chunks, chunk embeddings, policy logits, the choice, next-token
// logits.
#include <doctest/doctest.h>

#include "golden.h"
#include "refrag/assemble.h"
#include "refrag/passage.h"
#include "refrag/passages.h"
#include "refrag/scoring.h"
#include "refrag/select.h"

using namespace refrag;

namespace {

// fp32 on both sides, in other orders of summation: a few layers of sums of several hundred terms of order 1.
constexpr double kBound = 1e-4;

std::vector<Passage> read_golden_passages(const Json& golden) {
    std::vector<Passage> passages;
    const Json list = golden.get_array("passages");
    for (size_t i = 0; i < list.size(); ++i) {
        passages.emplace_back(
            Passage{str(i + 1), list.at(i).get_string_or("title", ""), list.at(i).get_string("text")});
    }
    return passages;
}

}  // namespace

TEST_CASE("the default model computes what its trainer computes") {
    Backend& backend = refrag_test::cpu();
    const Model model(backend.device(), refrag_test::repo_path("weights_tools/refrag-nano"));
    const Json golden = Json::parse_file(refrag_test::repo_path("tests/golden/nano.json"));
    const WeightFiles values = WeightFiles::open(refrag_test::repo_path("tests/golden/nano.safetensors"));
    const std::string question = golden.get_string("question");
    const Json cases = golden.get_array("cases");
    REQUIRE(cases.size() >= 2);
    for (size_t i = 0; i < cases.size(); ++i) {
        const Json expected = cases.at(i);
        const auto k = static_cast<int32_t>(expected.get_int("k"));
        CAPTURE(k);
        std::vector<std::shared_ptr<SharedPassage>> passages;
        for (const Passage& passage : read_golden_passages(golden))
            passages.push_back(std::make_shared<SharedPassage>(model, passage.content(), k));
        Arena arena(backend);
        std::vector<std::vector<int32_t>> chunk_ids;
        for (const auto& passage : passages) {
            for (const Chunk& chunk : passage->cut(model)->chunks()) chunk_ids.push_back(chunk.ids);
        }
        REQUIRE(chunk_ids == refrag_test::id_lists_of(expected.get_array("chunks")));

        encode_passages(backend, model, passages, arena);
        std::vector<float> c;
        for (const auto& passage : passages) {
            const std::vector<float> c_p = passage->encoded()->download(backend);
            c.insert(c.end(), c_p.begin(), c_p.end());
        }
        CHECK(refrag_test::max_difference(c, values.read_f32(str("chunk_emb.", k))) < kBound);

        const Tensor chunk_emb = refrag_test::upload(backend, arena, c, model.d_enc());
        std::vector<std::vector<int32_t>> pieces;
        const std::vector<Token> tokens = model.tokenizer().encode(question);
        for (Chunk& piece : cut_chunks(question, tokens, k, model.encoder_vocabulary())) {
            pieces.push_back(std::move(piece.encoder_ids));
        }
        const Tensor question_emb = arena.tensor(std::ssize(pieces), model.d_enc());
        model.encoder().encode(backend, pieces, question_emb, arena);
        const std::vector<float> logits = model.policy().logits(backend, chunk_emb, question_emb, arena);
        CHECK(refrag_test::max_difference(logits, values.read_f32(str("policy_logits.", k))) < kBound);
        const std::vector<bool> expanded =
            select_largest(logits, n_expand(model.config().expand_fraction, std::ssize(logits)));
        std::vector<int32_t> chosen;
        for (size_t j = 0; j < expanded.size(); ++j) {
            if (expanded[j]) chosen.push_back(static_cast<int32_t>(j));
        }
        CHECK(chosen == refrag_test::ids_of(expected.get_array("expanded")));

        const PromptTemplate& t = model.config().prompt;
        const auto piece_ids = [&](const std::string& text) {
            return model.tokenizer().encode_ids(text, true);
        };
        DecoderInput input;
        input.add_token(model.bos_id().value());
        input.add_tokens(piece_ids(t.before));
        size_t index = 0;
        for (const auto& passage : passages) {
            input.add_tokens(piece_ids(t.passage_prefix));
            for (const Chunk& chunk : passage->cut(model)->chunks())
                input.add_chunk(chunk, expanded[index++]);
            input.add_tokens(piece_ids(t.passage_suffix));
        }
        input.add_tokens(piece_ids(t.question_prefix));
        input.add_tokens(model.tokenizer().encode_ids(question));
        input.add_tokens(piece_ids(t.question_suffix));
        CHECK(std::ssize(input.source) == expected.get_int("positions"));
        const Tensor compressed = arena.tensor(std::ssize(input.row_chunk), model.d_enc());
        const Tensor chunk_rows = arena.tensor(compressed.rows, model.decoder().config().dim);
        backend.gather_rows(compressed, chunk_emb, upload_vector(backend, arena, input.row_chunk));
        model.projector().forward(backend, chunk_rows, compressed, arena);
        KvCache kv = model.decoder().make_kv_cache(backend, 1, std::ssize(input.source));
        const Tensor hidden = prefill(backend, model.decoder(), input.source, chunk_rows, kv, 0, 1, arena);
        const std::vector<float> next =
            refrag_test::download(backend, model.decoder().logits(backend, hidden, arena));
        CHECK(refrag_test::max_difference(next, values.read_f32(str("next_logits.", k))) < kBound);
    }
}
