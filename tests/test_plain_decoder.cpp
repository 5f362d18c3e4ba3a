// Models without trained heads: a plain Hugging Face decoder, chunks that are left out, chat templates in a
// prompt, the tokens that end an answer, and REPLUG.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>

#include "cli_test.h"
#include "eval/perplexity.h"
#include "eval/qa.h"
#include "eval/replug.h"
#include "golden.h"
#include "refrag/prompt_work.h"
#include "refrag/session.h"

using namespace refrag;
using namespace refrag_test;

namespace {

const std::string kPlain = "tests/golden/tiny-refrag/decoder";

std::vector<Passage> some_passages() {
    return {{"a", "Hill", "The old mill stands on a hill above the river and the town below it."},
            {"b", "", "A red lantern hangs over the door; owners light it every evening."}};
}

// Rows and report of a prompt in the model's template.
struct Made {
    std::vector<int32_t> source;
    Answer answer;
    std::vector<Segment> segments;
    std::vector<std::shared_ptr<SharedPassage>> passages;
};

Made make(const Model& model, const AnswerOptions& options, std::string_view question) {
    Backend& backend = cpu();
    Arena arena(backend);
    PassageCache cache;
    Made made;
    made.passages = share_passages(model, some_passages(), cache, options.chunk_len);
    made.segments = make_segments(model, {}, made.passages, question, options.chunk_len);
    made.source = make_prompt(backend, model, made.segments, options, 512, arena, made.answer).input.source;
    CHECK(std::ssize(made.source) <= most_positions(model, made.segments, options));
    return made;
}

// The tiny decoder in a directory of its own, to be edited.
struct PlainDir {
    TempDir dir;
    std::string path = dir.file("model");
    PlainDir() { std::filesystem::copy(repo_path(kPlain), path, std::filesystem::copy_options::recursive); }
    void write(const std::string& name, const std::string& text) const { dir.write("model/" + name, text); }
    void remove(const std::string& name) const { std::filesystem::remove(path + "/" + name); }
    // Another vocabulary, with ChatML's tokens; its ids fit the embedding.
    void take_chatml_vocabulary() const {
        const Json chat = Json::parse_file(repo_path("tests/golden/chat.json"));
        write("tokenizer.json", chat.get("tokenizers").get_string("byte_level_digits"));
        write("tokenizer_config.json", "{}");
    }
    std::string template_text(const std::string& name) const {
        return Json::parse_file(repo_path("tests/golden/chat.json")).get("templates").get_string(name);
    }
    // config.json with another "eos_token_id"; "" takes the key out.
    void set_config_eos(const std::string& value) const {
        std::string config = read_file(path + "/config.json", 1 << 20);
        const std::string found = "\"eos_token_id\":2,";
        REQUIRE(contains(config, found));
        config.replace(config.find(found), found.size(),
                       value.empty() ? "" : "\"eos_token_id\":" + value + ",");
        write("config.json", config);
    }
};

}  // namespace

TEST_CASE("plain decoder: loads without refrag.json, one file or shards, and has its own defaults") {
    for (const std::string& dir : {kPlain, std::string("weights_tools/refrag-nano/decoder")}) {
        CAPTURE(dir);
        const Model model(cpu().device(), repo_path(dir));
        CHECK(!model.has_encoder());
        CHECK(model.default_policy() == SelectPolicy::bm25);
        CHECK(model.default_unexpanded() == Unexpanded::drop);
        CHECK(model.config().chunk_len == 16);
        CHECK(model.config().expand_fraction == 0.25);
        CHECK(model.chat_format() == ChatFormat::plain);
        CHECK(model.chat_source() == ChatSource::none);
        CHECK(model.parameters() == model.decoder().parameters());
        CHECK(model.weight_bytes() == model.decoder().weight_bytes());
        for (const auto& ask :
             std::vector<std::function<void()>>{[&] { model.encoder(); }, [&] { model.projector(); },
                                                [&] { model.policy(); }, [&] { model.d_enc(); }}) {
            const std::string said = error_of(ask);
            CHECK(contains(said, dir + ": a plain decoder, without encoder, projector and policy network"));
            CHECK(contains(said, "--unexpanded drop with --policy bm25, recent, random, perplexity-asc or"));
            CHECK(contains(said, "--policy all"));
        }
    }
    const TempDir empty;
    CHECK(contains(error_of([&] { Model(cpu().device(), empty.path()); }), "refrag.json"));
}

TEST_CASE("plain decoder: a refrag.json without encoder gives it a template and defaults") {
    const TempDir dir;
    std::filesystem::copy(repo_path(kPlain), dir.file("decoder"), std::filesystem::copy_options::recursive);
    dir.write(
        "refrag.json",
        R"({"format": 1, "chunk_len": 8, "chunk_unit": "decoder_tokens", "expand_fraction": 0.5, )"
        R"("template": {"before": "Texts. ", "question_prefix": "Asked: ", "question_suffix": " Said:"}, )"
        R"("segment_order": ["question", "passages"]})");
    const Model model(cpu().device(), dir.path());
    CHECK(!model.has_encoder());
    CHECK(model.default_policy() == SelectPolicy::bm25);
    CHECK(model.default_unexpanded() == Unexpanded::drop);
    CHECK(model.chat_source() == ChatSource::model_directory);
    AnswerOptions options;
    options.policy = SelectPolicy::all;
    const Made made = make(model, options, "Where is the mill?");
    CHECK(made.answer.chunk_len == 8);
    std::vector<int32_t> expected = {model.first_id()};
    const auto add = [&](std::string_view text) {
        for (const int32_t id : model.tokenizer().encode_ids(text)) expected.push_back(id);
    };
    for (const char* text : {"Texts. ", "Asked: ", "Where is the mill?", " Said:"}) add(text);
    for (const Passage& passage : some_passages()) add(passage.content());
    CHECK(token_ids(model, made.segments) == expected);
    options.policy.reset();
    const Answer bm25 = make(model, options, "Where is the mill?").answer;
    CHECK(bm25.n_expanded * 2 >= bm25.chunks.size());
    CHECK(bm25.n_expanded < bm25.chunks.size());
    // Its weights lie in DIR/decoder: what is wrong there is named there.
    std::filesystem::remove(dir.file("decoder/model.safetensors"));
    CHECK(contains(error_of([&] { Model(cpu().device(), dir.path()); }), dir.file("decoder")));
}

TEST_CASE("plain decoder: what needs an encoder is refused before any work, what does not is answered") {
    const Model model(cpu().device(), repo_path(kPlain));
    AnswerOptions options;
    options.max_new_tokens = 4;
    const auto said = [&] { return error_of([&] { make(model, options, "Where is the mill?"); }); };
    CHECK(said() == "(no error)");  // bm25, drop
    options.unexpanded = Unexpanded::compress;
    CHECK(contains(said(), "a plain decoder, without encoder"));
    options.policy = SelectPolicy::all;
    CHECK(said() == "(no error)");
    options.unexpanded.reset();
    options.policy = SelectPolicy::model;
    CHECK(contains(said(), "a plain decoder, without encoder"));
    for (const SelectPolicy policy :
         {SelectPolicy::bm25, SelectPolicy::recent, SelectPolicy::random, SelectPolicy::perplexity_asc,
          SelectPolicy::perplexity_desc, SelectPolicy::none}) {
        options.policy = policy;
        CHECK(said() == "(no error)");
    }
}

TEST_CASE("unexpanded drop: the rows are those of the chosen chunks, put together by hand") {
    const Model plain(cpu().device(), repo_path(kPlain));
    const Model trained(cpu().device(), tiny_refrag_path());
    for (const Model* model : {&plain, &trained}) {
        for (const SelectPolicy policy : {SelectPolicy::bm25, SelectPolicy::recent, SelectPolicy::random}) {
            AnswerOptions options;
            options.policy = policy;
            options.unexpanded = Unexpanded::drop;
            options.expand_fraction = 0.4;
            options.chunk_len = 4;
            const Made made = make(*model, options, "Who lights the lantern?");
            CHECK(made.answer.policy == policy);
            CHECK(made.answer.unexpanded == Unexpanded::drop);
            std::vector<int32_t> rows;
            size_t i = 0;
            size_t n_chosen = 0;
            size_t n_pieces_left_out = 0;
            for (size_t s = 0; s < made.segments.size(); ++s) {
                const Segment& segment = made.segments[s];
                const auto* passage = std::get_if<PassageSegment>(&segment);
                if (passage == nullptr) {
                    const auto* tokens = std::get_if<TokenSegment>(&segment);
                    const int32_t around = tokens != nullptr ? tokens->around : 0;
                    const auto of_passage = [&](const ChunkReport& chunk) {
                        return chunk.segment == static_cast<size_t>(static_cast<int64_t>(s) + around);
                    };
                    const auto read = [&](const ChunkReport& chunk) {
                        return of_passage(chunk) && chunk.expanded;
                    };
                    const std::vector<ChunkReport>& chunks = made.answer.chunks;
                    if (around != 0 && std::none_of(chunks.begin(), chunks.end(), read)) {
                        ++n_pieces_left_out;
                        continue;
                    }
                    const std::vector<int32_t> ids = token_ids(*model, std::span(&segment, 1));
                    rows.insert(rows.end(), ids.begin(), ids.end());
                    continue;
                }
                for (const Chunk& chunk : passage->passage->cut(*model)->chunks()) {
                    const ChunkReport& report = made.answer.chunks[i++];
                    CHECK(report.position == std::ssize(rows));
                    CHECK(report.n_positions == (report.expanded ? std::ssize(chunk.ids) : 0));
                    if (report.expanded) rows.insert(rows.end(), chunk.ids.begin(), chunk.ids.end());
                    n_chosen += report.expanded ? 1 : 0;
                }
            }
            CHECK(made.source == rows);
            // `recent` leaves out the first passage whole, and the pieces of the template around it.
            if (policy == SelectPolicy::recent) CHECK(n_pieces_left_out > 0);
            CHECK(n_chosen == static_cast<size_t>(n_expand(0.4, std::ssize(made.answer.chunks))));
            CHECK(made.answer.plain_tokens == token_ids(*model, made.segments).size());
            // Nothing was encoded for it.
            for (const auto& passage : made.passages) CHECK(!passage->encoded());
            if (policy == SelectPolicy::bm25) {
                // The chunk with "lantern" is chosen, and its score is reported.
                for (const ChunkReport& report : made.answer.chunks) REQUIRE(report.logit);
                const auto best = std::max_element(
                    made.answer.chunks.begin(), made.answer.chunks.end(),
                    [](const ChunkReport& a, const ChunkReport& b) { return *a.logit < *b.logit; });
                CHECK(best->expanded);
                CHECK(*best->logit > 0.0f);
            }
        }
    }
}

TEST_CASE(
    "unexpanded drop: everything expanded is the full context, nothing expanded is the question alone") {
    const Model model(cpu().device(), repo_path(kPlain));
    AnswerOptions options;
    options.policy = SelectPolicy::all;
    const Made all = make(model, options, "Where is the mill?");
    CHECK(all.source == token_ids(model, all.segments));
    options.policy = SelectPolicy::none;
    const Made none = make(model, options, "Where is the mill?");
    std::vector<Segment> without = none.segments;
    std::erase_if(without, [](const Segment& s) {
        const auto* tokens = std::get_if<TokenSegment>(&s);
        return std::holds_alternative<PassageSegment>(s) || (tokens != nullptr && tokens->around != 0);
    });
    CHECK(none.source == token_ids(model, without));
}

TEST_CASE("chat templates in a prompt: recognised, its own system message, passages in the first turn") {
    const PlainDir plain;
    plain.take_chatml_vocabulary();
    plain.write("chat_template.jinja", plain.template_text("smollm2"));
    const Model model(cpu().device(), plain.path);
    CHECK(model.chat_format() == ChatFormat::chatml);
    CHECK(model.chat_source() == ChatSource::recognized);
    // Without passages: the ids of apply_chat_template.
    const Json cases = Json::parse_file(repo_path("tests/golden/chat.json")).get("cases");
    int compared = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
        const Json c = cases.at(i);
        if (c.get_string("template") != "smollm2" || c.find("system") || c.get_int("passages") > 0) continue;
        std::vector<Turn> history;
        const Json turns = c.get("turns");
        for (size_t t = 0; t < turns.size(); ++t)
            history.push_back(
                {std::string(turns.at(t).at(0).as_string()), std::string(turns.at(t).at(1).as_string())});
        const std::vector<Segment> segments = make_segments(model, history, {}, c.get_string("question"));
        CHECK(token_ids(model, segments) == ids_of(c.get("ids").at(0)));
        // The policy and bm25 see the question alone.
        const auto* question = std::get_if<QuestionSegment>(&segments.back());
        REQUIRE(question);
        CHECK(question->text == c.get_string("question"));
        ++compared;
    }
    CHECK(compared == 2);

    // With passages the text is one user turn that holds them, whichever of them are read as chunks.
    AnswerOptions options;
    options.policy = SelectPolicy::all;
    const Made made = make(model, options, "Who owns it?");
    const std::string text = model.tokenizer().decode(made.source, false);
    CHECK(
        text ==
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHill\nThe old mill stands on a hill above the river and the town below it.\n\n"
        "A red lantern hangs over the door; owners light it every evening.\n\nWho owns it?<|im_end|>\n"
        "<|im_start|>assistant\n");

    // An earlier turn read as chunks stands where its text would.
    Turn turn{"Where is the mill?", "on a hill", true, {}};
    const std::vector<Segment> compressed = make_segments(model, std::span(&turn, 1), {}, "And now?", 4);
    turn.compress = false;
    const std::vector<Segment> read = make_segments(model, std::span(&turn, 1), {}, "And now?", 4);
    CHECK(std::count_if(compressed.begin(), compressed.end(),
                        [](const Segment& s) { return std::holds_alternative<PassageSegment>(s); }) == 2);
    CHECK(model.tokenizer().decode(token_ids(model, compressed), false) ==
          model.tokenizer().decode(token_ids(model, read), false));
}

TEST_CASE("chat templates in a prompt: what the caller says goes before what the files say") {
    const PlainDir plain;
    plain.take_chatml_vocabulary();
    plain.write("chat_template.jinja", plain.template_text("smollm2"));
    ChatOptions chat;
    chat.system = "";
    const auto text_of = [&] {
        const Model model(cpu().device(), plain.path, {}, WeightFormat::as_stored, chat);
        return model.tokenizer().decode(token_ids(model, make_segments(model, {}, {}, "q")), false);
    };
    CHECK(text_of() == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n");
    chat.system = "Be brief.";
    CHECK(text_of() ==
          "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n");
    chat.format = ChatFormat::plain;
    CHECK(text_of() == "Be brief.\n\nQuestion: q\nAnswer:");
    chat.system.reset();
    CHECK(text_of() == "Question: q\nAnswer:");
    plain.write("chat_template.jinja", "{{ '<|user|>' }}");
    chat.format.reset();
    CHECK(text_of() == "Question: q\nAnswer:");
    CHECK(Model(cpu().device(), plain.path).chat_source() == ChatSource::unknown);
    // A model directory keeps its template, unless another is asked for.
    CHECK(Model(cpu().device(), tiny_refrag_path()).chat_source() == ChatSource::model_directory);
    const TempDir dir;
    std::filesystem::copy(tiny_refrag_path(), dir.file("model"), std::filesystem::copy_options::recursive);
    dir.write("model/decoder/chat_template.jinja", plain.template_text("smollm2"));
    CHECK(Model(cpu().device(), dir.file("model")).chat_format() == ChatFormat::plain);
    CHECK(Model(cpu().device(), dir.file("model")).system_message().empty());
    chat.format = ChatFormat::llama2;
    const Model other(cpu().device(), tiny_refrag_path(), {}, WeightFormat::as_stored, chat);
    CHECK(other.chat_format() == ChatFormat::llama2);
    CHECK(other.chat_source() == ChatSource::given);
}

TEST_CASE("end tokens: generation_config.json before config.json, and the chat format's end of a turn") {
    const PlainDir plain;
    plain.remove("generation_config.json");
    const auto ends = [&] { return Model(cpu().device(), plain.path).end_ids(); };
    CHECK(ends() == std::vector<int32_t>{2});  // config.json's
    plain.write("generation_config.json", R"({"eos_token_id": [5, 7]})");
    CHECK(ends() == std::vector<int32_t>{5, 7});
    plain.take_chatml_vocabulary();
    plain.write("chat_template.jinja", plain.template_text("chatml"));
    CHECK(ends() == std::vector<int32_t>{5, 7, 2});  // <|im_end|> is 2 there
    const Model model(cpu().device(), plain.path);
    for (const int32_t id : {5, 7, 2}) CHECK(model.is_end(id));
    CHECK(!model.is_end(3));
    CHECK(model.end_id() == 5);
    // The end of a turn alone will do; with neither there is no way to stop.
    plain.remove("generation_config.json");
    plain.set_config_eos("");
    CHECK(ends() == std::vector<int32_t>{2});
    plain.remove("chat_template.jinja");
    CHECK(contains(error_of(ends), "neither generation_config.json nor config.json has eos_token_id"));
}

TEST_CASE("end tokens: generation stops at the end of a turn, and --ignore-eos never samples it") {
    const PlainDir plain;
    plain.take_chatml_vocabulary();
    const std::vector<Passage> passages = some_passages();
    AnswerOptions options;
    options.max_new_tokens = 6;
    options.policy = SelectPolicy::all;
    // The token that this decoder says first becomes the end of a turn.
    ChatOptions chat;
    chat.format = ChatFormat::chatml;
    int32_t first = -1;
    {
        const Model model(cpu().device(), plain.path, {}, WeightFormat::as_stored, chat);
        options.ignore_eos = true;
        const Answer answer = Session(model).answer(passages, "q", options);
        REQUIRE(answer.ids.size() == 6);
        CHECK(
            std::none_of(answer.ids.begin(), answer.ids.end(), [&](int32_t id) { return model.is_end(id); }));
        first = answer.ids[0];
        options.ignore_eos = false;
    }
    plain.write("generation_config.json", str("{\"eos_token_id\": ", first, "}"));
    const Model model(cpu().device(), plain.path, {}, WeightFormat::as_stored, chat);
    const Answer answer = Session(model).answer(passages, "q", options);
    CHECK(answer.ids.empty());
    CHECK(answer.finish == FinishReason::end_token);
}

TEST_CASE("replug: probabilities are averaged, not logits") {
    const auto l = [](double x) { return static_cast<float>(std::log(x)); };
    // .6 .3 .1 and .1 .5 .4: means .35 .4 .25.
    CHECK(replug_token(std::vector<float>{l(6), l(3), l(1), l(1), l(5), l(4)}, 2) == 1);
    const std::vector<float> differs{l(0.000001), l(0.999999), l(0.9), l(0.1), l(0.9), l(0.1)};
    // Mean probabilities .6 and .4: token 0. Summed logits: ln(1e-6 * .81) < ln(.01): they would say token 1.
    CHECK(replug_token(differs, 3) == 0);
    CHECK(replug_token(std::vector<float>{1.0f, 1.0f}, 1) == 0);                       // equal: the lower id
    CHECK(replug_token(std::vector<float>{200.0f, 500.0f, -500.0f, 400.0f}, 2) == 1);  // no overflow
}

TEST_CASE("replug: with one passage greedy decoding token for token, with three an independent computation") {
    const std::string dir = repo_path("weights_tools/refrag-nano/decoder");
    const Model model(cpu().device(), dir);
    Backend& backend = cpu();
    Arena arena(backend);
    PassageCache cache;
    const std::vector<Passage> passages = {{"a", "Hill", "The old mill stands on a hill above the river."},
                                           {"b", "", "A red lantern hangs over the door."},
                                           {"c", "Sea", "Ships carry barley and glass."}};
    std::vector<std::vector<int32_t>> prompts;
    for (const auto& passage : share_passages(model, passages, cache)) {
        const std::vector<std::shared_ptr<SharedPassage>> alone{passage};
        prompts.push_back(token_ids(model, make_segments(model, {}, alone, "Where is the mill?")));
    }
    AnswerOptions options;
    options.policy = SelectPolicy::all;
    options.max_new_tokens = 12;
    const Answer full = Session(model).answer(std::span(passages).first(1), "Where is the mill?", options);
    REQUIRE(!full.ids.empty());
    CHECK(replug(backend, model, std::span(prompts).first(1), 12, arena) == full.ids);

    // Each step from the start, every sequence by itself, softmax in long double.
    Decoder decoder(backend, dir, 1);
    std::vector<int32_t> expected;
    while (expected.size() < 12) {
        std::vector<long double> sum(decoder.vocab(), 0.0L);
        for (std::vector<int32_t> ids : prompts) {
            ids.insert(ids.end(), expected.begin(), expected.end());
            decoder.kv.truncate(0, 0);
            const std::vector<float> logits = decoder.feed(0, ids);
            const std::span<const float> row = std::span(logits).last(decoder.vocab());
            long double total = 0.0L;
            for (const float x : row) total += std::exp(static_cast<long double>(x));
            for (size_t i = 0; i < row.size(); ++i)
                sum[i] += std::exp(static_cast<long double>(row[i])) / total;
        }
        const auto id = static_cast<int32_t>(std::max_element(sum.begin(), sum.end()) - sum.begin());
        if (model.is_end(id)) break;
        expected.push_back(id);
    }
    CHECK(replug(backend, model, prompts, 12, arena) == expected);
    CHECK(contains(error_of([&] { replug(backend, model, prompts, 4096, arena); }),
                   "the decoder's window has 2048"));
}

TEST_CASE("eval qa: replug with one passage is full, answer for answer; rows for drop beside compress") {
    const Model model(cpu().device(), repo_path("weights_tools/refrag-nano"));
    const QaData data = read_qa_data(repo_path("tests/golden/qa/squad.json"));
    QaOptions options;
    options.modes = {QaMode::full, QaMode::replug, QaMode::refrag};
    options.distractors = {0, 1};
    options.expand_fractions = {0.3};
    options.policies = {SelectPolicy::model, SelectPolicy::bm25, SelectPolicy::recent};
    options.unexpanded = {Unexpanded::compress, Unexpanded::drop};
    options.limit = 3;
    std::vector<std::string> full;
    std::vector<std::string> replug;
    const std::vector<QaRow> rows =
        evaluate_qa(model, data, options, {},
                    [&](const QaRow& row, const QaQuestion&, const std::string& prediction, const QaScore&) {
                        if (row.distractors != 0) return;
                        if (row.mode == QaMode::full) full.push_back(prediction);
                        if (row.mode == QaMode::replug) replug.push_back(prediction);
                    });
    CHECK(full.size() == 3);
    CHECK(full == replug);
    REQUIRE(rows.size() == 2 + 2 + 2 * 6);
    CHECK(rows[2].mode == QaMode::replug);
    CHECK(rows[2].distractors == 0);
    CHECK(!rows[2].policy);
    CHECK(rows[4].unexpanded == Unexpanded::compress);
    CHECK(rows[7].unexpanded == Unexpanded::drop);
    CHECK(rows[8].policy == SelectPolicy::bm25);
    CHECK(rows[8].em_difference.has_value());  // against policy model, dropped too
}

TEST_CASE("eval perplexity: the last chunks with the others dropped are the last tokens; bm25 is refused") {
    const Model model(cpu().device(), repo_path("weights_tools/refrag-nano/decoder"));
    const std::string text = read_file(repo_path("tests/golden/qa/squad.json"), 1 << 20) +
                             read_file(repo_path("README.md"), 1 << 20);
    PerplexityOptions options;
    options.contexts = {128};
    options.output = 32;
    options.modes = {EvalMode::none, EvalMode::last, EvalMode::refrag};
    options.expand_fractions = {0.0, 0.25};
    options.policies = {SelectPolicy::recent};
    options.unexpanded = {Unexpanded::drop};
    options.limit = 3;
    const std::vector<PerplexityRow> rows = evaluate_perplexity(model, text, options);
    REQUIRE(rows.size() == 5);
    CHECK(rows[1].log_perplexity == rows[0].log_perplexity);  // `last` at p = 0: no context
    CHECK(rows[3].log_perplexity == rows[0].log_perplexity);  // nothing expanded, all dropped
    CHECK(rows[4].log_perplexity == rows[2].log_perplexity);  // 2 chunks of 16 are the last 32 tokens
    CHECK(rows[4].unexpanded == Unexpanded::drop);
    CHECK(!rows[2].unexpanded);
    CHECK(*rows[4].log_perplexity != *rows[0].log_perplexity);
    options.policies = {SelectPolicy::bm25};
    CHECK(contains(error_of([&] { evaluate_perplexity(model, text, options); }),
                   "policy bm25: a window of text has no question"));
}

TEST_CASE("the command line with a plain decoder: run, --batch, inspect, eval, and what is refused") {
    const TempDir dir;
    const std::string nano = " -m weights_tools/refrag-nano/decoder ";
    const std::string ask = nano + "--passages bench/demo/passages.jsonl -n 4 -q 'Who?' --json ";
    const Ran ran = refrag_run(dir, "run" + ask);
    REQUIRE(ran.code == 0);
    const Json answer = Json::parse(ran.out, "answer");
    CHECK(answer.get_string("policy") == "bm25");
    CHECK(answer.get_string("unexpanded") == "drop");
    CHECK(answer.get_int("k") == 16);
    CHECK(answer.get_number("p") == 0.25);
    CHECK(!contains(ran.err, "warning"));
    const std::string lines = dir.write("requests.jsonl", "{\"id\": 1, \"question\": \"Who?\"}\n");
    const Ran batch = refrag_run(
        dir, "run" + nano + "--passages bench/demo/passages.jsonl -n 4 --policy recent --batch " + lines);
    REQUIRE(batch.code == 0);
    CHECK(json_lines(batch.out).at(0).get_string("policy") == "recent");

    for (const char* wrong :
         {"--policy model", "--unexpanded compress", "--policy none --unexpanded compress"}) {
        CAPTURE(wrong);
        const Ran refused = refrag_run(dir, "run" + ask + wrong);
        CHECK(refused.code == 2);
        CHECK(line_count(refused.err) == 1);
        CHECK(contains(refused.err, "a plain decoder, without encoder, projector and policy network"));
    }
    const Ran word = refrag_run(dir, "run" + ask + "--chat-template alpaca");
    CHECK(word.code == 2);
    CHECK(contains(word.err, "expected one of plain, llama2, llama3, chatml, mistral; found \"alpaca\""));
    CHECK(refrag_run(dir, "run" + ask + "--policy all --chat-template mistral --system 'Be brief.'").code ==
          0);

    const Ran shown = refrag_run(dir, "inspect" + nano);
    CHECK(shown.code == 0);
    CHECK(contains(shown.out, "a plain decoder: no encoder, projector and policy"));
    CHECK(contains(shown.out, "--policy bm25, --unexpanded drop"));
    CHECK(contains(shown.out, "plain (no chat template found)"));
    const Json inspected = Json::parse(refrag_run(dir, "inspect --json" + nano).out, "inspect");
    CHECK(!inspected.find("encoder"));
    CHECK(inspected.get_string("chat_template") == "plain");

    const Ran eval = refrag_run(dir, "eval qa" + nano +
                                         "--data tests/golden/qa/squad.json --limit 1 -n 4 -o csv "
                                         "--modes refrag,replug");
    CHECK(eval.code == 0);
    CHECK(contains(eval.out, "refrag,0,16,0.25,bm25,drop,"));
    CHECK(contains(eval.out, "replug,0,,,,,"));

    // A template that nobody knows is said, once.
    const PlainDir plain;
    plain.write("chat_template.jinja", "{{ '<|user|>' }}");
    const Ran warned =
        refrag_run(dir, "run -m " + plain.path + " --passages bench/demo/passages.jsonl -n 2 -q 'Who?'");
    CHECK(warned.code == 0);
    CHECK(
        contains(warned.err, "refrag: warning: " + plain.path + ": its chat template is of no known format"));
    CHECK(contains(refrag_run(dir, "inspect -m " + plain.path).out, "chat template of no known format"));
}
