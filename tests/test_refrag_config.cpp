// refrag.json is strict: every key known, of its type and within its range, or a message with file, key,
// expected and found.
#include "config_edit.h"
#include "models/refrag_config.h"

using namespace refrag;
using namespace refrag_test;

namespace {

// The sections, each as fields, so that a test can change one field deep inside.
struct Sections {
    Fields root = {{"format", "1"},
                   {"chunk_len", "16"},
                   {"chunk_lens", "[8, 16]"},
                   {"chunk_unit", "\"decoder_tokens\""},
                   {"expand_fraction", "0.1"},
                   {"segment_order", "[\"passages\", \"question\"]"}};
    Fields encoder = {{"vocabulary", "\"own\""},
                      {"special_tokens", "true"},
                      {"pooling", "\"cls\""},
                      {"normalize", "false"}};
    Fields projector = {{"activation", "\"gelu\""}};
    Fields policy = {{"n_layers", "2"},     {"n_heads", "4"},     {"dim", "64"},
                     {"hidden_dim", "128"}, {"norm_eps", "1e-5"}, {"sees_question", "true"}};
    Fields prompt = {{"before", "\"a\""},
                     {"passage_prefix", "\"b\""},
                     {"passage_suffix", "\"c\""},
                     {"question_prefix", "\"d\""},
                     {"question_suffix", "\"e\""}};
};

const ConfigFile& file() {
    static const ConfigFile config("refrag.json");
    return config;
}

RefragConfig load(const Sections& s) {
    file().write(with({{"encoder", json_of(s.encoder)},
                       {"projector", json_of(s.projector)},
                       {"policy", json_of(s.policy)},
                       {"template", json_of(s.prompt)}},
                      s.root));
    return load_refrag_config(file().dir());
}

// The configuration, or the message, after changing fields of one section.
RefragConfig changed(Fields Sections::*section, const Fields& changes) {
    Sections s;
    s.*section = with(s.*section, changes);
    return load(s);
}
std::string error(Fields Sections::*section, const Fields& changes) {
    return error_of([&] { changed(section, changes); });
}

const std::pair<Fields Sections::*, std::string> kSections[] = {{&Sections::root, ""},
                                                                {&Sections::encoder, "encoder"},
                                                                {&Sections::projector, "projector"},
                                                                {&Sections::policy, "policy"},
                                                                {&Sections::prompt, "template"}};

}  // namespace

TEST_CASE("refrag.json: what is read") {
    const RefragConfig c = load(Sections{});
    CHECK(c.chunk_len == 16);
    CHECK(c.chunk_lens == std::vector<int32_t>{8, 16});
    CHECK_FALSE(c.shared_vocabulary);
    CHECK(c.encoder_special_tokens);
    CHECK(c.pooling == ChunkPooling::cls);
    CHECK_FALSE(c.normalize);
    CHECK(c.policy.n_layers == 2);
    CHECK(c.policy.n_heads == 4);
    CHECK(c.policy.dim == 64);
    CHECK(c.policy.hidden_dim == 128);
    CHECK(c.policy.norm_eps == 1e-5f);
    CHECK(c.policy.sees_question);
    CHECK(c.expand_fraction == 0.1);
    CHECK(c.prompt.before == "a");
    CHECK(c.prompt.passage_prefix == "b");
    CHECK(c.prompt.passage_suffix == "c");
    CHECK(c.prompt.question_prefix == "d");
    CHECK(c.prompt.question_suffix == "e");
    CHECK(c.order == SegmentOrder::passages_first);

    CHECK(changed(&Sections::encoder, {{"vocabulary", "\"shared\""}}).shared_vocabulary);
    CHECK_FALSE(changed(&Sections::encoder, {{"special_tokens", "false"}}).encoder_special_tokens);
    CHECK(changed(&Sections::encoder, {{"pooling", "\"mean\""}}).pooling == ChunkPooling::mean);
    CHECK(changed(&Sections::encoder, {{"pooling", "\"pooler\""}}).pooling == ChunkPooling::pooler);
    CHECK(changed(&Sections::encoder, {{"normalize", "true"}}).normalize);
    CHECK_FALSE(changed(&Sections::policy, {{"sees_question", "false"}}).policy.sees_question);
    CHECK(changed(&Sections::root, {{"segment_order", "[\"question\", \"passages\"]"}}).order ==
          SegmentOrder::question_first);
}

TEST_CASE("refrag.json: what may be left out") {
    CHECK(changed(&Sections::root, {{"chunk_lens", ""}}).chunk_lens == std::vector<int32_t>{16});
    CHECK(changed(&Sections::encoder, {{"special_tokens", ""}}).encoder_special_tokens);
    CHECK_FALSE(changed(&Sections::encoder, {{"normalize", ""}}).normalize);
    CHECK(changed(&Sections::policy, {{"norm_eps", ""}}).policy.norm_eps == 1e-5f);
    const PromptTemplate bare = changed(&Sections::prompt, {{"before", ""},
                                                            {"passage_prefix", ""},
                                                            {"passage_suffix", ""},
                                                            {"question_prefix", ""},
                                                            {"question_suffix", ""}})
                                    .prompt;
    CHECK(bare.before + bare.passage_prefix + bare.passage_suffix + bare.question_prefix +
              bare.question_suffix ==
          "");
}

TEST_CASE("refrag.json: encoder, projector and policy are there together or not at all") {
    const Fields root = with({{"template", json_of(Sections{}.prompt)}}, Sections{}.root);
    file().write(root);
    const RefragConfig c = load_refrag_config(file().dir());
    CHECK_FALSE(c.has_encoder);
    CHECK(c.chunk_lens == std::vector<int32_t>{8, 16});
    CHECK(c.expand_fraction == 0.1);
    CHECK(c.prompt.question_suffix == "e");
    CHECK(load(Sections{}).has_encoder);
    for (const char* missing : {"encoder", "projector", "policy"}) {
        Sections s;
        file().write(with(with({{"encoder", json_of(s.encoder)},
                                {"projector", json_of(s.projector)},
                                {"policy", json_of(s.policy)}},
                               root),
                          {{missing, ""}}));
        CHECK(contains(error_of([] { load_refrag_config(file().dir()); }),
                       str("expected the key \"", missing, "\", found none")));
    }
}

TEST_CASE("refrag.json: every other key is needed") {
    const std::pair<Fields Sections::*, Fields> needed[] = {
        {&Sections::root,
         {{"format", ""},
          {"chunk_len", ""},
          {"chunk_unit", ""},
          {"expand_fraction", ""},
          {"segment_order", ""}}},
        {&Sections::encoder, {{"vocabulary", ""}, {"pooling", ""}}},
        {&Sections::projector, {{"activation", ""}}},
        {&Sections::policy,
         {{"n_layers", ""}, {"n_heads", ""}, {"dim", ""}, {"hidden_dim", ""}, {"sees_question", ""}}}};
    for (const auto& [section, keys] : needed) {
        for (const auto& [key, nothing] : keys) {
            const std::string message = error(section, {{key, nothing}});
            CHECK(contains(message, file().path()));
            CHECK(contains(message, str("expected the key \"", key, "\", found none")));
        }
    }
    for (const char* section : {"encoder", "projector", "policy", "template"}) {
        CHECK(contains(error(&Sections::root, {{section, "null"}}),
                       file().key(section) + ": expected an object, found null"));
    }
}

TEST_CASE("refrag.json: an unknown key is refused in every section, with those that are known") {
    for (const auto& [section, name] : kSections) {
        const std::string message = error(section, {{"chunk_length", "16"}});
        const std::string where = name.empty() ? file().path() : file().key(name);
        CHECK(contains(message, where + ": unknown key \"chunk_length\", expected one of: "));
    }
    CHECK(contains(error(&Sections::root, {{"chunk_length", "16"}}), "chunk_len, chunk_lens, chunk_unit"));
}

TEST_CASE("refrag.json: a value of another type is refused in every field") {
    const Sections good;
    for (const auto& [section, name] : kSections) {
        for (const auto& [key, value] : good.*section) {
            // An object fits nowhere below the root.
            const std::string message = error(section, {{key, "{\"x\": 1}"}});
            const std::string path = name.empty() ? key : name + "." + key;
            CHECK_MESSAGE(contains(message, file().key(path) + ": expected"), message);
            CHECK_MESSAGE(contains(message, "found an object"), message);
        }
    }
}

TEST_CASE("refrag.json: every number at the ends of its range and beyond") {
    const auto root = [](const Fields& changes) { return error(&Sections::root, changes); };
    check_integer_range(file(), "format", 1, 1, root);
    check_integer_range(file(), "chunk_len", 1, 4096, root, {{"chunk_lens", ""}});
    check_number_range(file(), "expand_fraction", {"-0.001", "0", "1", "1.001"}, root);
    const auto policy = [](const Fields& changes) { return error(&Sections::policy, changes); };
    check_integer_range(file(), "policy.n_layers", 1, 1024, policy);
    check_integer_range(file(), "policy.n_heads", 1, 1024, policy, {{"dim", "1024"}});
    check_integer_range(file(), "policy.hidden_dim", 1, 1 << 20, policy);
    check_integer_range(file(), "policy.dim", 2, 1 << 20, policy, {{"n_heads", "1"}});
    check_number_range(file(), "policy.norm_eps", {"-1e-9", "0", "1", "1.001"}, policy);
    const auto lens = [&](const std::string& text) { return root({{"chunk_lens", text}}); };
    CHECK(lens("[1, 16, 4096]") == "(no error)");
    CHECK(contains(lens("[16, 0]"), file().key("chunk_lens[1]") + ": expected"));
    CHECK(contains(lens("[4097, 16]"), file().key("chunk_lens[0]") + ": expected"));
}

TEST_CASE("refrag.json: values that do not go together") {
    CHECK(error(&Sections::root, {{"chunk_lens", "[8, 32]"}}) ==
          file().key("chunk_lens") + ": expected a list that holds chunk_len = 16, found an array of 2");
    CHECK(contains(error(&Sections::root, {{"chunk_lens", "[]"}}), "a list that holds chunk_len = 16"));
    CHECK(error(&Sections::policy, {{"n_heads", "5"}}) ==
          file().key("policy.dim") + ": expected a multiple of n_heads = 5, found 64");
    CHECK(contains(error(&Sections::policy, {{"n_heads", "1"}, {"dim", "63"}}),
                   file().key("policy.dim") + ": expected an even number"));
    CHECK(error(&Sections::root, {{"format", "2"}}) ==
          file().key("format") + ": expected 1 (the only format this version reads), found 2");
    CHECK(error(&Sections::encoder, {{"pooling", "\"max\""}}) ==
          file().key("encoder.pooling") + ": expected \"cls\" or \"mean\" or \"pooler\", found \"max\"");
    CHECK(contains(error(&Sections::encoder, {{"vocabulary", "\"common\""}}), "\"own\" or \"shared\""));
    CHECK(contains(error(&Sections::projector, {{"activation", "\"gelu_new\""}}),
                   file().key("projector.activation") + ": expected \"gelu\""));
    CHECK(contains(error(&Sections::root, {{"chunk_unit", "\"words\""}}), "expected \"decoder_tokens\""));
    for (const char* order : {"[]", "[\"passages\"]", "[\"passages\", \"passages\"]",
                              "[\"passages\", \"question\", \"question\"]", "[\"question\", \"answer\"]"}) {
        CHECK(contains(error(&Sections::root, {{"segment_order", order}}),
                       file().key("segment_order") + ": expected [\"passages\", \"question\"] or"));
    }
    CHECK(contains(error(&Sections::root, {{"segment_order", "[1, 2]"}}), "segment_order[0]"));
}

TEST_CASE("refrag.json: the committed models load") {
    CHECK(load_refrag_config(repo_path("tests/golden/tiny-refrag")).policy.sees_question);
    const TempDir temp;
    CHECK(contains(error_of([&] { load_refrag_config(temp.path()); }), temp.file("refrag.json")));
}
