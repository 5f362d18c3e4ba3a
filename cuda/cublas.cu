// See cublas.cuh.
#include "cublas.cuh"

#include <cublas_v2.h>
#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <vector>

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

// Where cuBLAS may lie: the file that REFRAG_CUBLAS names (PyTorch's, on a machine without the toolkit),
// where the dynamic linker looks, and in CUDA's folder. The version that this was built with before older
// ones.
std::vector<std::string> library_files() {
    std::vector<std::string> files;
    if (const char* const named = std::getenv("REFRAG_CUBLAS")) files.emplace_back(named);
    constexpr int kOldest = 12;
    std::vector<std::string> names = {str("libcublas.so.", CUBLAS_VER_MAJOR)};
    for (int major = CUBLAS_VER_MAJOR - 1; major >= kOldest; --major)
        names.push_back(str("libcublas.so.", major));
    names.emplace_back("libcublas.so");
    for (const char* const folder : {"", "/usr/local/cuda/lib64/"})
        for (const std::string& name : names) files.push_back(folder + name);
    return files;
}

// The library, or why there is none.
struct Opened {
    Library library;
    std::string why;
};

Opened open_library() {
    Opened opened;
    void* file = nullptr;
    std::string tried;
    for (const std::string& name : library_files()) {
        file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (file != nullptr) break;
        tried += (tried.empty() ? "" : ", ") + name;
    }
    if (file == nullptr) {
        opened.why = str("cannot open cuBLAS (tried ", tried, "; REFRAG_CUBLAS may name the file)");
        return opened;
    }
    const auto find = [&](auto& function, const char* name) {
        void* const symbol = dlsym(file, name);
        if (symbol == nullptr && opened.why.empty()) opened.why = str("cuBLAS has no ", name);
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
    };
    Library& found = opened.library;
    find(found.create, "cublasCreate_v2");
    find(found.destroy, "cublasDestroy_v2");
    find(found.set_stream, "cublasSetStream_v2");
    find(found.set_workspace, "cublasSetWorkspace_v2");
    find(found.set_math_mode, "cublasSetMathMode");
    find(found.gemm, "cublasGemmEx");
    find(found.status_string, "cublasGetStatusString");
    return opened;
}

const Opened& opened_once() {
    static const Opened opened = open_library();
    return opened;
}

const Library& library() {
    REFRAG_CHECK(opened_once().why.empty(), Status::runtime, opened_once().why);
    return opened_once().library;
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

std::string cublas_unavailable() {
    return opened_once().why;
}

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
