# cython: language_level=3, binding=True, auto_pickle=False, autotestdict=False, nonecheck=True
"""The short way of a message: between a caller's tensors and a ring that has room, or a message, right now.

Everything else (large messages, a full ring, reading ahead, ZeroMQ) is transport.py's, which is asked where the
short way is not open.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc

from . cimport _core as c
from ._message cimport OUT_OF_SLOT, Decoder, Encoder, Lease, Message, meta_of
from ._perf cimport RoundTrips
from ._ring cimport Doorbell, Ring, deadline_of

import threading

from . import errors as e

cdef uint64_t NOW_NS = 0
cdef double GATE_SLICE_S = 0.1


cdef class Gate:
    """A lock that costs nothing while nobody else wants it: the GIL protects the flag.

    Nothing here runs Python code between the taking and the return, so that a signal's exception never comes in
    between: a gate that is not given back would end its channel.
    """

    cdef bint held
    cdef Py_ssize_t waiters
    cdef object freed  # a plain lock, held while nothing was freed

    def __cinit__(self):
        self.freed = threading.Lock()
        self.freed.acquire()

    cdef inline bint take(self) noexcept:
        if self.held:
            return False
        self.held = True
        return True

    cdef inline int give(self) except -1:
        self.held = False
        if self.waiters and self.freed.locked():
            self.freed.release()
        return 0

    cdef bint wait(self, double seconds) except -1:
        """True once the gate is the caller's; False if it was not to be had in so many seconds."""
        cdef uint64_t now = c.tsqp_now_ns()
        cdef uint64_t end = now + <uint64_t>(1e9 * min(seconds, 1e9))
        self.waiters += 1
        try:
            while not self.take():
                now = c.tsqp_now_ns()
                if now >= end:
                    return False
                # In slices: who is woken may be interrupted, and the next one must come all the same.
                self.freed.acquire(True, min((end - now) / 1e9, GATE_SLICE_S))
            return True
        finally:
            self.waiters -= 1


cdef class Holder:
    """Takes a gate or a lock and gives it back, each once: :meth:`give` in a ``finally`` gives back what was taken,
    wherever in between Ctrl-C came. One block of one thread."""

    cdef object lock
    cdef readonly bint held

    def __init__(self, lock):
        self.lock = lock

    def take(self, double seconds=0.0):
        """True if it is held now; False if it was not to be had in so many seconds (a lock's are 0)."""
        if not self.held:
            if type(self.lock) is Gate:
                self.held = (<Gate>self.lock).take() or (seconds > 0.0 and (<Gate>self.lock).wait(seconds))
            else:
                self.held = self.lock.acquire(False)
        return self.held

    def give(self):
        """Gives it back if it is held."""
        if self.held:
            self.held = False
            if type(self.lock) is Gate:
                (<Gate>self.lock).give()
            else:
                self.lock.release()


include "_reservation.pxi"


cdef class Forecast:
    """How long the answers to one kind of request took, so that a :meth:`Port.recv` that is given it is awake when the
    next one comes. Requests of different sizes are told apart. One thread at a time."""

    cdef c.tsqp_forecasts known

    def expected_s(self, uint64_t request_bytes):
        """Seconds after which the answer to a request of about this size is expected; 0.0: not known."""
        cdef c.tsqp_forecasts known = self.known  # a look changes nothing
        return c.tsqp_forecast_of(&known, request_bytes).took.mean_ns / 1e9


cdef class Port:
    """The fast half of a :class:`tsqp.Channel`, which is the only one to make one.

    ``direct_send`` and ``direct_receive`` say whether the short way is open: no message is under way in parts, none
    was read ahead. ``flush_due``: the rest of a message given away is to be written before anything is awaited.
    ``link_used``: messages were sent over ZeroMQ, so that its queue counts, too.
    """

    cdef readonly Ring _tx
    cdef readonly Ring _rx
    cdef readonly Encoder _encoder
    cdef readonly Decoder _decoder
    cdef readonly Gate send_gate
    cdef readonly Gate receive_gate
    cdef public bint direct_send
    cdef public bint direct_receive
    cdef public bint flush_due
    cdef public bint link_used
    cdef public bint _closed
    cdef public uint64_t threshold
    cdef public uint64_t _sent, _sent_bytes, _received, _received_bytes  # through the ring, by either way
    cdef readonly RoundTrips _round_trips  # of the performance log, None without
    cdef object _reserved_by
    cdef uint64_t _asked_bytes  # of the message sent last

    def __init__(self, Ring tx, Ring rx, uint64_t threshold):
        self._tx, self._rx, self.threshold = tx, rx, threshold
        self._encoder, self._decoder = Encoder(), Decoder()
        self.send_gate, self.receive_gate = Gate(), Gate()
        self._reserved_by = None
        self.direct_send = tx is not None
        self.direct_receive = rx is not None

    def measure(self, RoundTrips round_trips):
        """From now on says of each request when it was sent, and notes in each message when it was read."""
        self._round_trips = round_trips
        self._encoder.timed = self._decoder.timed = True

    def send(self, tensors, *, uint32_t tag=0, meta=None, uint64_t request_id=0, int status=0, uint32_t flags=0,
             uint32_t site=0, uint64_t index=0, uint64_t compute_ns=0, uint64_t queue_ns=0, timeout=None,
             bint transfer=False, wire=None):
        """Sends one message; when it returns, the tensors may be changed.

        Args:
            tensors: at most 64 torch CPU tensors or NumPy arrays, of any rank up to 8, contiguous or not.
            tag: the method, or what the user likes (32 bits); request_id: ties replies to requests (64 bits).
            meta: a small mapping (packed at most 64 KiB), or bytes that are msgpack already.
            flags: 24 bits for the user; status, site, index, compute_ns, queue_ns: header fields of RPC.
            timeout: seconds; None waits for ever, but notices a dead peer.
            transfer: the caller gives the tensors away and never changes them: a large message need not be
                waited for. The rest of a tiled one is written by later calls, :meth:`can_send` among them.
            wire: how tensors travel: None (as they are), ``"bfloat16"`` (float32 in half the bytes) or ``"int8"``
                (float32, float16 and bfloat16 in a byte an element and a scale a row); a sequence names one for
                each tensor. They arrive in their own dtype. What is lost: docs/wire-compression.md.

        Returns:
            the message's bytes on the wire.

        Raises:
            MessageError (and its subclasses), WaitTimeoutError, ClosedError, PeerDiedError.
        """
        cdef bytes packed = meta_of(meta)
        cdef tuple kept = tuple(tensors)  # their memory is read without the GIL: nobody else may let go of them
        cdef uint64_t total
        cdef c.tsqp_slot slot
        cdef c.tsqp_message_header *header
        cdef uint64_t begin_ns = c.tsqp_now_ns() if self._round_trips is not None else 0
        if self.direct_send and not self._closed and self.send_gate.take():
            try:
                c.tsqp_ring_rouse(self._tx.ptr)
                header = &self._encoder.out.header
                header.tag = tag
                header.flags = flags
                header.request_id = request_id
                header.status = status
                header.site = site
                header.index = index
                header.compute_ns = compute_ns
                header.queue_ns = queue_ns
                total = self._encoder.begin(kept, packed, wire)
                if total < self.threshold and self._tx.try_acquire(&slot):
                    self._encoder.write_slot(self._tx, packed, &slot)
                    self._sent += 1
                    self._sent_bytes += total
                    self._asked_bytes = total
                    if self._round_trips is not None:
                        self._round_trips.sent_now(request_id, begin_ns, self._encoder.written_ns, total)
                    return total
            finally:
                self.send_gate.give()
        fields = (tag, flags, request_id, status, site, index, compute_ns, queue_ns)
        return self._send_slow(kept, packed, fields, timeout, transfer, wire)

    def reserve(self, specs, *, uint32_t tag=0, meta=None, uint64_t request_id=0, int status=0, uint32_t flags=0,
                uint32_t site=0, uint64_t index=0, uint64_t compute_ns=0, uint64_t queue_ns=0, timeout=None,
                bint transfer=False):
        """A ``with`` block over tensors that lie in a free slot, to be computed in place; sent when the block ends.

        ``with ch.reserve([((4, 2048), torch.float32)]) as out: torch.matmul(a, b, out=out[0])``

        Args:
            specs: for each tensor a pair of shape and torch dtype, or a tensor to be like.
            timeout: seconds to wait for a free slot; None waits for ever, but notices a dead peer.
            transfer: the rest of a message in tiles may be written by later calls; else the block ends when all is.

        The other arguments are :meth:`send`'s. The tensors start with arbitrary contents and are valid inside the
        block. An exception inside it sends nothing. A message that does not fit a slot, or has none, is built in
        private memory and sent at the end of the block. Other threads' sends wait meanwhile.

        Raises:
            ShapeError: a tensor was resized or replaced inside the block, as ``out=`` of a wrong shape does; nothing
                is sent. RingUsageError: a send, or another reserve, inside the block. Else like :meth:`send`.
        """
        cdef Reservation reservation = Reservation.__new__(Reservation)
        reservation.port, reservation.codec = self, self._encoder
        reservation.fields = (tag, flags, request_id, status, site, index, compute_ns, queue_ns)
        reservation.specs, reservation.meta = specs, meta_of(meta)
        reservation.deadline, reservation.transfer = deadline_of(timeout), transfer
        return reservation

    cdef int _enter_send(self, uint64_t deadline) except -1:
        """Takes the send gate for a block of this thread."""
        cdef uint64_t now
        if not self.send_gate.take():
            self.check_not_reserved()
            now = c.tsqp_now_ns()
            if now >= deadline or not self.send_gate.wait((deadline - now) / 1e9):
                raise e.WaitTimeoutError("another thread is sending; wait for it")
        if self._closed:
            self.send_gate.give()
            raise e.ClosedError("the channel is closed; connect again")
        self._reserved_by = threading.get_ident()
        return 0

    cdef int _leave_send(self) except -1:
        self._reserved_by = None
        return self.send_gate.give()

    cpdef check_not_reserved(self):
        """Raises RingUsageError in a thread that would wait for itself."""
        if self._reserved_by is not None and self._reserved_by == threading.get_ident():
            raise e.RingUsageError("this thread has a reserve() block open on the channel; end it before it sends more")

    def recv(self, timeout=None, Forecast forecast=None):
        """The next message, its tensors in private memory.

        ``forecast``: where the message is the answer to the one just sent, what is known of when such answers come. It
        learns from each, and changes nothing but when this end sleeps.

        Raises WaitTimeoutError after `timeout` seconds (nothing is lost: a later call gets the message), ClosedError
        when the peer closed and all is read, PeerDiedError, MessageError where the peer sent rubbish, ProtocolError.
        """
        cdef uint64_t deadline = deadline_of(timeout)
        cdef c.tsqp_slot slot
        cdef Message message
        if self._may_take():
            try:
                if forecast is None:
                    self._rx.acquire(&slot, deadline)
                else:
                    self._rx.acquire_answer(&slot, deadline,
                                            c.tsqp_forecast_of(&forecast.known, self._asked_bytes))
                try:
                    message = self._decoder.read_slot(self._rx, &slot, deadline, False)
                finally:
                    c.tsqp_ring_release(self._rx.ptr, &slot)
                if self._whole(message):
                    return message
            finally:
                self.receive_gate.give()
        return self._recv_slow(deadline)

    def lease(self, timeout=None, Forecast forecast=None):
        """A ``with`` block over the next message; tensors of a ring message are views into its slot, valid inside
        the block only. ``forecast`` and errors are those of :meth:`recv`."""
        cdef uint64_t deadline = deadline_of(timeout)
        cdef c.tsqp_slot slot
        cdef Lease lease
        if self._may_take():
            try:
                if forecast is None:
                    self._rx.acquire(&slot, deadline)
                else:
                    self._rx.acquire_answer(&slot, deadline,
                                            c.tsqp_forecast_of(&forecast.known, self._asked_bytes))
                lease = self._decoder.lease_slot(self._rx, &slot, deadline)
                if self._whole(lease.message):
                    return lease
                lease.release()
            finally:
                self.receive_gate.give()
        return self._lease_slow(deadline)

    def recv_or_lease(self, uint64_t request_id, timeout=None):
        """The next message as :meth:`recv` returns it, but as a :meth:`lease` where it has this `request_id` and lies
        in a slot. Raises like :meth:`recv`."""
        cdef uint64_t deadline = deadline_of(timeout)
        cdef c.tsqp_slot slot
        if self._may_take():
            try:
                self._rx.acquire(&slot, deadline)
                found = self._decoder.copy_or_lease(self._rx, &slot, deadline, request_id)
                if self._whole(found.message if type(found) is Lease else found):
                    return found
            finally:
                self.receive_gate.give()
        return self._recv_slow(deadline)

    def recv_nowait(self, bint lease=True):
        """Like :meth:`lease` (``lease=False``: a private copy in the same wrapper) but None where no whole message
        is there yet."""
        cdef c.tsqp_slot slot
        cdef Lease leased
        if lease and self._may_take():
            try:
                if self._rx.is_ready() and self._rx.try_acquire(&slot):
                    leased = self._decoder.lease_slot(self._rx, &slot, NOW_NS)
                    if self._whole(leased.message):
                        return leased
                    leased.release()
            finally:
                self.receive_gate.give()
        return self._take_slow(lease)

    def poll(self):
        """True if there is something to receive (perhaps only a part of a message), room for the rest of a large
        message that was given away, or the peer is gone."""
        if self.direct_receive and not self.flush_due and not self._closed and self._rx.is_ready():
            return True
        return self._poll_slow()

    def can_send(self, Py_ssize_t n=1):
        """True if `n` messages could be sent now without waiting for the peer to read, or the peer is gone, so that
        waiting would be in vain. Writes what is left of a large message given away, as far as there is room."""
        if n == 1 and self.direct_send and not self._closed and not self.link_used and self._tx.is_ready():
            return True
        return self._can_send_slow(n)

    cdef bint _may_take(self) noexcept:
        """Takes the receive gate if the next message can come straight from the ring."""
        return self.direct_receive and not self.flush_due and not self._closed and self.receive_gate.take()

    cdef bint _whole(self, Message message) except -1:
        """Counts a message that came whole in its slot; else lets the slow way know where it is. False: it is not
        here."""
        if message.flags & OUT_OF_SLOT:
            self._begin(message)
            return False
        self._received += 1
        self._received_bytes += message.nbytes
        return True


include "_watcher.pxi"
