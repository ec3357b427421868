/* Rows of the performance log as text: exact digits, alignment, the longest line, sums. */
#include "check.h"
#include "perf.h"

#include <string.h>

static const struct tsqp_perf_label LABELS[] = {{"Other", ""}, {"BatchLinear", "15"}};
static const char PLACEMENTS[][TSQP_PERF_METHOD_BYTES] = {"", "ops"};

static struct tsqp_perf_style csv(void) {
    struct tsqp_perf_style style = {.none = "-", .end = "\n", .quote = '"', .ms_decimals = 6};
    for (int column = 1; column < TSQP_PERF_COLUMNS; column++)
        style.prefix[column][0] = ',';
    return style;
}

static struct tsqp_perf_row plain_row(void) {
    return (struct tsqp_perf_row){
        .request_id = 7,
        .begin_ns = 5000000,
        .serialize_ns = 1000,
        .send_ns = 20,
        .recv_ns = 300000,
        .deserialize_ns = 98980,
        .compute_ns = 200000,
        .queue_ns = 50000,
        .sent_bytes = 1024,
        .received_bytes = 64,
        .forward = 3,
        .label = 1,
        .placement = 1,
        .reply_carrier = TSQP_PERF_ZMQ,
    };
}

static void expect(const struct tsqp_perf_row *row, const struct tsqp_perf_style *style,
                   const char *expected) {
    struct tsqp_perf_names names = {LABELS, PLACEMENTS, 1000000};
    char line[TSQP_PERF_LINE_BYTES + 1];
    size_t nbytes = tsqp_perf_format(row, 1, style, &names, line);
    CHECK(nbytes <= TSQP_PERF_LINE_BYTES);
    line[nbytes] = 0;
    if (strcmp(line, expected))
        printf("%s is not\n%s", line, expected);
    CHECK(!strcmp(line, expected));
}

static void digits_are_exact(void) {
    struct tsqp_perf_style style = csv();
    struct tsqp_perf_row row = plain_row();
    expect(
        &row, &style,
        "7,\"BatchLinear\",0.001000,0.000020,0.300000,0.098980,0.400000,1.0000,0.0625,2.594,\"shm>zmq\",15,"
        "\"ops\",0.200000,0.050000,0.050000,3,4.000000,0\n");
}

static void what_is_cut_off_is_rounded(void) {
    struct tsqp_perf_style style = csv();
    struct tsqp_perf_row row = plain_row();
    style.ms_decimals = 4;
    row.serialize_ns = 49; /* 0.000049 ms */
    row.send_ns = 50;
    row.deserialize_ns = 999951; /* 0.999951 ms */
    row.label = 0;
    row.forward = row.placement = 0;
    row.status = -3;
    expect(&row, &style,
           "7,\"Other\",0.0000,0.0001,0.3000,1.0000,1.3001,1.0000,0.0625,0.798,\"shm>zmq\",-,-,0.2000,0.0500,"
           "0.0500,-,4.0000,-3\n");
}

static void no_time_is_no_rate(void) {
    struct tsqp_perf_style style = csv();
    struct tsqp_perf_row row = {.sent_bytes = 4096, .begin_ns = 1000000};
    expect(
        &row, &style,
        "0,\"Other\",0.000000,0.000000,0.000000,0.000000,0.000000,4.0000,0.0000,0.000,\"shm\",-,-,0.000000,"
        "0.000000,0.000000,-,0.000000,0\n");
}

static void the_largest_values_fit_their_room(void) {
    struct tsqp_perf_style style = csv();
    struct tsqp_perf_names names = {LABELS, PLACEMENTS, 0};
    struct tsqp_perf_row row;
    char *line = check_malloc(TSQP_PERF_LINE_BYTES);
    memset(&row, 0xff, sizeof row);
    row.compute_ns = row.queue_ns = 0;
    row.label = row.placement = 1;
    row.request_carrier = row.reply_carrier = TSQP_PERF_TILES;
    row.status = INT32_MIN;
    for (int column = 0; column < TSQP_PERF_COLUMNS; column++) {
        memset(style.prefix[column], 'x', TSQP_PERF_PREFIX_BYTES);
        style.width[column] = TSQP_PERF_METHOD_BYTES;
    }
    CHECK(tsqp_perf_format(&row, 1, &style, &names, line) <= TSQP_PERF_LINE_BYTES);
    free(line);
}

static void sums_are_of_all_rows(void) {
    struct tsqp_perf_row rows[] = {plain_row(), plain_row()};
    struct tsqp_perf_totals totals = {0};
    rows[1].begin_ns = 1;
    rows[1].status = 4;
    rows[1].request_carrier = TSQP_PERF_TILES;
    tsqp_perf_add(&totals, rows, 2);
    CHECK_EQ(totals.rows, 2);
    CHECK_EQ(totals.errors, 1);
    CHECK_EQ(totals.begin_ns, 1);
    CHECK_EQ(totals.end_ns, 5400000);
    CHECK_EQ(totals.recv_ns, 600000);
    CHECK_EQ(totals.carried[TSQP_PERF_RING], 1024);
    CHECK_EQ(totals.carried[TSQP_PERF_ZMQ], 128);
    CHECK_EQ(totals.carried[TSQP_PERF_TILES], 1024);
}

int main(void) {
    RUN(digits_are_exact);
    RUN(what_is_cut_off_is_rounded);
    RUN(no_time_is_no_rate);
    RUN(the_largest_values_fit_their_room);
    RUN(sums_are_of_all_rows);
    return check_result();
}
