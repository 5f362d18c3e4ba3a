// See cublas.cuh.
#include "cublas.cuh"

#include <cublas_v2.h>
#include <dlfcn.h>

#include <iterator>

namespace refrag::REFRAG_CUDA {
namespace {

struct Library {
    decltype(&cublasCreate_v2) create = nullptr;
    decltype(&cublasDestroy_v2) destroy = nullptr;
    decltype(&cublasSetStream_v2) set_stream = nullptr;
    decltype(&cublasSetWorkspace_v2) set_workspace = nullptr;
    decltype(&cublasSetMathMode) set_math_mode = nullptr;
    // Written out, because the header has overloads of it.
    cublasStatus_t (*gemm)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*,
                           const void*, cudaDataType, int, const void*, cudaDataType, int, const void*, void*,
                           cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t) = nullptr;
    decltype(&cublasGetStatusString) status_string = nullptr;
};

// The toolkit that this was built with first: its enumerations are those of the calls below.
const Library& library() {
    static const Library loaded = [] {
        const std::string major = str("libcublas.so.", CUBLAS_VER_MAJOR);
        const std::string names[] = {major, "libcublas.so", "/usr/local/cuda/lib64/" + major};
        void* file = nullptr;
        std::string tried;
        for (const std::string& name : names) {
            if (file == nullptr) file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
            tried += (tried.empty() ? "" : ", ") + name;
        }
        REFRAG_CHECK(file != nullptr, Status::runtime, "cannot open cuBLAS (tried ", tried, "): ", dlerror());
        Library found;
        const auto find = [&](auto& function, const char* name) {
            void* const symbol = dlsym(file, name);
            REFRAG_CHECK(symbol != nullptr, Status::runtime, "cuBLAS has no ", name);
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
        };
        find(found.create, "cublasCreate_v2");
        find(found.destroy, "cublasDestroy_v2");
        find(found.set_stream, "cublasSetStream_v2");
        find(found.set_workspace, "cublasSetWorkspace_v2");
        find(found.set_math_mode, "cublasSetMathMode");
        find(found.gemm, "cublasGemmEx");
        find(found.status_string, "cublasGetStatusString");
        return found;
    }();
    return loaded;
}

void check(cublasStatus_t status, const char* call) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fail(status == CUBLAS_STATUS_ALLOC_FAILED ? Status::out_of_memory : Status::runtime, "cuBLAS: ", call,
         ": ", library().status_string(status));
}

cudaDataType type_of(DType dtype) {
    return dtype == DType::bf16 ? CUDA_R_16BF : dtype == DType::f16 ? CUDA_R_16F : CUDA_R_32F;
}

}  // namespace

Cublas::Cublas(cudaStream_t stream, void* workspace, size_t workspace_bytes) {
    cublasHandle_t handle = nullptr;
    check(library().create(&handle), "create");
    handle_ = handle;
    check(library().set_stream(handle, stream), "set stream");
    check(library().set_workspace(handle, workspace, workspace_bytes), "set workspace");
    check(library().set_math_mode(
              handle, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH |
                                                CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)),
          "set math mode");
}

Cublas::~Cublas() {
    if (handle_ != nullptr) library().destroy(static_cast<cublasHandle_t>(handle_));
}

void Cublas::multiply(float* out, const void* x, const void* w, DType dtype, int64_t rows, int64_t out_dim,
                      int64_t in_dim, float beta, int64_t ld_out) {
    // cuBLAS counts by columns: out^T [out_dim, rows] = w x^T, where a row-major matrix is its transpose.
    const float alpha = 1.0f;
    const auto m = static_cast<int>(out_dim), n = static_cast<int>(rows), k = static_cast<int>(in_dim);
    check(library().gemm(static_cast<cublasHandle_t>(handle_), CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &alpha, w,
                         type_of(dtype), k, x, type_of(dtype), k, &beta, out, CUDA_R_32F,
                         static_cast<int>(ld_out), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
          "product");
}

}  // namespace refrag::REFRAG_CUDA
