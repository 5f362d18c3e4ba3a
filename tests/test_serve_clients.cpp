// The clients that people use, against `refrag serve`: tests/server_clients.py, run where they are installed
// (weights_tools/requirements-serve.txt) in the Python that REFRAG_CLIENTS_PYTHON names, or in .venv.
#include "cli_test.h"

using namespace refrag;
using namespace refrag_test;

TEST_CASE("serve: OpenAI's and Cohere's own clients, and curl") {
    const TempDir dir;
    const char* given = std::getenv("REFRAG_CLIENTS_PYTHON");
    const std::string python = given != nullptr ? given : ".venv/bin/python";
    if (shell_run(dir, python + " -c 'import openai, cohere'").code != 0) {
        skip("no Python with openai and cohere (weights_tools/requirements-serve.txt)");
        return;
    }
    const Ran ran = shell_run(
        dir, python + " tests/server_clients.py --refrag " + binary() + " --model weights_tools/refrag-nano");
    CAPTURE(ran.out);
    CAPTURE(ran.err);
    CHECK(ran.code == 0);
    CHECK(contains(ran.out, " passed, 0 failed"));
    CHECK_FALSE(contains(ran.out, "\nSKIP"));
}
