// See projector.h.
#include "models/projector.h"

#include "io/file.h"

namespace refrag {

Projector::Projector(Device& device, const std::string& dir, int32_t d_enc, int32_t d_dec,
                     const LoadedBytes& loaded)
    : d_dec_(d_dec) {
    WeightLoader weights(device, path_join(dir, "projector.safetensors"), "", loaded);
    load(weights, d_enc);
}

Projector::Projector(int32_t d_enc, int32_t d_dec, WeightSource& weights) : d_dec_(d_dec) {
    load(weights, d_enc);
}

void Projector::describe(ProjectorWeights& w, int32_t d_enc, int32_t d_dec, ParameterVisitor& visit) {
    const auto plain = [](const char* name, int64_t out_dim, int64_t in_dim) {
        return MatrixSpec{name, out_dim, in_dim, Use::every_row, false};
    };
    visit.linear(plain("fc1", d_dec, d_enc), w.fc1);
    visit.linear(plain("fc2", d_dec, d_dec), w.fc2);
}

WeightCount Projector::count(int32_t d_enc, int32_t d_dec) {
    ProjectorWeights none;
    CountParameters count;
    describe(none, d_enc, d_dec, count);
    return count.count();
}

void Projector::load(WeightSource& weights, int32_t d_enc) {
    LoadParameters load(weights);
    describe(weights_, d_enc, d_dec_, load);
    weights.finish({});
    footprint_ = load.footprint();
}

void Projector::forward(Backend& backend, Tensor out, Tensor chunk_emb, Arena& arena) const {
    const ArenaScope scratch(arena);
    const Tensor hidden = arena.tensor(chunk_emb.rows, d_dec_);
    backend.linear_gelu(hidden, chunk_emb, *weights_.fc1.weight, weights_.fc1.bias.view());
    backend.linear(out, hidden, *weights_.fc2.weight, weights_.fc2.bias.view());
}

}  // namespace refrag
