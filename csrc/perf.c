/* perf.c: rows of the performance log as text, in integers: a line takes a fraction of a microsecond, so that
 * the log of a decode step costs less than can be measured. */
#include "perf.h"

#include <stdbool.h>
#include <string.h>

/* 20 digits of a 64-bit number, a sign, a point. */
#define NUMBER_BYTES 24
#define MB 1048576.0

/* Prefix, quotes and value of every column, and the end, fit a line. */
_Static_assert(TSQP_PERF_COLUMNS *(TSQP_PERF_PREFIX_BYTES + TSQP_PERF_METHOD_BYTES + 2) + 4 <=
                   TSQP_PERF_LINE_BYTES,
               "a line may be longer than its room");

static const char *const CARRIERS[TSQP_PERF_CARRIERS][TSQP_PERF_CARRIERS] = {
    {"shm", "shm>zmq", "shm>tile"},
    {"zmq>shm", "zmq", "zmq>tile"},
    {"tile>shm", "tile>zmq", "tile"},
};

struct line {
    const struct tsqp_perf_style *style;
    char *at;
    int column;
};

static void put(struct line *line, const char *text, size_t nbytes, bool quoted) {
    const char *prefix = line->style->prefix[line->column];
    size_t prefix_bytes = strnlen(prefix, TSQP_PERF_PREFIX_BYTES), width = line->style->width[line->column];
    char quote = quoted ? line->style->quote : 0;
    memcpy(line->at, prefix, prefix_bytes);
    line->at += prefix_bytes;
    for (; width > nbytes; width--)
        *line->at++ = ' ';
    if (quote)
        *line->at++ = quote;
    memcpy(line->at, text, nbytes);
    line->at += nbytes;
    if (quote)
        *line->at++ = quote;
    line->column++;
}

static void put_text(struct line *line, const char *text, size_t limit) {
    size_t nbytes = strnlen(text, limit);
    if (nbytes)
        put(line, text, nbytes, true);
    else
        put(line, line->style->none, strnlen(line->style->none, sizeof line->style->none), false);
}

/* `value` in units of 10^-decimals. */
static void put_fixed(struct line *line, uint64_t value, unsigned decimals, bool negative) {
    char digits[NUMBER_BYTES], *at = digits + sizeof digits;
    unsigned count = 0;
    do {
        if (count && count == decimals)
            *--at = '.';
        *--at = (char)('0' + value % 10);
        value /= 10;
        count++;
    } while (value || count <= decimals);
    if (negative)
        *--at = '-';
    put(line, at, (size_t)(digits + sizeof digits - at), false);
}

static void put_number(struct line *line, uint64_t value) {
    put_fixed(line, value, 0, false);
}

static void put_ms(struct line *line, uint64_t ns) {
    uint64_t unit = 1;
    for (unsigned decimals = line->style->ms_decimals; decimals < 6; decimals++)
        unit *= 10;
    put_fixed(line, ns / unit + (unit > 1 && ns % unit >= unit / 2), line->style->ms_decimals, false);
}

/* Messages are multiples of 64 bytes: four decimals are exact. */
static void put_kb(struct line *line, uint64_t nbytes) {
    put_fixed(line, nbytes / 1024 * 10000 + (nbytes % 1024 * 10000 + 512) / 1024, 4, false);
}

static void put_rate(struct line *line, uint64_t nbytes, uint64_t ns) {
    put_fixed(line, ns ? (uint64_t)((double)nbytes / MB * 1e9 / (double)ns * 1e3 + 0.5) : 0, 3, false);
}

static void put_optional(struct line *line, uint64_t value) {
    if (value)
        put_number(line, value);
    else
        put_text(line, "", 1);
}

static uint64_t total_ns(const struct tsqp_perf_row *row) {
    return row->serialize_ns + row->send_ns + row->recv_ns + row->deserialize_ns;
}

static void put_layer(struct line *line, const struct tsqp_perf_label *label) {
    size_t nbytes = strnlen(label->layer, sizeof label->layer);
    if (nbytes)
        put(line, label->layer, nbytes, false);
    else
        put_text(line, "", 1);
}

static char *put_row(const struct tsqp_perf_row *row, const struct tsqp_perf_style *style,
                     const struct tsqp_perf_names *names, char *out) {
    const struct tsqp_perf_label *label = &names->labels[row->label];
    struct line line = {style, out, 0};
    size_t end_bytes = strnlen(style->end, sizeof style->end);
    put_number(&line, row->request_id);
    put_text(&line, label->method, sizeof label->method);
    put_ms(&line, row->serialize_ns);
    put_ms(&line, row->send_ns);
    put_ms(&line, row->recv_ns);
    put_ms(&line, row->deserialize_ns);
    put_ms(&line, total_ns(row));
    put_kb(&line, row->sent_bytes);
    put_kb(&line, row->received_bytes);
    put_rate(&line, row->sent_bytes + row->received_bytes, total_ns(row));
    put_text(&line, CARRIERS[row->request_carrier][row->reply_carrier], NUMBER_BYTES);
    put_layer(&line, label);
    put_text(&line, names->placements[row->placement], TSQP_PERF_METHOD_BYTES);
    put_ms(&line, row->compute_ns);
    put_ms(&line, row->queue_ns);
    put_ms(&line, row->recv_ns - row->compute_ns - row->queue_ns);
    put_optional(&line, row->forward);
    put_ms(&line, row->begin_ns - names->origin_ns);
    put_fixed(&line, row->status < 0 ? 0 - (uint64_t)row->status : (uint64_t)row->status, 0, row->status < 0);
    memcpy(line.at, style->end, end_bytes);
    return line.at + end_bytes;
}

size_t tsqp_perf_format(const struct tsqp_perf_row *rows, size_t count, const struct tsqp_perf_style *style,
                        const struct tsqp_perf_names *names, char *out) {
    char *at = out;
    for (size_t i = 0; i < count; i++)
        at = put_row(&rows[i], style, names, at);
    return (size_t)(at - out);
}

void tsqp_perf_add(struct tsqp_perf_totals *totals, const struct tsqp_perf_row *rows, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const struct tsqp_perf_row *row = &rows[i];
        uint64_t end_ns = row->begin_ns + total_ns(row);
        if (!totals->rows++ || row->begin_ns < totals->begin_ns)
            totals->begin_ns = row->begin_ns;
        if (end_ns > totals->end_ns)
            totals->end_ns = end_ns;
        totals->errors += row->status != 0;
        totals->serialize_ns += row->serialize_ns;
        totals->send_ns += row->send_ns;
        totals->recv_ns += row->recv_ns;
        totals->deserialize_ns += row->deserialize_ns;
        totals->compute_ns += row->compute_ns;
        totals->queue_ns += row->queue_ns;
        totals->sent_bytes += row->sent_bytes;
        totals->received_bytes += row->received_bytes;
        totals->carried[row->request_carrier] += row->sent_bytes;
        totals->carried[row->reply_carrier] += row->received_bytes;
    }
}
