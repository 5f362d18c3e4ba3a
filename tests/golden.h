// What the network tests share: the goldens of tests/golden/ (written by weights_tools/make_golden.py),
// values to and from a backend's memory, and a decoder that is fed call by call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu_backend.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "models/llama.h"
#include "refrag/model.h"
#include "support.h"

namespace refrag_test {

// The CPU backend at every instruction set this machine has, plain loops first. Two threads, so that the
// division of work is under test too.
inline std::span<const std::unique_ptr<refrag::Backend>> cpu_levels() {
    static const auto backends = [] {
        std::vector<std::unique_ptr<refrag::Backend>> list;
        for (const auto isa : {refrag::CpuIsa::scalar, refrag::CpuIsa::avx2, refrag::CpuIsa::avx512}) {
            if (refrag::cpu_supports(isa)) list.push_back(refrag::make_cpu_backend(2, isa));
        }
        return list;
    }();
    return backends;
}
// The best of them.
inline refrag::Backend& cpu() {
    return *cpu_levels().back();
}

inline std::string network_path(const std::string& name) {
    return repo_path("tests/golden/networks/" + name);
}
inline std::string tiny_refrag_path() {
    return repo_path("tests/golden/tiny-refrag");
}

inline std::vector<int32_t> ids_of(const refrag::Json& array) {
    std::vector<int32_t> ids;
    for (size_t i = 0; i < array.as_array().size(); ++i) {
        ids.push_back(static_cast<int32_t>(array.at(i).as_int(INT32_MIN, INT32_MAX)));
    }
    return ids;
}
inline std::vector<std::vector<int32_t>> id_lists_of(const refrag::Json& array) {
    std::vector<std::vector<int32_t>> lists;
    for (size_t i = 0; i < array.as_array().size(); ++i) lists.push_back(ids_of(array.at(i)));
    return lists;
}

// networks/NAME.json and networks/NAME.safetensors.
struct Golden {
    explicit Golden(const std::string& name)
        : json(refrag::Json::parse_file(network_path(name + ".json"))),
          tensors(refrag::WeightFiles::open(network_path(name + ".safetensors"))) {}
    std::vector<int32_t> ids(std::string_view key) const { return ids_of(json.get(key)); }
    std::vector<float> values(std::string_view name) const { return tensors.read_f32(name); }

    refrag::Json json;
    refrag::WeightFiles tensors;
};

// The largest absolute difference; infinite where the sizes differ or a NaN is on either side.
inline double max_difference(std::span<const float> a, std::span<const float> b) {
    if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
    double largest = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        const double difference = std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
        if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
        largest = std::max(largest, difference);
    }
    return largest;
}

// Rows [begin, begin + n) of a row-major matrix.
inline std::span<const float> rows_of(const std::vector<float>& values, size_t cols, size_t begin, size_t n) {
    return std::span(values).subspan(begin * cols, n * cols);
}

inline std::vector<float> download(refrag::Backend& backend, const refrag::Tensor& x) {
    std::vector<float> values(static_cast<size_t>(x.size()));
    if (!values.empty()) backend.download(values.data(), x.data, values.size() * sizeof(float));
    return values;
}
inline refrag::Tensor upload(refrag::Backend& backend, refrag::Arena& arena, const std::vector<float>& values,
                             int64_t cols) {
    const refrag::Tensor x = arena.tensor(static_cast<int64_t>(values.size()) / cols, cols);
    if (!values.empty()) backend.upload(x.data, values.data(), x.bytes());
    return x;
}

inline int32_t argmax(std::span<const float> row) {
    return static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
}

// A LLaMA with its KV cache and scratch. `chunk_rows` (may be empty) are the rows that negative sources name.
class Decoder {
  public:
    // What one sequence of a call brings: rows for a KV slot.
    struct Part {
        int32_t slot;
        std::vector<int32_t> source;
    };

    Decoder(refrag::Backend& backend, const std::string& dir, int32_t n_slots = 1)
        : backend_(backend),
          model(backend.device(), dir),
          kv(model.make_kv_cache(backend, n_slots, model.config().max_seq_len)),
          arena_(backend) {}

    void set_chunk_rows(const std::vector<float>& values) { chunk_rows_ = values; }

    // Feeds all parts in one call; logits of all rows, [rows, vocab_size].
    std::vector<float> feed(const std::vector<Part>& parts) {
        refrag::BatchPlan plan;
        std::vector<int32_t> source;
        for (const Part& part : parts) {
            const auto n = static_cast<int32_t>(part.source.size());
            kv.reserve(part.slot, n);
            plan.add_cached(part.slot, kv.length(part.slot), n);
            source.insert(source.end(), part.source.begin(), part.source.end());
        }
        const refrag::ArenaScope scratch(arena_);
        const refrag::Tensor chunk_rows = upload(backend_, arena_, chunk_rows_, model.config().dim);
        const refrag::Tensor hidden = model.forward(backend_, plan, source, chunk_rows, kv, arena_);
        for (const Part& part : parts) kv.advance(part.slot, static_cast<int32_t>(part.source.size()));
        return download(backend_, model.logits(backend_, hidden, arena_));
    }
    std::vector<float> feed(int32_t slot, const std::vector<int32_t>& source) {
        return feed({Part{slot, source}});
    }

    // n greedy steps in slot 0 after the rows of `source`, from an empty slot, one row a call.
    std::vector<int32_t> greedy(const std::vector<int32_t>& source, size_t n) {
        kv.truncate(0, 0);
        std::vector<float> logits = feed(0, source);
        std::vector<int32_t> ids;
        while (ids.size() < n) {
            ids.push_back(argmax(std::span(logits).last(vocab())));
            logits = feed(0, {ids.back()});
        }
        return ids;
    }

    size_t vocab() const { return static_cast<size_t>(model.config().vocab_size); }

  private:
    refrag::Backend& backend_;

  public:
    refrag::Llama model;
    refrag::KvCache kv;

  private:
    refrag::Arena arena_;
    std::vector<float> chunk_rows_;
};

// Logits of all ids, read in one call on the model's device, [ids.size(), vocab_size].
inline std::vector<float> logits_of(const refrag::Llama& model, const std::vector<int32_t>& ids) {
    const std::unique_ptr<refrag::Backend> backend = model.device().make_backend();
    refrag::KvCache kv = model.make_kv_cache(*backend, 1, std::ssize(ids));
    refrag::Arena arena(*backend);
    refrag::BatchPlan plan;
    const auto n = static_cast<int32_t>(ids.size());
    kv.reserve(0, n);
    plan.add_cached(0, 0, n);
    const refrag::Tensor hidden = model.forward(*backend, plan, ids, refrag::Tensor{}, kv, arena);
    return download(*backend, model.logits(*backend, hidden, arena));
}

// The smallest REFRAG model on the CPU.
struct TinyRefrag {
    refrag::Backend& backend = cpu();
    refrag::Model model{backend.device(), tiny_refrag_path()};
};

}  // namespace refrag_test
