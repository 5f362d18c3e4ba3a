// A real vLLM as the decoder: tests/vllm_decoder.py, where it is installed (src/remote/README.md) in the
// Python that REFRAG_VLLM_PYTHON names.
#include "cli_test.h"

using namespace refrag;
using namespace refrag_test;

TEST_CASE("remote: vLLM itself") {
    const TempDir dir;
    const char* python = std::getenv("REFRAG_VLLM_PYTHON");
    if (python == nullptr || shell_run(dir, std::string(python) + " -c 'import vllm'").code != 0) {
        skip("no vLLM (REFRAG_VLLM_PYTHON, see src/remote/README.md)");
        return;
    }
    const Ran ran = shell_run(dir, std::string(python) + " tests/vllm_decoder.py --refrag " + binary());
    CAPTURE(ran.out);
    CAPTURE(ran.err);
    CHECK(ran.code == 0);
    CHECK(contains(ran.out, " passed, 0 failed"));
}
