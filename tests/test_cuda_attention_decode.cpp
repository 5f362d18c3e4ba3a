// The attention kernels that decode, run on the CPU, against a softmax in double (cuda_attention_test.h).
#include "cuda_attention_test.h"

using namespace refrag_test;
using namespace refrag_test::cuda_attention;

TEST_CASE("cuda attention: decode over ragged batches") {
    uint64_t seed = 1;
    for (const Shape& shape :
         {Shape{2, 2, 8, DType::f32}, Shape{2, 1, 64, DType::bf16}, Shape{4, 1, 72, DType::f16},
          Shape{8, 1, 128, DType::bf16}, Shape{3, 1, 256, DType::f32}, Shape{1, 1, 256, DType::bf16},
          Shape{16, 1, 80, DType::f32}, Shape{12, 1, 64, DType::f16}, Shape{2, 2, 128, DType::f32},
          Shape{4, 2, 24, DType::bf16}, Shape{4, 1, 200, DType::f16}, Shape{8, 1, 16, DType::f32},
          Shape{2, 1, 64, DType::bf16, 1}, Shape{4, 2, 64, DType::bf16, 100},
          Shape{2, 2, 128, DType::f32, 256}, Shape{8, 1, 64, DType::f16, 300}}) {
        CAPTURE(shape.dim);
        CAPTURE(shape.heads);
        set_seed(seed++);
        const Call call(shape,
                        {{1, 0},
                         {1, 30},
                         {2, 300},
                         {1, 31},
                         {0, 50},
                         {1, 32},
                         {1, 254},
                         {1, 0, false},
                         {1, 255, true, 7},
                         {1, 256, true, 1},
                         {1, 512, true, 300}},
                        static_cast<uint32_t>(seed * 7));
        const Floats out = decode(call);
        check(call, out, false, one_row);
        if (shape.heads > 4) continue;
        // A launch for longer sequences than there are, in another order of threads.
        set_seed(seed + 100);
        CHECK(same_bits(decode(call, 1500), out));
    }
}

TEST_CASE("cuda attention: a row decoded alone has the bits that it has in a batch") {
    const Shape shape{4, 2, 64, DType::bf16};
    const Call batch(shape, {{1, 20}, {1, 600}, {1, 255}}, 61);
    const Floats out = decode(batch);
    for (size_t s = 0; s < 3; ++s) {
        Call alone(shape, {{1, batch.parts()[s].start}}, 62);
        for (int32_t h = 0; h < 2; ++h) {
            for (int32_t e = 0; e < alone.entries(0, h); ++e) {
                for (int32_t d = 0; d < 64; ++d) {
                    alone.key(0, h, e, d) = batch.key(s, h, e, d);
                    alone.value(0, h, e, d) = batch.value(s, h, e, d);
                }
            }
        }
        alone.write_pages();
        alone.q = rows_of(batch, batch.q, s);
        CHECK(same_bits(decode(alone), rows_of(batch, out, s)));
    }
}

TEST_CASE("cuda attention: a captured decode reads the lengths that it finds") {
    const Shape shape{2, 1, 64, DType::bf16};
    Call call(shape, {{1, 299}}, 63);
    const Floats at_300 = decode(call, 1024);
    call.set_length(0, 200);
    const Floats at_200 = decode(call, 1024);
    CHECK(!same_bits(at_300, at_200));

    Floats out = call.untouched();
    AttentionArgs a = call.args(out);
    a.max_entries = 1024;
    Floats scratch(static_cast<size_t>(gpu::decode_scratch_floats(a)), kNan);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal);
    gpu::attention_decode(a, shape.dtype, scratch.data(), stream());
    cudaStreamEndCapture(stream(), &graph);
    cudaGraphInstantiate(&exec, graph, 0);
    CHECK(out == call.untouched());
    cudaGraphLaunch(exec, stream());
    CHECK(same_bits(out, at_200));
    call.set_length(0, 300);
    cudaGraphLaunch(exec, stream());
    CHECK(same_bits(out, at_300));
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
}

TEST_CASE("cuda attention: in decode, a NaN reaches its head, or its element, and no other") {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        const Shape shape{4, 2, 64, dtype};
        for (const int32_t bad : {0, 40, 255, 256, 299}) {
            CAPTURE(bad);
            Call call(shape, {{1, 299}, {1, 10}}, 64);
            const Floats clean = decode(call);
            const float key = std::exchange(call.key(0, 1, bad, 9), kNan);
            call.write_pages();
            const Floats k_out = decode(call);
            call.key(0, 1, bad, 9) = key;
            call.value(0, 1, bad, 9) = kInf;
            call.write_pages();
            const Floats v_out = decode(call);
            int64_t wrong = 0;
            for (size_t i = 0; i < clean.size(); ++i) {
                const bool reads = i < 256 && i / 128 == 1;
                wrong += same_bits(k_out[i], reads ? kNan : clean[i]) ? 0 : 1;
                wrong += same_bits(v_out[i], reads && i % 64 == 9 ? kInf : clean[i]) ? 0 : 1;
            }
            CHECK(wrong == 0);
        }
    }
}
