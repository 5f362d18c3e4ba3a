// refrag/statistics: means and paired differences by hand, and Student's quantiles against known values.
#include <doctest/doctest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "eval/statistics.h"

using namespace refrag;

TEST_CASE("statistics: a mean and its standard error by hand") {
    const std::vector<double> values = {1.0, 2.0, 6.0};
    const Mean mean = mean_of(values);
    CHECK(mean.value == 3.0);
    // Squares 4 + 1 + 9 over n - 1 = 2, over n = 3.
    CHECK(*mean.standard_error == doctest::Approx(std::sqrt(14.0 / 2.0 / 3.0)).epsilon(1e-14));
    const std::vector<double> one = {5.0};
    CHECK(mean_of(one).value == 5.0);
    CHECK(!mean_of(one).standard_error);
    const std::vector<double> same(9, 0.25);
    CHECK(*mean_of(same).standard_error == 0.0);
}

TEST_CASE("statistics: a paired difference by hand") {
    // Differences -1, 0, 1, 4: mean 1, squares 4 + 1 + 0 + 9 = 14 over 3, over n = 4.
    const std::vector<double> base = {10.0, 20.0, 30.0, 40.0};
    const std::vector<double> values = {9.0, 20.0, 31.0, 44.0};
    const PairedDifference paired = paired_difference(values, base);
    CHECK(paired.mean == 1.0);
    CHECK(*paired.ci95 == doctest::Approx(3.182446305284 * std::sqrt(14.0 / 12.0)).epsilon(1e-11));
    // Turned round: the same interval on the other side.
    CHECK(paired_difference(base, values).mean == -1.0);
    CHECK(*paired_difference(base, values).ci95 == *paired.ci95);
    // What is common to both is no doubt about the difference, however far it spreads.
    const std::vector<double> shifted = {10.5, 20.5, 30.5, 40.5};
    CHECK(paired_difference(shifted, base).mean == 0.5);
    CHECK(*paired_difference(shifted, base).ci95 == 0.0);
    const PairedDifference one = paired_difference(std::vector<double>{3.0}, std::vector<double>{1.0});
    CHECK(one.mean == 2.0);
    CHECK(!one.ci95);
}

TEST_CASE("statistics: Student's quantiles for 95%") {
    // Integrated numerically from the density with 20000 steps, and as printed in tables.
    const std::pair<int64_t, double> known[] = {
        {1, 12.706204736175}, {2, 4.302652729749},    {3, 3.182446305284},    {4, 2.776445105198},
        {5, 2.570581835636},  {9, 2.262157162798},    {10, 2.228138851986},   {30, 2.042272456301},
        {99, 1.984216951586}, {1000, 1.962339080826}, {1001, 1.962336705282}, {5000, 1.960438551695}};
    for (const auto& [df, t] : known) {
        CAPTURE(df);
        CHECK(std::abs(student_t_95(df) - t) < 1e-9);
    }
    // Falling towards the normal distribution's, across the border between both ways of computing it.
    for (int64_t df = 2; df < 1100; ++df) CHECK(student_t_95(df) < student_t_95(df - 1));
    CHECK(std::abs(student_t_95(int64_t{1} << 40) - 1.959963984540) < 1e-11);
}
