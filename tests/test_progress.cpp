// The progress bar's line, and that nobody but a terminal ever sees it.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>

#include "cli/progress.h"
#include "cli_test.h"

using namespace refrag;
using refrag_test::contains;
using refrag_test::Ran;
using refrag_test::shell_run;
using refrag_test::skip;
using refrag_test::TempDir;

TEST_CASE("a progress line fits its width, whatever the width") {
    CHECK(render_progress("work", ProgressUnit::items, 0, 0, 80) == "work ...");
    CHECK(render_progress("work", ProgressUnit::items, 3, 4, 40) ==
          "work [##################......]  75% 3/4");
    CHECK(render_progress("load", ProgressUnit::bytes, 1'200'000'000, 2'700'000'000, 45) ==
          "load [#########.............]  44% 1.2/2.7 GB");
    CHECK(contains(render_progress("load", ProgressUnit::bytes, 5, 10, 60), " 50% 5/10 B"));
    CHECK(contains(render_progress("load", ProgressUnit::bytes, 2500, 10000, 60), " 25% 2.5/10.0 kB"));
    // Beyond the ends.
    CHECK(contains(render_progress("work", ProgressUnit::items, 9, 4, 60), "100% 4/4"));
    CHECK(contains(render_progress("work", ProgressUnit::items, -9, 4, 60), "  0% 0/4"));
    // A long name keeps its end; no room for a bar leaves the percentage; no room at all, what fits.
    const std::string path = "loading /a/very/long/path/to/a/directory/of/models/refrag-nano";
    const std::string line = render_progress(path, ProgressUnit::bytes, 1, 2, 60);
    CHECK(line.size() <= 60);
    CHECK(line.starts_with("..."));
    CHECK(contains(line, "refrag-nano ["));
    for (int width = -1; width <= 120; ++width) {
        for (const int64_t done : {int64_t{0}, int64_t{7}, int64_t{1} << 40}) {
            const std::string any = render_progress(path, ProgressUnit::bytes, done, int64_t{1} << 40, width);
            CAPTURE(width);
            CHECK(any.size() <= static_cast<size_t>(std::max(width, 1)));
            for (const char c : any) REQUIRE(c >= ' ');
        }
    }
}

TEST_CASE("progress: the time that is left") {
    CHECK(time_left(10.0, 100, 400) == "0:30 left");
    CHECK(time_left(10.0, 1, 100) == "16:30 left");
    CHECK(time_left(100.0, 1, 100) == "2:45:00 left");
    CHECK(time_left(10.0, 399, 400) == "0:00 left");
    for (const auto& [seconds, done] :
         {std::pair<double, int64_t>{2.9, 200}, {10.0, 0}, {10.0, 3}, {10.0, 400}, {10.0, 500}, {10.0, -1}})
        CHECK(time_left(seconds, done, 400) == "");
}

TEST_CASE("progress is drawn on a terminal, cleared at its end, and then gone") {
    const TempDir dir;
    const std::string command =
        refrag_test::binary() +
        " bench -m tests/golden/tiny-refrag --context 32 -k 8 -p 0 -n 2 --repeats 1 --from cached --out " +
        dir.file("result.md");
    if (shell_run(dir, "script --version").code != 0 && skip("no script(1) to make a terminal with")) return;
    const Ran drawn = shell_run(dir, "script -qec '" + command + "' /dev/null");
    REQUIRE(drawn.code == 0);
    CHECK(contains(drawn.out, "\rloading tests/golden/tiny-refrag ["));
    CHECK(contains(drawn.out, "\rmeasuring ["));
    CHECK(contains(drawn.out, "100% "));
    CHECK_FALSE(contains(drawn.out, "\033"));
    // What is left on the line is blank.
    const size_t end = drawn.out.rfind('\r');
    REQUIRE(end != std::string::npos);
    const size_t begin = drawn.out.rfind('\r', end - 1);
    CHECK(drawn.out.find_first_not_of(" \r\n", begin) == std::string::npos);
}
