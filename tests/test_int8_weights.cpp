// Networks with 8-bit weights: quantising while loading and loading what was quantised before give the same
// bits; what is wrong in a quantised file is refused by name; and the default model still says what it said.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/int8.h"
#include "cli_test.h"
#include "every_backend.h"
#include "golden.h"
#include "models/roberta.h"
#include "refrag/model.h"
#include "refrag/scoring.h"
#include "safetensors_edit.h"

using namespace refrag;
using namespace refrag_test;

namespace {

using Tensors = std::vector<TestTensor>;

DType dtype_of(const TestTensor& tensor) {
    return tensor.dtype == "F32" ? DType::f32 : tensor.dtype == "F16" ? DType::f16 : DType::bf16;
}

// What weights_tools/quantize.py makes of one matrix.
void quantise(Tensors& tensors, const std::string& name) {
    TestTensor& matrix = tensor_named(tensors, name);
    const int64_t rows = matrix.shape[0], in_dim = matrix.shape[1];
    const size_t row_bytes = matrix.bytes.size() / static_cast<size_t>(rows);
    TestTensor scales{name + "_scale", "F16", {rows, int8_groups(in_dim)}, ""};
    std::string values;
    std::vector<uint16_t> made(int8_row_bytes(in_dim) / 2);
    for (int64_t r = 0; r < rows; ++r) {
        const char* row = matrix.bytes.data() + static_cast<size_t>(r) * row_bytes;
        REQUIRE(quantize_int8_row(made.data(), dtype_of(matrix), row, in_dim) == in_dim);
        values.append(reinterpret_cast<const char*>(int8_row_values(made.data(), in_dim)),
                      static_cast<size_t>(in_dim));
        scales.bytes.append(reinterpret_cast<const char*>(int8_row_scales(made.data())),
                            static_cast<size_t>(int8_groups(in_dim)) * 2);
    }
    matrix.dtype = "I8";
    matrix.bytes = values;
    tensors.push_back(scales);
}

bool is_layer_matrix(const TestTensor& tensor) {
    const std::string_view name = tensor.name;
    return tensor.shape.size() == 2 && !contains(name, "embed") &&
           (contains(name, "layer") || name == "lm_head.weight" || contains(name, "pooler"));
}

// A copy of a network's directory with its layers' matrices quantised.
class QuantisedNetwork {
  public:
    explicit QuantisedNetwork(const std::string& source) : tensors(read_tensors(source)) {
        dir_.write("config.json", read_file(source + "/config.json", 1 << 20));
        std::vector<std::string> names;
        for (const TestTensor& tensor : tensors) {
            if (is_layer_matrix(tensor)) names.push_back(tensor.name);
        }
        REQUIRE(names.size() > 10);
        for (const std::string& name : names) quantise(tensors, name);
        write();
    }
    void write() const { write_tensors(dir_.file("model.safetensors"), tensors); }
    const std::string& path() const { return dir_.path(); }

    Tensors tensors;

  private:
    TempDir dir_;
};

std::vector<float> embeddings_of(const Roberta& encoder, Backend& backend) {
    const std::vector<std::vector<int32_t>> sequences = {{0, 5, 9, 2}, {0, 7, 2}};
    Arena arena(backend);
    const Tensor out = arena.tensor(std::ssize(sequences), encoder.config().dim);
    encoder.encode(backend, sequences, out, arena);
    return download(backend, out);
}

void spoil(TestTensor& scales, size_t index, uint16_t half) {
    std::memcpy(scales.bytes.data() + index * 2, &half, sizeof half);
}

}  // namespace

TEST_CASE("int8 weights: quantised while loading or before gives the same bits") {
    for (const auto& backend : every_backend()) {
        CAPTURE(backend->device().description());
        for (const char* name : {"llama2", "llama-bias"}) {
            const QuantisedNetwork quantised(network_path(name));
            const Llama before(backend->device(), quantised.path());
            const Llama now(backend->device(), network_path(name), {}, WeightFormat::int8);
            const Llama floats(backend->device(), network_path(name));
            const std::vector<int32_t> ids = {1, 5, 7, 11, 3, 8};
            const std::vector<float> logits = logits_of(now, ids);
            CHECK(logits_of(before, ids) == logits);
            CHECK(logits_of(floats, ids) != logits);
            for (const Llama* other : {&before, &floats}) {
                CHECK(other->parameters() == now.parameters());
                CHECK(other->unused_tensors() == now.unused_tensors());
            }
            CHECK(before.weight_bytes() == now.weight_bytes());
            CHECK(now.weight_bytes() < floats.weight_bytes());
        }
        const QuantisedNetwork quantised(network_path("roberta-pooler"));
        const Roberta before(backend->device(), quantised.path(), ChunkPooling::pooler, false);
        const Roberta now(backend->device(), network_path("roberta-pooler"), ChunkPooling::pooler, false, {},
                          WeightFormat::int8);
        CHECK(embeddings_of(before, *backend) == embeddings_of(now, *backend));
        CHECK(before.parameters() == now.parameters());
        CHECK(before.weight_bytes() == now.weight_bytes());
    }
}

TEST_CASE("int8 weights: each fault of a quantised file is refused by name") {
    QuantisedNetwork network(network_path("llama2"));
    const Tensors good = network.tensors;
    const std::string name = "model.layers.1.mlp.down_proj.weight";
    const std::string file = network.path() + "/model.safetensors";
    const auto message = [&](auto&& spoil_tensors) {
        network.tensors = good;
        spoil_tensors(network.tensors);
        network.write();
        return error_of([&] { Llama(cpu().device(), network.path()); });
    };
    CHECK(message([](Tensors&) {}) == "(no error)");
    const TestTensor scales = [&] {
        Tensors tensors = good;
        return tensor_named(tensors, name + "_scale");
    }();
    const std::string shape = str("[", scales.shape[0], ", ", scales.shape[1], "]");
    REQUIRE(scales.shape[1] > 1);

    CHECK(message([&](Tensors& t) {
              std::erase_if(t, [&](const TestTensor& x) { return x.name == name + "_scale"; });
          }) == str(network.path(),
                    ": tensor \"layers.1.mlp.down_proj.weight_scale\" is missing, expected shape ", shape));
    CHECK(message([&](Tensors& t) {
              std::swap(tensor_named(t, name + "_scale").shape[0], tensor_named(t, name + "_scale").shape[1]);
          }) == str(network.path(), ": tensor \"", name, "_scale\": expected shape ", shape, ", found [",
                    scales.shape[1], ", ", scales.shape[0], "]"));
    CHECK(message([&](Tensors& t) { tensor_named(t, name + "_scale").dtype = "BF16"; }) ==
          str(network.path(), ": tensor \"", name, "_scale\": expected dtype F16, found BF16"));
    const std::string at =
        str(file, ": tensor \"", name, "_scale\": expected finite scales of 0 or more, found ");
    const size_t groups = static_cast<size_t>(scales.shape[1]);
    const auto with_scale = [&](size_t index, uint16_t half) {
        return message([&](Tensors& t) { spoil(tensor_named(t, name + "_scale"), index, half); });
    };
    CHECK(with_scale(0, 0x7e00) == at + "NaN at element [0, 0]");
    CHECK(with_scale(groups + 1, 0x7c00) == at + "Infinity at element [1, 1]");
    CHECK(with_scale(groups, 0xfc00) == at + "-Infinity at element [1, 0]");
    CHECK(with_scale(scales.bytes.size() / 2 - 1, 0xbc00) ==
          str(at, "-1 at element [", scales.shape[0] - 1, ", ", groups - 1, "]"));
    CHECK(with_scale(0, 0x8000) == "(no error)");  // -0

    // A scale alone, and an I8 tensor where only floats have a place.
    CHECK(contains(message([&](Tensors& t) {
                       t.push_back({"model.norm.weight_scale", "F16", {1, 1}, std::string(2, '\0')});
                   }),
                   "\"model.norm.weight_scale\" of shape [1, 1] has no place in this network"));
    CHECK(contains(message([&](Tensors& t) {
                       TestTensor& norm = tensor_named(t, "model.norm.weight");
                       norm.bytes.resize(static_cast<size_t>(norm.shape[0]));
                       norm.dtype = "I8";
                   }),
                   "tensor \"model.norm.weight\": expected dtype F32, F16 or BF16, found I8"));
}

TEST_CASE("int8 weights: a weight that no F16 scale reaches is refused with its place") {
    TempDir dir;
    dir.write("config.json", read_file(network_path("llama2") + "/config.json", 1 << 20));
    Tensors tensors = read_tensors(network_path("llama2"));
    const std::string name = "model.layers.0.self_attn.k_proj.weight";
    TestTensor& matrix = tensor_named(tensors, name);
    REQUIRE(matrix.dtype == "F32");
    const auto load = [&](float value, WeightFormat format) {
        std::memcpy(matrix.bytes.data() + static_cast<size_t>(matrix.shape[1] + 2) * 4, &value, 4);
        write_tensors(dir.file("model.safetensors"), tensors);
        return error_of([&] { Llama(cpu().device(), dir.path(), {}, format); });
    };
    CHECK(load(kInt8Largest, WeightFormat::int8) == "(no error)");
    CHECK(load(-9e6f, WeightFormat::as_stored) == "(no error)");
    CHECK(load(-9e6f, WeightFormat::int8) ==
          str(dir.file("model.safetensors"), ": tensor \"", name,
              "\": expected values of at most 8.31901e+06 in "
              "size for int8 weights, found a larger one at element [1, 2]"));
    CHECK(contains(load(std::numeric_limits<float>::quiet_NaN(), WeightFormat::int8),
                   "expected finite values, found NaN at element [1, 2]"));
}

// How far apart two sets of logits are: squared error over the second's variance, and how often the most
// likely token is the same.
struct Distance {
    double nmse;
    double same_top;
};
Distance distance(const std::vector<float>& a, const std::vector<float>& b, size_t vocab) {
    REQUIRE(a.size() == b.size());
    const size_t rows = b.size() / vocab;
    double error = 0, variance = 0;
    size_t same = 0;
    for (size_t r = 0; r < rows; ++r) {
        const auto x = rows_of(a, vocab, r, 1), y = rows_of(b, vocab, r, 1);
        double mean = 0;
        for (const float v : y) mean += static_cast<double>(v) / static_cast<double>(vocab);
        for (size_t i = 0; i < vocab; ++i) {
            const auto x_i = static_cast<double>(x[i]), y_i = static_cast<double>(y[i]);
            error += (x_i - y_i) * (x_i - y_i);
            variance += (y_i - mean) * (y_i - mean);
        }
        same += argmax(x) == argmax(y) ? 1 : 0;
    }
    return {error / variance, static_cast<double>(same) / static_cast<double>(rows)};
}

TEST_CASE("int8 weights: the default model's logits move by what rounding explains") {
    // A step is s = max / 127, and a rounding's variance s^2 / 12. For about normal values the largest of 32
    // is 2.1 to 2.6 standard deviations, so each product's relative squared error is about 3e-5 for its
    // weights, and as much again where x is rounded to 8 bits too. 5 layers make 35 products one after or
    // beside the other, and the head one more: 36 * 6e-5 = 2.2e-3 if nothing damps and nothing amplifies;
    // logits, whose error is taken against their variance over the vocabulary, may be twice as sensitive.
    constexpr double kNmse = 2 * 36 * 6e-5;
    const std::string dir = repo_path("weights_tools/refrag-nano");
    for (const CpuIsa isa :
         {CpuIsa::scalar, CpuIsa::avx2, CpuIsa::avx512, CpuIsa::avx512_bf16, CpuIsa::amx}) {
        for (const CpuInt8 way : {CpuInt8::widen, CpuInt8::bf16, CpuInt8::vnni}) {
            if (!cpu_supports(isa, way) || (isa == CpuIsa::scalar && way != best_cpu_int8(isa))) continue;
            CAPTURE(cpu_isa_name(isa));
            CAPTURE(cpu_int8_name(way));
            const auto backend = make_cpu_backend(2, isa, way);
            const Model floats(backend->device(), dir);
            const Model int8(backend->device(), dir, {}, WeightFormat::int8);
            std::vector<int32_t> ids = {floats.first_id()};
            const auto text = floats.tokenizer().encode_ids(read_file(dir + "/README.md", 1 << 20));
            REQUIRE(text.size() > 400);
            ids.insert(ids.end(), text.begin(), text.begin() + 400);
            const auto vocab = static_cast<size_t>(floats.decoder().config().vocab_size);
            const Distance d =
                distance(logits_of(int8.decoder(), ids), logits_of(floats.decoder(), ids), vocab);
            CHECK(d.nmse < kNmse);
            CHECK(d.nmse > 0);
            // Top tokens change where two were nearly equal.
            CHECK(d.same_top > 0.9);
            // A byte and a sixteenth instead of two: tables and vectors aside.
            CHECK(int8.decoder().weight_bytes() <
                  0.55 * static_cast<double>(floats.decoder().weight_bytes()));
        }
    }
}

TEST_CASE("int8 weights: the command line takes auto and int8, and says so in inspect") {
    TempDir dir;
    const std::string model = "-m weights_tools/refrag-nano";
    const Ran wrong = refrag_run(dir, "inspect " + model + " --weights int4");
    CHECK(wrong.code == 2);
    CHECK(contains(wrong.err, "--weights: expected auto or int8; found \"int4\""));
    const Ran stored = refrag_run(dir, "inspect --json " + model);
    const Ran int8 = refrag_run(dir, "inspect --json " + model + " --weights int8");
    REQUIRE(int8.code == 0);
    const Json a = Json::parse(stored.out, "auto"), b = Json::parse(int8.out, "int8");
    CHECK(a.get_int("parameters") == b.get_int("parameters"));
    for (const char* part : {"decoder", "encoder"}) {
        CHECK(b.get(part).get_int("weight_bytes") < a.get(part).get_int("weight_bytes"));
    }
    for (const char* part : {"projector", "policy"}) {
        CHECK(b.get(part).get_int("weight_bytes") == a.get(part).get_int("weight_bytes"));
    }
    const Ran env = shell_run(dir, "REFRAG_CPU_INT8=fast " + binary() + " inspect " + model);
    CHECK(env.code == 2);
    CHECK(contains(env.err, "expected widen, bf16 or vnni"));
}
