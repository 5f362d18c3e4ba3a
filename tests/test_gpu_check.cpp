// `make gpu-check PART=quick` is made for a quarter of an hour on a card that nobody has twice. So it is
// rehearsed: tests/gpu_check_rehearsal.sh runs all of it against stubs.
#include <doctest/doctest.h>

#include "cli_test.h"

using namespace refrag_test;

TEST_CASE("gpu-check: part quick, from end to end against stubs") {
    const TempDir dir;
    if (shell_run(dir, "command -v bash").code != 0 && skip("no bash")) return;
    const Ran ran = shell_run(dir, "bash tests/gpu_check_rehearsal.sh");
    INFO(ran.out);
    INFO(ran.err);
    CHECK(ran.code == 0);
    CHECK(ran.out == "gpu_check_rehearsal: passed\n");
}
