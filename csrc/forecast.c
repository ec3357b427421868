/* forecast.c: when the answer to a request will be there, from how long those before it took.
 *
 * Mean and mean deviation are kept as TCP keeps those of its round trips (RFC 6298, section 2; V. Jacobson,
 * "Congestion Avoidance and Control", 1988), with two changes: the first samples have a larger share, and one
 * far outside moves the mean by no more than a sample one deviation away (Huber's estimate of location): on a
 * shared machine every tenth answer may take twice as long, and what is wanted is when the others come.
 */
#include "tsqp.h"

#define SETTLED 8 /* samples after which each has the share of the RFC */
#define OUTLIER 4 /* deviations that a sample adds to the deviation at most */
#define LONGEST_NS (UINT64_C(1) << 42)

static int64_t within(int64_t value, int64_t most) {
    return value > most ? most : value < -most ? -most : value;
}

void tsqp_estimate_add(struct tsqp_estimate *estimate, uint64_t sample_ns) {
    int64_t sample = (int64_t)(sample_ns < LONGEST_NS ? sample_ns : LONGEST_NS);
    int64_t mean = (int64_t)estimate->mean_ns, deviation = (int64_t)estimate->deviation_ns;
    int64_t count = estimate->count;
    if (count == 0) {
        mean = sample;
        deviation = sample / 8;
    } else {
        bool early = count < SETTLED / 2; /* the first of all may itself be far outside */
        int64_t error = sample - mean;
        int64_t most = OUTLIER * deviation > mean / 16 ? OUTLIER * deviation : mean / 16;
        int64_t counted = early ? error : within(error, most);
        deviation += ((counted < 0 ? -counted : counted) - deviation) / 4;
        mean += (early ? error : within(error, deviation)) / (count < SETTLED ? count + 1 : SETTLED);
    }
    estimate->mean_ns = (uint64_t)(mean > 0 ? mean : 0);
    estimate->deviation_ns = (uint64_t)(deviation > 0 ? deviation : 0);
    estimate->count = (uint32_t)(count < SETTLED ? count + 1 : SETTLED);
}

struct tsqp_forecast *tsqp_forecast_of(struct tsqp_forecasts *forecasts, uint64_t request_bytes) {
    uint64_t kind = 1;
    while (request_bytes >>= 1)
        kind++;
    struct tsqp_forecast *forecast = &forecasts->of[kind % TSQP_FORECASTS];
    if (forecast->kind != kind)
        *forecast = (struct tsqp_forecast){.kind = kind};
    return forecast;
}
