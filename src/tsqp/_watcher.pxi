# Included by _channel.pyx: many channels looked after by one thread.

cdef class Watcher:
    """Looks after many ports for one thread: which have something to receive, and a wait for the next that will."""

    cdef Doorbell bell
    cdef c.tsqp_watch *watches
    cdef size_t room
    cdef uint64_t noticed
    cdef bint look_closer

    def __init__(self, Doorbell bell):
        self.bell = bell
        self.look_closer = True

    def __dealloc__(self):
        free(self.watches)

    def ready(self, list ports):
        """The ports that have something to receive or whose peer is gone.

        A look at a ring is cheap and always taken; what libzmq knows is asked only after the bell was rung, as it is
        for each of its events, and after a wait that timed out.
        """
        cdef uint64_t count = c.tsqp_load_acquire(&self.bell.bell.count)
        cdef bint closer = self.look_closer or count != self.noticed
        cdef Port port
        cdef list found = []
        for port in ports:
            if port._closed:
                continue
            if port.direct_receive and not port.flush_due:
                if port._rx.is_ready() or (closer and port._poll_slow()):
                    found.append(port)
            elif port._poll_slow():
                found.append(port)
        if closer:
            self.noticed, self.look_closer = count, False
        return found

    def wait(self, list ports, timeout):
        """Waits until :meth:`ready` may find one of `ports`, the bell is rung, or `timeout` seconds passed."""
        cdef size_t count = 1
        cdef Port port
        cdef Ring ring
        self._make_room(len(ports) + 1)
        for port in ports:
            ring = port.wait_ring if port.flush_due or not port.direct_receive else port._rx
            if ring is not None and not port._closed:
                ring.segment.usable()
                self.watches[count] = c.tsqp_ring_watch(ring.ptr)
                count += 1
        if not self.bell.wait_watches(self.watches, count, deadline_of(timeout)):
            self.look_closer = True

    cdef int _make_room(self, size_t count) except -1:
        cdef c.tsqp_watch *larger
        if count > self.room:
            larger = <c.tsqp_watch *>realloc(self.watches, 2 * count * sizeof(c.tsqp_watch))
            if larger == NULL:
                raise MemoryError()
            self.watches, self.room = larger, 2 * count
        return 0
