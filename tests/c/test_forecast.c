/* Forecasts of answers: what they learn, and what no sample can do to them. */
#include "check.h"
#include "tsqp.h"

#include <string.h>

#define US UINT64_C(1000)
#define MS UINT64_C(1000000)

static void add(struct tsqp_estimate *estimate, uint64_t sample_ns, unsigned times) {
    for (unsigned i = 0; i < times; i++)
        tsqp_estimate_add(estimate, sample_ns);
}

static void equal_samples_leave_no_deviation(void) {
    struct tsqp_estimate estimate = {0};
    add(&estimate, 3 * MS, 1);
    CHECK_EQ(estimate.mean_ns, 3 * MS);
    add(&estimate, 3 * MS, 100);
    CHECK_EQ(estimate.mean_ns, 3 * MS);
    CHECK(estimate.deviation_ns < US);
}

static void mean_and_deviation_are_those_of_the_samples(void) {
    struct tsqp_estimate estimate = {0};
    for (int i = 0; i < 200; i++)
        add(&estimate, i % 2 ? 900 * US : 1100 * US, 1);
    CHECK(estimate.mean_ns > 950 * US && estimate.mean_ns < 1050 * US);
    CHECK(estimate.deviation_ns > 80 * US && estimate.deviation_ns < 130 * US);
}

static void the_first_samples_weigh_most(void) {
    struct tsqp_estimate estimate = {0};
    add(&estimate, 30 * MS, 1); /* whatever is called the first time is slow */
    add(&estimate, 2 * MS, 12);
    CHECK(estimate.mean_ns < 5 * MS);
}

static void one_outlier_moves_little(void) {
    struct tsqp_estimate estimate = {0};
    add(&estimate, 2 * MS, 50);
    add(&estimate, 2000 * MS, 1);
    CHECK(estimate.mean_ns < 2 * MS + 100 * US);
    CHECK(estimate.deviation_ns < 200 * US);
    add(&estimate, 2 * MS, 20);
    CHECK(estimate.deviation_ns < 20 * US);
}

static void check_change(uint64_t from_ns, uint64_t to_ns) {
    struct tsqp_estimate estimate = {0};
    add(&estimate, from_ns, 50);
    add(&estimate, to_ns, 60);
    CHECK(estimate.mean_ns > to_ns - to_ns / 10 && estimate.mean_ns < to_ns + to_ns / 10);
}

static void a_lasting_change_is_followed(void) {
    check_change(2 * MS, 20 * MS);
    check_change(20 * MS, 2 * MS);
    check_change(500 * US, 1000 * MS);
}

static void any_sample_is_survived(void) {
    static const uint64_t samples[] = {UINT64_MAX, 0, 1, UINT64_MAX / 2 + 1, 0, UINT64_MAX};
    struct tsqp_estimate estimate = {0};
    for (int round = 0; round < 100; round++)
        for (size_t i = 0; i < sizeof samples / sizeof samples[0]; i++) {
            tsqp_estimate_add(&estimate, samples[i]);
            CHECK(estimate.mean_ns <= UINT64_C(1) << 43);
            CHECK(estimate.deviation_ns <= UINT64_C(1) << 43);
        }
}

static void a_token_and_a_prompt_are_told_apart(void) {
    struct tsqp_forecasts forecasts;
    memset(&forecasts, 0, sizeof forecasts);
    struct tsqp_forecast *token = tsqp_forecast_of(&forecasts, 8192);
    add(&token->took, 2 * MS, 1);
    struct tsqp_forecast *prompt = tsqp_forecast_of(&forecasts, 8192 * 1000);
    CHECK(prompt != token);
    CHECK_EQ(prompt->took.count, 0);
    CHECK(tsqp_forecast_of(&forecasts, 8192 + 500) == token);
    CHECK_EQ(token->took.count, 1);
}

static void every_size_has_a_forecast_and_takes_no_other_for_its_own(void) {
    struct tsqp_forecasts forecasts;
    memset(&forecasts, 0, sizeof forecasts);
    for (unsigned bits = 0; bits <= 64; bits++) {
        uint64_t bytes = bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
        struct tsqp_forecast *forecast = tsqp_forecast_of(&forecasts, bytes);
        CHECK(forecast >= forecasts.of && forecast < forecasts.of + TSQP_FORECASTS);
        if (bits > 1)
            CHECK_EQ(forecast->took.count, 0);
        add(&forecast->took, MS, 1);
    }
}

int main(void) {
    RUN(equal_samples_leave_no_deviation);
    RUN(mean_and_deviation_are_those_of_the_samples);
    RUN(the_first_samples_weigh_most);
    RUN(one_outlier_moves_little);
    RUN(a_lasting_change_is_followed);
    RUN(any_sample_is_survived);
    RUN(a_token_and_a_prompt_are_told_apart);
    RUN(every_size_has_a_forecast_and_takes_no_other_for_its_own);
    return check_result();
}
