/* perf.h: a row of the performance log, and rows as lines of text. Knows neither files nor clocks. */
#ifndef TSQP_PERF_H
#define TSQP_PERF_H

#include <stddef.h>
#include <stdint.h>

enum {
    TSQP_PERF_COLUMNS = 19,
    TSQP_PERF_METHOD_BYTES = 24,
    TSQP_PERF_LAYER_BYTES = 12,
    TSQP_PERF_PREFIX_BYTES = 24,
    TSQP_PERF_LINE_BYTES = 1024 /* longer than any line */
};

enum { TSQP_PERF_RING, TSQP_PERF_ZMQ, TSQP_PERF_TILES, TSQP_PERF_CARRIERS };

/* One round trip; durations in ns, points of CLOCK_MONOTONIC. */
struct tsqp_perf_row {
    uint64_t request_id;
    uint64_t begin_ns;       /* when the request's sending began */
    uint64_t serialize_ns;   /* header, descriptors and tensors into the slot or frames */
    uint64_t send_ns;        /* waiting for a slot, publishing it; ZeroMQ's send */
    uint64_t recv_ns;        /* from then until the reply is there */
    uint64_t deserialize_ns; /* the reply into private tensors */
    uint64_t compute_ns;     /* of recv_ns, as the server says; at most recv_ns together */
    uint64_t queue_ns;
    uint64_t sent_bytes;
    uint64_t received_bytes;
    uint32_t forward; /* 0: none */
    uint32_t label;
    int32_t status;
    uint8_t request_carrier;
    uint8_t reply_carrier;
    uint8_t placement; /* 0: none */
};

struct tsqp_perf_label {
    char method[TSQP_PERF_METHOD_BYTES];
    char layer[TSQP_PERF_LAYER_BYTES]; /* empty: none */
};

/* How a line looks: each column is its prefix and then its value, right-aligned in `width`. */
struct tsqp_perf_style {
    char prefix[TSQP_PERF_COLUMNS][TSQP_PERF_PREFIX_BYTES];
    uint8_t width[TSQP_PERF_COLUMNS]; /* at most TSQP_PERF_METHOD_BYTES */
    char none[8];                     /* where there is no value */
    char end[4];
    char quote;          /* round texts; 0: none */
    uint8_t ms_decimals; /* 3 to 6; what is cut off is rounded */
};

struct tsqp_perf_names {
    const struct tsqp_perf_label *labels;
    const char (*placements)[TSQP_PERF_METHOD_BYTES];
    uint64_t origin_ns; /* where the column of beginnings counts from */
};

struct tsqp_perf_totals {
    uint64_t rows, errors, begin_ns, end_ns;
    uint64_t serialize_ns, send_ns, recv_ns, deserialize_ns, compute_ns, queue_ns;
    uint64_t sent_bytes, received_bytes;
    uint64_t carried[TSQP_PERF_CARRIERS]; /* bytes by carrier */
};

/* Writes `count` rows as lines to `out`, which has TSQP_PERF_LINE_BYTES for each; returns the bytes written.
 */
size_t tsqp_perf_format(const struct tsqp_perf_row *rows, size_t count, const struct tsqp_perf_style *style,
                        const struct tsqp_perf_names *names, char *out);
/* Adds rows to the totals. */
void tsqp_perf_add(struct tsqp_perf_totals *totals, const struct tsqp_perf_row *rows, size_t count);

#endif
