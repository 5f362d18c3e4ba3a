// The projector phi: chunk embeddings [n, d_enc] to chunk rows of the decoder [n, d_dec], e =
// fc2(gelu(fc1(c))) (paper, B.2).
#pragma once

#include <string>

#include "models/layers.h"

namespace refrag {

struct ProjectorWeights {
    Linear fc1;  // [d_dec, d_enc]
    Linear fc2;  // [d_dec, d_dec]
};

class Projector {
  public:
    // Loads DIR/projector.safetensors: fc1.weight [d_dec, d_enc], fc2.weight [d_dec, d_dec], with biases.
    Projector(Device& device, const std::string& dir, int32_t d_enc, int32_t d_dec,
              const LoadedBytes& loaded = {});
    // The same network with weights from elsewhere.
    Projector(int32_t d_enc, int32_t d_dec, WeightSource& weights);

    // out [n, d_dec] and chunk_emb [n, d_enc] in device memory; on `backend`. Any number of threads may call
    // it, each with a queue and an arena of its own.
    void forward(Backend& backend, Tensor out, Tensor chunk_emb, Arena& arena) const;
    uint64_t parameters() const { return footprint_.parameters; }
    uint64_t weight_bytes() const { return footprint_.bytes; }  // in the device's memory

    // Every parameter of a projector of these dimensions, in order.
    static void describe(ProjectorWeights& weights, int32_t d_enc, int32_t d_dec, ParameterVisitor& visit);
    static WeightCount count(int32_t d_enc, int32_t d_dec);

  private:
    void load(WeightSource& weights, int32_t d_enc);

    int32_t d_dec_;
    ProjectorWeights weights_;
    Footprint footprint_;
};

}  // namespace refrag
