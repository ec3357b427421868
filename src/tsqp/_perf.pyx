# cython: language_level=3, binding=True, auto_pickle=False, autotestdict=False, nonecheck=True
"""Rows of the performance log: noted where a reply is settled, made text when the log's thread asks for them.

Nothing here locks: every method runs under the GIL, and the rows that are formatted without it are not written to
until they were.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from . cimport _core as c
from ._message cimport Message

# Labels (a method and a layer each) of one log; what comes later is logged without a layer's number.
cdef enum:
    MAX_LABELS = 8192
    MAX_PLACEMENTS = 256
    ROWS_AT_ONCE = 1024

#: Carriers of a message, as numbers.
RING, ZMQ, TILES = TSQP_PERF_RING, TSQP_PERF_ZMQ, TSQP_PERF_TILES
COLUMN_COUNT = TSQP_PERF_COLUMNS


cdef int _set_text(char *field, Py_ssize_t nbytes, object text) except -1:
    """`text` as ASCII in a field that ends with a zero; what is too long is cut, what would break a line replaced."""
    cdef bytes clean = "".join(
        char if char.isascii() and char.isprintable() and char not in ' ",|#' else "_" for char in str(text)
    ).encode()[:nbytes - 1]
    memset(field, 0, nbytes)
    memcpy(field, PyBytes_AS_STRING(clean), len(clean))
    return 0


cdef int _set_bytes(char *field, str text) except -1:
    """`text` in a zeroed field that is long enough."""
    cdef bytes encoded = text.encode()
    memcpy(field, PyBytes_AS_STRING(encoded), len(encoded))
    return 0


cdef class RoundTrips:
    """The round trips of one client since the log's thread took the last ones.

    Args:
        capacity: rows kept at most; further ones are only counted (``dropped``).
        window: requests that may be in flight together.
        prefixes, widths: for each of :data:`COLUMN_COUNT` columns what stands before its value (at most 24 bytes)
            and in how many characters (at most 24) the value is right-aligned.
        none, end, quote, ms_decimals: what stands where there is no value, ends a line, surrounds a text, and how
            many decimals milliseconds have (3 to 6).
        describe: ``describe(site)`` gives the method's name and the layer (a number or None) of a call's site; it is
            asked once for each.
    """

    def __cinit__(self, uint64_t capacity, uint64_t window, list prefixes, list widths, str none, str end, str quote,
                  unsigned ms_decimals, object describe):
        cdef uint64_t slots = 64
        cdef Py_ssize_t i
        while slots < 2 * window and slots < 1 << 16:
            slots *= 2
        if not capacity or len(prefixes) != TSQP_PERF_COLUMNS or len(widths) != TSQP_PERF_COLUMNS:
            raise ValueError(f"a log has 1 row at least and {TSQP_PERF_COLUMNS} columns")
        if not 3 <= ms_decimals <= 6 or len(none) > 8 or len(end) > 4 or len(quote) > 1:
            raise ValueError("this is no style of a line")
        self._sent = <Sent *>calloc(slots, sizeof(Sent))
        self._early = <tsqp_perf_row *>calloc(slots, sizeof(tsqp_perf_row))
        self._rows = <tsqp_perf_row *>malloc(capacity * sizeof(tsqp_perf_row))
        self._labels = <tsqp_perf_label *>calloc(MAX_LABELS, sizeof(tsqp_perf_label))
        if self._sent == NULL or self._early == NULL or self._rows == NULL or self._labels == NULL:
            raise MemoryError()
        self._sent_mask, self._capacity = slots - 1, capacity
        for i in range(TSQP_PERF_COLUMNS):
            if len(prefixes[i].encode()) > TSQP_PERF_PREFIX_BYTES or widths[i] > TSQP_PERF_METHOD_BYTES:
                raise ValueError(f"column {i} is too wide")
            _set_bytes(self._style.prefix[i], prefixes[i])
            self._style.width[i] = widths[i]
        _set_bytes(self._style.none, none)
        _set_bytes(self._style.end, end)
        _set_bytes(&self._style.quote, quote)
        self._style.ms_decimals = <uint8_t>ms_decimals
        _set_text(self._labels[0].method, sizeof(self._labels[0].method), "Other")
        self._label_count, self._placement_count = 1, 1
        self._describe = describe
        self._origin_ns = c.tsqp_now_ns()
        self.enabled = True

    def __dealloc__(self):
        free(self._sent)
        free(self._early)
        free(self._rows)
        free(self._labels)

    # --- what happened -------------------------------------------------------------------------------------

    cdef void sent_now(self, uint64_t request_id, uint64_t begin_ns, uint64_t written_ns, uint64_t nbytes) noexcept:
        """A request is on its way through a slot, in which it was at `written_ns`."""
        cdef Sent *sent = &self._sent[request_id & self._sent_mask]
        cdef uint64_t now_ns = c.tsqp_now_ns()
        sent.request_id, sent.begin_ns, sent.nbytes, sent.carrier = request_id, begin_ns, nbytes, TSQP_PERF_RING
        sent.waited_ns, sent.published_ns = now_ns - written_ns, now_ns
        if sent.early_id == request_id:
            self._complete(sent, &self._early[request_id & self._sent_mask], sent.arrived_ns, sent.taken_ns)

    def note_sent(self, uint64_t request_id, uint64_t begin_ns, uint64_t waited_ns, uint64_t nbytes, uint8_t carrier):
        """A request of `nbytes` was sent just now by `carrier`; that began at `begin_ns`, and `waited_ns` of it was
        waiting, or ZeroMQ's sending."""
        cdef Sent *sent = &self._sent[request_id & self._sent_mask]
        sent.request_id, sent.begin_ns, sent.waited_ns, sent.nbytes = request_id, begin_ns, waited_ns, nbytes
        sent.published_ns = c.tsqp_now_ns()
        sent.carrier = carrier
        if sent.early_id == request_id:
            self._complete(sent, &self._early[request_id & self._sent_mask], sent.arrived_ns, sent.taken_ns)

    def note(self, site, Message reply):
        """The reply to a request of `site` was taken; if not measured, it is not logged."""
        cdef Sent *sent = &self._sent[reply.request_id & self._sent_mask]
        cdef tsqp_perf_row row
        cdef object label
        if not self.enabled or not reply.taken_ns:
            return
        label = site.label
        if label is None:
            label = site.label = self._new_label(site)
        row.request_id, row.label, row.status = reply.request_id, label, reply.status
        row.compute_ns, row.queue_ns, row.received_bytes = reply.compute_ns, reply.queue_ns, reply.nbytes
        row.forward, row.placement, row.reply_carrier = self._forward, self._placement, reply.way
        if sent.request_id == reply.request_id:
            self._complete(sent, &row, reply.arrived_ns, reply.taken_ns)
        else:  # the thread that sent it has not got here yet
            sent.early_id, sent.arrived_ns, sent.taken_ns = reply.request_id, reply.arrived_ns, reply.taken_ns
            self._early[reply.request_id & self._sent_mask] = row

    cdef void _complete(self, Sent *sent, tsqp_perf_row *reply, uint64_t arrived_ns, uint64_t taken_ns) noexcept:
        """Adds the row of a request and its reply."""
        cdef uint64_t spent = sent.published_ns - sent.begin_ns
        cdef tsqp_perf_row *row
        sent.request_id = sent.early_id = 0
        if self._head - self._tail >= self._capacity:
            self.dropped += 1
            return
        row = &self._rows[self._head % self._capacity]
        row[0] = reply[0]
        row.begin_ns, row.sent_bytes, row.request_carrier = sent.begin_ns, sent.nbytes, sent.carrier
        row.send_ns = sent.waited_ns if sent.waited_ns < spent else spent
        row.serialize_ns = spent - row.send_ns
        # The reply to a long request may be there before this end knows that it was sent.
        row.recv_ns = arrived_ns - sent.published_ns if arrived_ns > sent.published_ns else 0
        row.deserialize_ns = taken_ns - arrived_ns
        # The server may say anything.
        if row.compute_ns > row.recv_ns:
            row.compute_ns = row.recv_ns
        if row.queue_ns > row.recv_ns - row.compute_ns:
            row.queue_ns = row.recv_ns - row.compute_ns
        self._head += 1

    cdef uint32_t _new_label(self, site) except 0:
        cdef tsqp_perf_label *label
        method, layer = self._describe(site)
        number = self._label_count if self._label_count < MAX_LABELS else MAX_LABELS - 1
        label = &self._labels[number]
        _set_text(label.method, sizeof(label.method), method)
        _set_text(label.layer, sizeof(label.layer), "" if layer is None or number == MAX_LABELS - 1 else layer)
        self._label_count = number + 1
        return number

    def add_placement(self, name):
        """The number of a placement of this name, for :meth:`forward_began`."""
        cdef unsigned number = self._placement_count
        if number >= MAX_PLACEMENTS:
            return 0
        _set_text(self._placements[number], sizeof(self._placements[number]), name)
        self._placement_count += 1
        return number

    def forward_began(self, uint8_t placement):
        """From now on round trips belong to another forward of a model, of this placement."""
        self._forwards += 1
        self._forward, self._placement = self._forwards, placement

    def forward_ended(self):
        """From now on round trips belong to no forward."""
        self._forward, self._placement = 0, 0

    # --- for the log's thread ------------------------------------------------------------------------------

    def __len__(self):
        return <Py_ssize_t>(self._head - self._tail)

    def drain(self):
        """Lines of the oldest rows, b"" where there are none; they are forgotten here."""
        cdef uint64_t first = self._tail % self._capacity
        cdef uint64_t count = self._head - self._tail
        cdef tsqp_perf_names names
        cdef size_t used
        cdef char *text
        count = min(count, self._capacity - first, <uint64_t>ROWS_AT_ONCE)
        if not count:
            return b""
        names.labels, names.origin_ns = self._labels, self._origin_ns
        names.placements = <const void *>self._placements
        text = <char *>malloc(count * TSQP_PERF_LINE_BYTES)
        if text == NULL:
            raise MemoryError()
        try:
            with nogil:
                used = tsqp_perf_format(&self._rows[first], count, &self._style, &names, text)
                tsqp_perf_add(&self._totals, &self._rows[first], count)
            self._tail += count
            if self._tail == self._head:
                self._tail = self._head = 0  # the memory that was just used is still in the caches
            return PyBytes_FromStringAndSize(text, <Py_ssize_t>used)
        finally:
            free(text)

    @property
    def totals(self):
        """Sums over the rows that were drained, ``*_ns`` and ``*_bytes``, by name."""
        cdef tsqp_perf_totals *totals = &self._totals
        return {
            "rows": totals.rows,
            "errors": totals.errors,
            "elapsed_ns": totals.end_ns - totals.begin_ns,
            "serialize_ns": totals.serialize_ns,
            "send_ns": totals.send_ns,
            "recv_ns": totals.recv_ns,
            "deserialize_ns": totals.deserialize_ns,
            "compute_ns": totals.compute_ns,
            "queue_ns": totals.queue_ns,
            "sent_bytes": totals.sent_bytes,
            "received_bytes": totals.received_bytes,
            "shm_bytes": totals.carried[TSQP_PERF_RING],
            "zmq_bytes": totals.carried[TSQP_PERF_ZMQ],
            "tile_bytes": totals.carried[TSQP_PERF_TILES],
            "forwards": self._forwards,
        }
