// Parity of the four networks with PyTorch and `transformers` on small random models (tests/golden/networks/,
// tests/golden/tiny-refrag/), at the output and at named checkpoints on the way; and proof that the goldens
// notice wrong maths. test_ragged.cpp holds the networks against themselves.
#include <cmath>

#include "every_backend.h"
#include "golden.h"
#include "models/policy.h"
#include "models/projector.h"
#include "models/refrag_config.h"
#include "models/roberta.h"
#include "tap_backend.h"
#include "text/tokenizer.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// The goldens are fp32 themselves. Logits reach about 12, where one rounding is 5e-7; through two layers of
// sums over at most 96 terms in another order some tens of such roundings add up (measured: 1.8e-5 at most,
// at every instruction set). 1e-4 leaves a factor of five for other summation orders; wrong maths is far
// above it, as "the goldens notice" below shows.
constexpr double kBound = 1e-4;
// Where weights are BF16 or F16 a backend may round activations to their type: 2^-9 of each (F16: 2^-12), in
// front of some ten products from end to end. Two layers' worth of them is within 2^-6 of the largest value
//, which is about 12 for logits and 2 for embeddings, while greedy continuations
// stay the golden's.
constexpr double kRoundedBound = 0x1p-6;

bool rounds_activations(const Backend& backend) {
    const std::string name = backend.device().description();
    return contains(name, "BF16") || contains(name, "AMX") || contains(name, "cuda");
}

const std::string kLlamas[] = {"llama2",         "llama3", "llama-bias",   "llama-yarn",
                               "llama-dynamic",  "qwen2",  "qwen2-window", "qwen3",
                               "mistral-window", "olmo2",  "smollm3"};
const std::string kRobertas[] = {"roberta-mlm", "roberta-pooler", "bert"};

// Values of a KV-cached model on the golden's prompt: logits of plain ids, and of ids mixed with chunk rows.
double worst_logit(Backend& backend, const std::string& name) {
    const Golden golden(name);
    Decoder decoder(backend, network_path(name));
    const double plain = max_difference(decoder.feed(0, golden.ids("ids")), golden.values("logits"));
    decoder.kv.truncate(0, 0);
    decoder.set_chunk_rows(golden.values("chunk_rows"));
    const double mixed = max_difference(decoder.feed(0, golden.ids("source")), golden.values("mixed_logits"));
    return std::max(plain, mixed);
}

std::vector<float> encode(const Roberta& encoder, Backend& backend,
                          const std::vector<std::vector<int32_t>>& sequences) {
    Arena arena(backend);
    const Tensor out = arena.tensor(std::ssize(sequences), encoder.config().dim);
    encoder.encode(backend, sequences, out, arena);
    return download(backend, out);
}

double worst_pooled(Backend& backend, const std::string& name, ChunkPooling pooling, const char* tensor) {
    const Golden golden(name);
    const Roberta encoder(backend.device(), network_path(name), pooling, false);
    return max_difference(encode(encoder, backend, id_lists_of(golden.json.get("sequences"))),
                          golden.values(tensor));
}

}  // namespace

TEST_CASE("llama: logits of tokens and of tokens mixed with chunk rows") {
    for (const auto& backend : every_backend()) {
        for (const std::string& name : kLlamas) {
            CAPTURE(backend->device().description());
            CAPTURE(name);
            const bool rounds = name == "llama-bias" && rounds_activations(*backend);
            CHECK(worst_logit(*backend, name) <= (rounds ? 12 * kRoundedBound : kBound));
        }
    }
}

TEST_CASE("llama: the residual stream after the embedding and each layer") {
    for (const std::string& name : kLlamas) {
        CAPTURE(name);
        const Golden golden(name);
        TapBackend tap(cpu());
        Decoder decoder(tap, network_path(name));
        const std::vector<int32_t> ids = golden.ids("ids");
        const std::vector<float> logits = decoder.feed(0, ids);
        CHECK(max_difference(logits, golden.values("logits")) <= kBound);

        const std::vector<float> expected = golden.values("hidden_states");
        const auto dim = static_cast<size_t>(decoder.model.config().dim);
        const auto n_layers = static_cast<size_t>(decoder.model.config().n_layers);
        REQUIRE(tap.embedded.size() == 1);
        REQUIRE(tap.residual.size() == 2 * n_layers);
        CHECK(max_difference(tap.embedded[0], rows_of(expected, dim, 0, ids.size())) == 0);
        // The last layer's output is in the golden only after the final norm, which the logits cover.
        for (size_t layer = 0; layer + 1 < n_layers; ++layer) {
            const auto after = rows_of(expected, dim, (layer + 1) * ids.size(), ids.size());
            CHECK(max_difference(tap.residual[2 * layer + 1], after) <= kBound);
        }
    }
}

TEST_CASE("llama: greedy continuations") {
    for (const std::string& name : kLlamas) {
        CAPTURE(name);
        const Golden golden(name);
        Decoder decoder(cpu(), network_path(name));
        CHECK(decoder.greedy(golden.ids("ids"), 12) == golden.ids("greedy"));
        decoder.set_chunk_rows(golden.values("chunk_rows"));
        CHECK(decoder.greedy(golden.ids("source"), 12) == golden.ids("mixed_greedy"));
    }
}

TEST_CASE("roberta: every layer's output for every row") {
    for (const std::string& name : kRobertas) {
        CAPTURE(name);
        const Golden golden(name);
        const std::vector<std::vector<int32_t>> sequences = id_lists_of(golden.json.get("sequences"));
        TapBackend tap(cpu());
        const Roberta encoder(tap.device(), network_path(name), ChunkPooling::cls, false);
        Arena arena(tap);
        const std::vector<float> last = download(tap, encoder.hidden_states(tap, sequences, arena));

        const std::vector<float> expected = golden.values("hidden_states");
        const auto dim = static_cast<size_t>(encoder.config().dim);
        const auto n_layers = static_cast<size_t>(encoder.config().n_layers);
        const size_t rows = expected.size() / dim / (n_layers + 1);
        REQUIRE(tap.normed.size() == 1 + 2 * n_layers);
        double worst = 0;
        for (size_t layer = 0; layer <= n_layers; ++layer) {  // 0: the embedding's output
            worst = std::max(
                worst, max_difference(tap.normed[2 * layer], rows_of(expected, dim, layer * rows, rows)));
        }
        CHECK(worst <= kBound);
        CHECK(last == tap.normed.back());
        // The same over the backend's own fused ops.
        const Roberta fused(cpu().device(), network_path(name), ChunkPooling::cls, false);
        const std::vector<float> fused_last = download(cpu(), fused.hidden_states(cpu(), sequences, arena));
        CHECK(max_difference(fused_last, rows_of(expected, dim, n_layers * rows, rows)) <= kBound);
    }
}

TEST_CASE("roberta: chunk embeddings by each pooling") {
    for (const auto& backend : every_backend()) {
        CAPTURE(backend->device().description());
        for (const std::string& name : kRobertas) {
            CAPTURE(name);
            const bool rounds = name == "roberta-pooler" && rounds_activations(*backend);
            const double bound = rounds ? 2 * kRoundedBound : kBound;
            CHECK(worst_pooled(*backend, name, ChunkPooling::cls, "cls") <= bound);
            CHECK(worst_pooled(*backend, name, ChunkPooling::mean, "mean") <= bound);
        }
        const double bound = rounds_activations(*backend) ? 2 * kRoundedBound : kBound;
        CHECK(worst_pooled(*backend, "roberta-pooler", ChunkPooling::pooler, "pooler") <= bound);
    }
}

TEST_CASE("roberta: normalised chunk embeddings have length 1") {
    const Golden golden("roberta-mlm");
    const Roberta encoder(cpu().device(), network_path("roberta-mlm"), ChunkPooling::mean, true);
    const std::vector<float> unit = encode(encoder, cpu(), id_lists_of(golden.json.get("sequences")));
    const auto dim = static_cast<size_t>(encoder.config().dim);
    for (size_t row = 0; row < unit.size() / dim; ++row) {
        double squares = 0;
        for (const float x : rows_of(unit, dim, row, 1)) squares += static_cast<double>(x) * x;
        CHECK(std::sqrt(squares) == doctest::Approx(1.0).epsilon(1e-6));
    }
}

TEST_CASE("roberta: a chunk without tokens or with too many is refused with both numbers") {
    const Roberta encoder(cpu().device(), network_path("roberta-mlm"), ChunkPooling::cls, false);
    CHECK(encoder.config().max_seq_len() == 38);  // 40 positions, pad id 1
    const auto length = [&](size_t n) {
        return error_of([&] { encode(encoder, cpu(), {std::vector<int32_t>(n, 5)}); });
    };
    CHECK(length(38) == "(no error)");
    CHECK(length(39) ==
          "encoder: a chunk has 39 encoder tokens, special ones included; expected 1 to 38 "
          "(max_position_embeddings - pad_token_id - 1): give a smaller chunk length (-k)");
    CHECK(contains(length(0), "has 0 encoder tokens"));
}

namespace {

// The model's weights are BF16.
void check_tiny_refrag(Backend& backend) {
    const bool rounds = rounds_activations(backend);
    const auto near = [&](std::span<const float> found, std::span<const float> expected) {
        float largest = 0.0f;
        for (const float x : expected) largest = std::max(largest, std::fabs(x));
        return max_difference(found, expected) <=
               (rounds ? kRoundedBound * static_cast<double>(largest) : kBound);
    };
    const Golden golden("tiny-refrag");
    const std::string dir = tiny_refrag_path();
    const RefragConfig config = load_refrag_config(dir);
    Arena arena(backend);

    // Encoder ids of a shared vocabulary are the chunk's own, between <s> and </s>.
    const Roberta encoder(backend.device(), dir + "/encoder", config.pooling, config.normalize);
    const auto with_specials = [&](std::vector<int32_t> ids) {
        ids.insert(ids.begin(), encoder.config().bos_id);
        ids.push_back(encoder.config().eos_id);
        return ids;
    };
    std::vector<std::vector<int32_t>> chunks;
    for (size_t i = 0; i < golden.json.get("chunks").size(); ++i) {
        chunks.push_back(with_specials(ids_of(golden.json.get("chunks").at(i).get("ids"))));
    }
    std::vector<std::vector<int32_t>> question = id_lists_of(golden.json.get("question_pieces"));
    for (std::vector<int32_t>& piece : question) piece = with_specials(piece);
    CHECK(near(encode(encoder, backend, chunks), golden.values("chunk_emb")));
    CHECK(near(encode(encoder, backend, question), golden.values("question_emb")));

    // Each part below is fed the golden's own input, so that a failure names the part.
    const int32_t d_enc = encoder.config().dim;
    const Tensor chunk_emb = upload(backend, arena, golden.values("chunk_emb"), d_enc);
    const Tensor question_emb = upload(backend, arena, golden.values("question_emb"), d_enc);

    Decoder decoder(backend, dir + "/decoder");
    const Projector projector(backend.device(), dir, d_enc, decoder.model.config().dim);
    const Tensor chunk_rows = arena.tensor(chunk_emb.rows, decoder.model.config().dim);
    projector.forward(backend, chunk_rows, chunk_emb, arena);
    CHECK(near(download(backend, chunk_rows), golden.values("chunk_rows")));

    const Policy policy(backend.device(), dir, config.policy, d_enc);
    CHECK(near(policy.logits(backend, chunk_emb, question_emb, arena), golden.values("policy_logits")));
    CHECK(
        near(policy.logits(backend, chunk_emb, Tensor{}, arena), golden.values("policy_logits_no_question")));
    CHECK(policy.logits(backend, Tensor{}, question_emb, arena).empty());

    decoder.set_chunk_rows(golden.values("chunk_rows"));
    for (const char* mode : {"none", "some", "all"}) {
        CAPTURE(mode);
        const Json expected = golden.json.get("modes").get(mode);
        const std::vector<int32_t> source = ids_of(expected.get("source"));
        const std::vector<float> last_rows = golden.values(std::string("logits_") + mode);
        decoder.kv.truncate(0, 0);
        const std::vector<float> logits = decoder.feed(0, source);
        REQUIRE(logits.size() >= last_rows.size());
        CHECK(near(std::span(logits).last(last_rows.size()), last_rows));
        const std::vector<int32_t> greedy = ids_of(expected.get("greedy"));
        CHECK(decoder.greedy(source, greedy.size()) == greedy);
    }
}

}  // namespace

TEST_CASE("a whole REFRAG model: encoder, projector, policy and decoder in turn") {
    for (const auto& backend : every_backend()) {
        CAPTURE(backend->device().description());
        check_tiny_refrag(*backend);
    }
}

TEST_CASE("policy: without the question, three layers of four heads") {
    const Golden tiny("tiny-refrag");
    const WeightFiles golden = WeightFiles::open(network_path("policy-plain.safetensors"));
    const PolicyConfig config = load_refrag_config(network_path("policy-plain")).policy;
    CHECK_FALSE(config.sees_question);
    Arena arena(cpu());
    const int32_t d_enc = 32;
    const Tensor chunk_emb = upload(cpu(), arena, tiny.values("chunk_emb"), d_enc);
    const Tensor question_emb = upload(cpu(), arena, tiny.values("question_emb"), d_enc);
    const Policy policy(cpu().device(), network_path("policy-plain"), config, d_enc);
    const std::vector<float> logits = policy.logits(cpu(), chunk_emb, Tensor{}, arena);
    CHECK(max_difference(logits, golden.read_f32("policy_logits")) <= kBound);
    // A question is not looked at, not even when it is given.
    CHECK(policy.logits(cpu(), chunk_emb, question_emb, arena) == logits);
}

TEST_CASE("the tiny model's tokenizer gives the golden's ids") {
    const Golden golden("tiny-refrag");
    const Tokenizer tokenizer = Tokenizer::from_file(tiny_refrag_path() + "/decoder/tokenizer.json");
    const Json passages = golden.json.get("passages");
    const Json segments = golden.json.get("segments");
    size_t checked = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
        const std::string kind = segments.at(i).get_string("kind");
        std::string text;
        if (kind == "passage") {
            const Json passage = passages.at(static_cast<size_t>(segments.at(i).get_int("passage")));
            const std::string title = passage.get_string_or("title", "");
            text = (title.empty() ? "" : title + "\n") + passage.get_string("text");
        } else if (kind == "question") {
            text = golden.json.get_string("question");
        } else {
            continue;
        }
        CHECK(tokenizer.encode_ids(text) == ids_of(segments.at(i).get("ids")));
        ++checked;
    }
    CHECK(checked == 5);
}

// ---- a golden that passes whatever the maths is would be worth nothing
// --------------------------------------

namespace {

// Rotates queries and keys the other way round.
class MirroredRope : public TapBackend {
  public:
    using TapBackend::TapBackend;
    void rope_table(Tensor cos_sin, const float* position, Tensor inv_freq) override {
        inner_.rope_table(cos_sin, position, inv_freq);
        std::vector<float> values = refrag_test::download(inner_, cos_sin);
        const auto head_dim = static_cast<size_t>(cos_sin.cols);
        for (size_t i = 0; i < values.size(); ++i) {
            if (i % head_dim >= head_dim / 2) values[i] = -values[i];
        }
        inner_.upload(cos_sin.data, values.data(), cos_sin.bytes());
    }
};

// The tanh approximation of GELU in place of the exact form.
class TanhGelu : public TapBackend {
  public:
    using TapBackend::TapBackend;
    void gelu(Tensor x) override {
        std::vector<float> values = refrag_test::download(inner_, x);
        for (float& v : values) {
            v = 0.5f * v * (1.0f + std::tanh(0.7978845608f * (v + 0.044715f * v * v * v)));
        }
        inner_.upload(x.data, values.data(), x.bytes());
    }
};

// Attention scores half as large.
class HalfScale : public TapBackend {
  public:
    using TapBackend::TapBackend;
    void attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape, const KvView* kv,
                   int32_t layer, const Batch& batch) override {
        AttentionShape wrong = shape;
        wrong.scale *= 0.5f;
        inner_.attention(out, q, k, v, wrong, kv, layer, batch);
    }
};

// Chunks that attend to each other: the whole batch as one encoder sequence.
class CrossTalk : public TapBackend {
  public:
    using TapBackend::TapBackend;
    void attention(Tensor out, Tensor q, Tensor k, Tensor v, const AttentionShape& shape, const KvView* kv,
                   int32_t layer, const Batch&) override {
        BatchPlan plan;
        plan.add_encoder(static_cast<int32_t>(q.rows));
        Arena arena(inner_);
        inner_.attention(out, q, k, v, shape, kv, layer, plan.upload(inner_, arena));
    }
};

}  // namespace

TEST_CASE("the goldens notice wrong maths") {
    constexpr double kSeen = 10 * kBound;
    for (const std::string& name : kLlamas) {
        CAPTURE(name);
        MirroredRope mirrored(cpu());
        CHECK(worst_logit(mirrored, name) > kSeen);
        HalfScale scaled(cpu());
        CHECK(worst_logit(scaled, name) > kSeen);
    }
    for (const std::string& name : kRobertas) {
        CAPTURE(name);
        TanhGelu approximate(cpu());
        CHECK(worst_pooled(approximate, name, ChunkPooling::mean, "mean") > kBound);
        HalfScale scaled(cpu());
        CHECK(worst_pooled(scaled, name, ChunkPooling::mean, "mean") > kSeen);
        CrossTalk merged(cpu());
        CHECK(worst_pooled(merged, name, ChunkPooling::cls, "cls") > kSeen);
    }
}
