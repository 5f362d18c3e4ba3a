// Parts that this build has left out because their libraries are not there; their tests are left out with
// them.
#include "support.h"

using namespace refrag_test;

TEST_CASE("parts: tests of what this build was made without") {
    const std::string left_out = REFRAG_LEFT_OUT;
    if (!left_out.empty()) skip(("built without " + left_out).c_str());
}
