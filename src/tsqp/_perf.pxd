from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from ._message cimport Message


cdef extern from "perf.h" nogil:
    enum:
        TSQP_PERF_COLUMNS, TSQP_PERF_METHOD_BYTES, TSQP_PERF_LAYER_BYTES, TSQP_PERF_PREFIX_BYTES, TSQP_PERF_LINE_BYTES

    enum:
        TSQP_PERF_RING, TSQP_PERF_ZMQ, TSQP_PERF_TILES, TSQP_PERF_CARRIERS

    struct tsqp_perf_row:
        uint64_t request_id, begin_ns, serialize_ns, send_ns, recv_ns, deserialize_ns, compute_ns, queue_ns
        uint64_t sent_bytes, received_bytes
        uint32_t forward, label
        int32_t status
        uint8_t request_carrier, reply_carrier, placement

    struct tsqp_perf_label:
        char method[24]
        char layer[12]

    struct tsqp_perf_style:
        char prefix[19][24]
        uint8_t width[19]
        char none[8]
        char end[4]
        char quote
        uint8_t ms_decimals

    struct tsqp_perf_names:
        const tsqp_perf_label *labels
        const void *placements
        uint64_t origin_ns

    struct tsqp_perf_totals:
        uint64_t rows, errors, begin_ns, end_ns
        uint64_t serialize_ns, send_ns, recv_ns, deserialize_ns, compute_ns, queue_ns
        uint64_t sent_bytes, received_bytes
        uint64_t carried[3]

    size_t tsqp_perf_format(const tsqp_perf_row *rows, size_t count, const tsqp_perf_style *style,
                            const tsqp_perf_names *names, char *out)
    void tsqp_perf_add(tsqp_perf_totals *totals, const tsqp_perf_row *rows, size_t count)


cdef struct Sent:
    uint64_t request_id, begin_ns, waited_ns, published_ns, nbytes
    uint64_t early_id, arrived_ns, taken_ns  # of a reply that was noted before its request
    uint8_t carrier


cdef class RoundTrips:
    cdef Sent *_sent
    cdef tsqp_perf_row *_early  # beside _sent: replies that were noted before their request
    cdef uint64_t _sent_mask
    cdef tsqp_perf_row *_rows
    cdef uint64_t _capacity, _head, _tail
    cdef tsqp_perf_label *_labels
    cdef uint32_t _label_count
    cdef char _placements[256][24]
    cdef unsigned _placement_count
    cdef tsqp_perf_style _style
    cdef tsqp_perf_totals _totals
    cdef uint64_t _origin_ns
    cdef uint32_t _forwards, _forward
    cdef uint8_t _placement
    cdef object _describe
    cdef public bint enabled
    cdef readonly uint64_t dropped
    cdef uint32_t _new_label(self, site) except 0
    cdef void _complete(self, Sent *sent, tsqp_perf_row *reply, uint64_t arrived_ns, uint64_t taken_ns) noexcept
    cdef void sent_now(self, uint64_t request_id, uint64_t begin_ns, uint64_t written_ns, uint64_t nbytes) noexcept
