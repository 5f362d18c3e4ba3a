// See gguf_weights.h.
#include "models/gguf_weights.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/round.h"
#include "io/file.h"
#include "models/gguf_config.h"

namespace refrag {
namespace {

using Names = std::pair<std::string_view, std::string_view>;  // Hugging Face's, the file's

constexpr std::array<Names, 3> kOuter = {{{"embed_tokens.weight", "token_embd.weight"},
                                          {"norm.weight", "output_norm.weight"},
                                          {"lm_head.weight", "output.weight"}}};
constexpr std::array<Names, 11> kLayer = {{{"input_layernorm", "attn_norm"},
                                           {"self_attn.q_norm", "attn_q_norm"},
                                           {"self_attn.k_norm", "attn_k_norm"},
                                           {"self_attn.q_proj", "attn_q"},
                                           {"self_attn.k_proj", "attn_k"},
                                           {"self_attn.v_proj", "attn_v"},
                                           {"self_attn.o_proj", "attn_output"},
                                           {"post_attention_layernorm", "ffn_norm"},
                                           {"mlp.gate_proj", "ffn_gate"},
                                           {"mlp.up_proj", "ffn_up"},
                                           {"mlp.down_proj", "ffn_down"}}};

// Where row `row` of a projection lies whose heads' halves are interleaved: pair i of a head has its first
// half in the head's row 2 i, its second in row 2 i + 1.
int64_t interleaved_row(int64_t row, int64_t head_rows) {
    const int64_t in_head = row % head_rows, half_rows = head_rows / 2;
    return row - in_head + 2 * (in_head % half_rows) + in_head / half_rows;
}

}  // namespace

std::string gguf_name(std::string_view name) {
    for (const auto& [ours, theirs] : kOuter)
        if (name == ours) return std::string(theirs);
    constexpr std::string_view layers = "layers.";
    if (!name.starts_with(layers)) return "";
    name.remove_prefix(layers.size());
    const size_t dot = name.find('.');
    const size_t last = name.rfind('.');
    if (dot == std::string_view::npos || last <= dot) return "";
    const std::string_view part = name.substr(dot + 1, last - dot - 1);
    for (const auto& [ours, theirs] : kLayer)
        if (part == ours) return str("blk.", name.substr(0, dot), ".", theirs, name.substr(last));
    return "";
}

GgufWeights::GgufWeights(Device& device, std::shared_ptr<const GgufFile> file, const DecoderConfig& config,
                         LoadedBytes loaded, WeightFormat format)
    : StoredWeights(device, std::move(loaded), format),
      file_(std::move(file)),
      is_interleaved_(config.family == "llama"),
      n_heads_(config.n_heads),
      n_kv_heads_(config.n_kv_heads) {}

bool GgufWeights::has(std::string_view name) const {
    return file_->find(gguf_name(name)) != nullptr;
}

const GgufTensor& GgufWeights::find(std::string_view name, const std::vector<int64_t>& shape) {
    const std::string there = gguf_name(name);
    const GgufTensor* const tensor = file_->find(there);
    REFRAG_CHECK(tensor != nullptr, Status::bad_input, printable(file_->path()), ": tensor \"",
                 there.empty() ? std::string(name) : there, "\" is missing, expected shape ",
                 shape_text(shape));
    REFRAG_CHECK(tensor->shape == shape, Status::bad_input, place_of(*tensor), ": expected shape ",
                 shape_text(shape), ", found ", tensor->shape_text());
    used_.insert(there);
    return *tensor;
}

int64_t GgufWeights::interleaved_heads(std::string_view name) const {
    if (!is_interleaved_) return 0;
    if (name.find(".self_attn.q_proj.") != std::string_view::npos) return n_heads_;
    if (name.find(".self_attn.k_proj.") != std::string_view::npos) return n_kv_heads_;
    return 0;
}

StoredMatrix GgufWeights::open_matrix(std::string_view name, int64_t out_dim, int64_t in_dim) {
    const GgufTensor& tensor = find(name, {out_dim, in_dim});
    StoredMatrix stored;
    stored.place = place_of(tensor);
    stored.description = str(gguf_type_info(tensor.type).name, " ", tensor.shape_text());
    stored.kept = tensor.type == GgufType::f32   ? DType::f32
                  : tensor.type == GgufType::f16 ? DType::f16
                                                 : DType::bf16;
    const bool is_float = stored.kept != DType::bf16 || tensor.type == GgufType::bf16;
    stored.exact = is_float ? stored.kept : DType::f32;
    stored.read = [this, &tensor, heads = interleaved_heads(name)](DType dtype, int64_t row, int64_t n,
                                                                   void* dst) {
        read_rows(tensor, heads, dtype, row, n, dst);
    };
    return stored;
}

void GgufWeights::read_rows(const GgufTensor& tensor, int64_t heads, DType dtype, int64_t row, int64_t n,
                            void* dst) {
    const int64_t in_dim = tensor.shape[1];
    const auto columns = static_cast<size_t>(in_dim);
    const int64_t piece_rows = heads > 0 ? 1 : std::max<int64_t>(1, kPieceValues / in_dim);
    std::vector<float> piece(static_cast<size_t>(std::min(piece_rows, n)) * columns);
    const std::string place = place_of(tensor);
    auto* to = static_cast<std::byte*>(dst);
    for (int64_t begin = row; begin < row + n; begin += piece_rows) {
        const int64_t rows = std::min(piece_rows, row + n - begin);
        const int64_t at = heads > 0 ? interleaved_row(begin, tensor.shape[0] / heads) : begin;
        const size_t n_values = static_cast<size_t>(rows) * columns;
        file_->read_rows(tensor, at, rows, piece.data());
        check_finite(place, tensor.shape, DType::f32, piece.data(), at * in_dim, rows * in_dim);
        round_values(dtype, piece.data(), n_values, to);
        add_to_digest(to, n_values * dtype_bytes(dtype));
        to += n_values * dtype_bytes(dtype);
        tell(tensor.bytes / static_cast<uint64_t>(tensor.shape[0]) * static_cast<uint64_t>(rows));
    }
}

StoredVector GgufWeights::open_vector(std::string_view name, int64_t n) {
    const GgufTensor& tensor = find(name, {n});
    std::vector<float> values(static_cast<size_t>(n));
    file_->read_rows(tensor, 0, 1, values.data());
    check_finite(place_of(tensor), tensor.shape, DType::f32, values.data(), 0, n);
    if (const int64_t heads = interleaved_heads(name); heads > 0) {
        const std::vector<float> interleaved = values;
        for (int64_t row = 0; row < n; ++row)
            values[static_cast<size_t>(row)] =
                interleaved[static_cast<size_t>(interleaved_row(row, n / heads))];
    }
    return {str(gguf_type_info(tensor.type).name, " ", tensor.shape_text()), std::move(values)};
}

std::vector<std::string> GgufWeights::finish(const std::vector<KnownUnused>&) const {
    for (const GgufTensor& tensor : file_->tensors()) {
        REFRAG_CHECK(used_.contains(tensor.name) || tensor.name == kGgufRopeFactors, Status::bad_input,
                     place_of(tensor), " of shape ", tensor.shape_text(), " has no place in this network");
    }
    return {};
}

std::string GgufWeights::place_of(const GgufTensor& tensor) const {
    return str(printable(file_->path()), ": tensor \"", printable(tensor.name), "\"");
}

}  // namespace refrag
