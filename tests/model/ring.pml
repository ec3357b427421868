/* ring.pml: the ring's protocol for the model checker spin. README.md says what is modelled and what is not.
 *
 * Parameters (-D): N entries and slots, M messages, PARTS the most parts of a message; CLOSE: each end may close
 * whenever it is between two messages; POLL: no futex, an end looks until it sees; SPURIOUS: a sleeper may wake
 * for no reason (signal, end of a slice); CANCEL: one write is given up; LIVENESS: adds the LTL property.
 * BROKEN_x: a wrong protocol, which must be found out.
 */
#ifndef N
#define N 2
#endif
#ifndef M
#define M 4
#endif
#ifndef PARTS
#define PARTS 2
#endif
#if N > 3
#error the choices of a slot and of a lease are written out for at most 3
#endif

#define PRODUCER 0
#define CONSUMER 1
#define DEPTH 4 /* stores that a processor may hold back from the other */

/* ---- shared memory: layout.h, struct tsqp_entry and the closed words of struct tsqp_end_words ---- */

#define ENTRY_WORDS 6
#define SEQ(e) ((e) * ENTRY_WORDS)
#define WAITING(e, end) ((e) * ENTRY_WORDS + 1 + (end)) /* producer_waiting, consumer_waiting */
#define SLOT(e) ((e) * ENTRY_WORDS + 3)
#define NBYTES(e) ((e) * ENTRY_WORDS + 4)
#define FILLED(e) ((e) * ENTRY_WORDS + 5)
#define CLOSED(end) (N * ENTRY_WORDS + (end))
#define DATA(s, p) (N * ENTRY_WORDS + 2 + (s) * PARTS + (p))
#define WORDS (N * ENTRY_WORDS + 2 + N * PARTS)

byte mem[WORDS];

#define EVEN(k) (2 * ((k) / N))          /* ring.c: lap_even */
#define NAME(k) ((k) + 1)                /* what every part of message k holds */
#define SIZE(k) (1 + ((k) + 1) % PARTS)  /* parts of message k; the first is its header */
#define GARBAGE 255
#define NOBODY 255

/* ---- what the checker looks at ---- */

byte published; /* messages whose sequence word was stored */
byte delivered; /* messages read, each part of them right */
byte ended;     /* ends that are through */

#ifdef LIVENESS
#ifdef CLOSE
ltl both_ends_come_to_an_end { <> (ended == 2) }
#else
ltl every_message_arrives { <> (delivered == M && ended == 2) }
#endif
#endif

/* ---- memory order: each processor's stores wait in a buffer that drains in any order it may ----
 *
 * Weaker than x86 (which drains in program order): two stores to different words may pass each other, except
 * that a release store waits for all before it. An atomic read-modify-write needs an empty buffer. */

typedef buffer {
    byte count;
    byte at[DEPTH];
    byte value[DEPTH];
    bool ordered[DEPTH];
}
buffer pending[2];

#define SAME(b, i, j) (pending[b].at[i] == pending[b].at[j])
#define FREE(b, i) (pending[b].count > i && !pending[b].ordered[i])
#define MAY_DRAIN_0(b) (pending[b].count > 0)
#define MAY_DRAIN_1(b) (FREE(b, 1) && !SAME(b, 1, 0))
#define MAY_DRAIN_2(b) (FREE(b, 2) && !SAME(b, 2, 0) && !SAME(b, 2, 1))
#define MAY_DRAIN_3(b) (FREE(b, 3) && !SAME(b, 3, 0) && !SAME(b, 3, 1) && !SAME(b, 3, 2))

inline drain(b, i) {
    mem[pending[b].at[i]] = pending[b].value[i];
    move = i;
    do
    :: move + 1 < pending[b].count ->
        pending[b].at[move] = pending[b].at[move + 1];
        pending[b].value[move] = pending[b].value[move + 1];
        pending[b].ordered[move] = pending[b].ordered[move + 1];
        move++
    :: else -> break
    od;
    pending[b].count--;
    pending[b].at[pending[b].count] = 0;
    pending[b].value[pending[b].count] = 0;
    pending[b].ordered[pending[b].count] = 0;
    move = 0
}

inline put(me, word, new, is_release) {
    d_step {
        pending[me].count < DEPTH ->
        pending[me].at[pending[me].count] = word;
        pending[me].value[pending[me].count] = new;
        pending[me].ordered[pending[me].count] = is_release;
        pending[me].count++
    }
}

/* access.h: tsqp_store_relaxed and the blocks of tsqp_copy_to_shared */
#define store_relaxed(me, word, new) put(me, word, new, 0)
/* access.h: tsqp_store_release */
#define store_release(me, word, new) put(me, word, new, 1)

/* access.h: tsqp_publish, tsqp_store_seq_cst (an exchange) */
inline exchange(me, word, new) { d_step { pending[me].count == 0 -> mem[word] = new } }

/* access.h: tsqp_add_seq_cst */
inline add(me, word, what) { d_step { pending[me].count == 0 -> mem[word] = mem[word] + what } }

/* access.h: tsqp_load_acquire; sees this processor's own stores first */
inline load(me, word, out) {
    d_step {
        out = mem[word];
        look = 0;
        do
        :: look < pending[me].count ->
            if
            :: pending[me].at[look] == word -> out = pending[me].value[look]
            :: else
            fi;
            look++
        :: else -> break
        od;
        look = 0
    }
}

/* ---- sleeping: wait.c ---- */

byte asleep[2] = NOBODY; /* the word an end sleeps on */

#ifdef POLL
/* wait.c: spin, yield, poll_once: looking is all there is. */
inline wait(me, word, idle, waiting) { mem[word] != (idle) || mem[CLOSED(1 - me)] }
inline futex_wake(me, word) { skip }
inline wake(me, word, waiting) { skip }
#else
/* wait.c: block_once with futex_one. The kernel's compare and its going to sleep are one step. */
inline wait(me, word, idle, waiting) {
#if defined(BROKEN_WAITING_LATE)
    store_relaxed(me, waiting, 1);
#elif defined(BROKEN_CLEARED_BY_PUBLISHER)
    exchange(me, waiting, 1);
#else
    add(me, waiting, 1);
#endif
    load(me, CLOSED(1 - me), got);
    if
    :: got -> skip
    :: else ->
#ifdef BROKEN_NO_COMPARE
        asleep[me] = word;
#else
        atomic {
            if
            :: mem[word] == (idle) -> asleep[me] = word
            :: else
            fi
        };
#endif
        asleep[me] == NOBODY
    fi;
#if defined(BROKEN_WAITING_LATE)
    store_relaxed(me, waiting, 0);
#elif !defined(BROKEN_CLEARED_BY_PUBLISHER)
    add(me, waiting, -1);
#endif
    got = 0
}

/* wait.c: the FUTEX_WAKE of tsqp_wake */
inline futex_wake(me, word) {
    d_step {
        if
        :: asleep[1 - me] == word -> asleep[1 - me] = NOBODY
        :: else
        fi
    }
}

/* wait.c: tsqp_wake */
inline wake(me, word, waiting) {
#ifdef BROKEN_CLEARED_BY_PUBLISHER
    d_step { pending[me].count == 0 -> got = mem[waiting]; mem[waiting] = 0 };
#else
    load(me, waiting, got);
#endif
    if
    :: got -> futex_wake(me, word)
    :: else
    fi;
    got = 0
}
#endif

/* shm.c: tsqp_segment_close_end, then ring.c: tsqp_ring_wake_peer */
inline close_end(me) {
    exchange(me, CLOSED(me), 1);
    at = 0;
    do
    :: at < N -> wake(me, SEQ(at), WAITING(at, 1 - me)); at++
    :: else -> break
    od;
    at = 0
}

/* ---- the producer ---- */

/* ring.c: reclaim, try_reclaim */
inline reclaim(k) {
    if
    :: entry_slot[(k) % N] != NOBODY ->
#ifdef BROKEN_RECLAIM_BLIND
        got = EVEN(k) + 2;
#else
        load(PRODUCER, SEQ((k) % N), got);
#endif
        d_step {
            if
            :: got == EVEN(k) + 2 ->
                is_free[entry_slot[(k) % N]] = 1;
                free_count++;
                entry_slot[(k) % N] = NOBODY
            :: else
            fi;
            got = 0
        }
    :: else
    fi
}

/* ring.c: take_slot. Which free slot is taken is pop_slot's policy; here it may be any of them. */
inline take_slot() {
    if
    :: next >= N -> reclaim(next - N)
    :: else
    fi;
    if
    :: next > 0 -> reclaim(next - 1)
    :: else
    fi;
    if
    :: next >= N -> at = next - N
    :: else -> at = 0
    fi;
    do
    :: free_count == 0 && at < next -> reclaim(at); at++
    :: else -> break
    od;
    at = 0;
    assert(free_count > 0); /* else TSQP_CORRUPTED, which an honest peer never sees */
    if
    :: is_free[0] -> slot = 0
#if N > 1
    :: is_free[1] -> slot = 1
#endif
#if N > 2
    :: is_free[2] -> slot = 2
#endif
    fi;
    d_step { is_free[slot] = 0; free_count-- }
}

/* ring.c: tsqp_ring_publish_part */
inline publish() {
    store_relaxed(PRODUCER, SLOT(next % N), slot);
    store_relaxed(PRODUCER, NBYTES(next % N), SIZE(next));
#ifndef BROKEN_FILLED_STALE
    store_relaxed(PRODUCER, FILLED(next % N), part);
#endif
    entry_slot[next % N] = slot;
#ifdef BROKEN_LOOK_FIRST
    load(PRODUCER, WAITING(next % N, CONSUMER), seen);
#endif
#if defined(BROKEN_PUBLISH_RELAXED)
    store_relaxed(PRODUCER, SEQ(next % N), EVEN(next) + 1);
    published++;
#elif defined(BROKEN_PUBLISH_RELEASE)
    store_release(PRODUCER, SEQ(next % N), EVEN(next) + 1);
    published++;
#else
    d_step { pending[PRODUCER].count == 0 -> mem[SEQ(next % N)] = EVEN(next) + 1; published++ };
#endif
#ifdef BROKEN_LOOK_FIRST
    if
    :: seen -> futex_wake(PRODUCER, SEQ(next % N))
    :: else
    fi;
    seen = 0
#else
    wake(PRODUCER, SEQ(next % N), WAITING(next % N, CONSUMER))
#endif
}

/* ring.c: tsqp_ring_fill */
inline fill() {
    if
#ifdef BROKEN_FILL_RELAXED
    :: store_relaxed(PRODUCER, FILLED(next % N), part)
#else
    :: part < SIZE(next) -> store_release(PRODUCER, FILLED(next % N), part)
    :: part == SIZE(next) -> exchange(PRODUCER, FILLED(next % N), part)
#endif
    fi;
#ifndef BROKEN_FILL_SILENT
    if
    :: part == SIZE(next) -> wake(PRODUCER, FILLED(next % N), WAITING(next % N, CONSUMER))
    :: else
    fi
#endif
}

/* stream.c: tsqp_outflow_copy and tsqp_outflow_mark. Where the marks fall is policy: here after any part, but
 * the last mark is the whole message. */
inline write_message() {
    do
    :: part < SIZE(next) ->
        store_relaxed(PRODUCER, DATA(slot, part), NAME(next));
        part++;
        if
        :: part < SIZE(next) -> skip
        :: marked == 0 -> publish(); marked = part
        :: marked > 0 -> fill(); marked = part
        fi
    :: part == SIZE(next) -> break
    od
}

active proctype producer() {
    byte next, slot, part, marked, got, seen, at, look, free_count = N;
    bool is_free[N] = 1;
    byte entry_slot[N] = NOBODY;
#ifdef CANCEL
    bool cancelled;
#endif
    do
    :: next == M -> break
#ifdef CLOSE
    :: next < M -> break
#endif
    :: next < M ->
        /* ring.c: tsqp_ring_try_write */
        load(PRODUCER, SEQ(next % N), got);
        if
        :: got != EVEN(next) ->
            assert(got + 1 == EVEN(next));
            load(PRODUCER, CLOSED(CONSUMER), got);
            if
            :: got -> break
            :: else -> wait(PRODUCER, SEQ(next % N), EVEN(next) - 1, WAITING(next % N, PRODUCER))
            fi
        :: else ->
            load(PRODUCER, CLOSED(CONSUMER), got);
            if
            :: got -> break
            :: else
            fi;
            take_slot();
            if
#ifdef CANCEL
            :: !cancelled ->
                /* ring.c: tsqp_ring_cancel, after something was written to the slot */
                cancelled = 1;
                store_relaxed(PRODUCER, DATA(slot, 0), GARBAGE);
                d_step { is_free[slot] = 1; free_count++; slot = 0 }
#endif
            ::
                write_message();
                skip;
                d_step { next++; part = 0; marked = 0; slot = 0; got = 0 }
            fi
        fi
    od;
#ifdef CLOSE
    close_end(PRODUCER);
#endif
    ended++
}

/* ---- the consumer ---- */

/* ring.c: tsqp_ring_release */
inline release(k) {
#ifdef BROKEN_RELEASE_RELAXED
    store_relaxed(CONSUMER, SEQ((k) % N), EVEN(k) + 2);
#else
    exchange(CONSUMER, SEQ((k) % N), EVEN(k) + 2);
#endif
#ifndef BROKEN_RELEASE_SILENT
    wake(CONSUMER, SEQ((k) % N), WAITING((k) % N, PRODUCER))
#endif
}

/* One part of message `k`: it is that message's, whole. */
inline check_part(k) {
    assert(mem[DATA(slot, part)] == NAME(k))
}

/* ring.c: tsqp_ring_follow, and a wait with tsqp_ring_fill_watch where that was in vain */
inline follow() {
    load(CONSUMER, FILLED(next % N), got);
    assert(got >= filled && got <= size);
    if
    :: got == filled ->
        wait(CONSUMER, FILLED(next % N), filled, WAITING(next % N, CONSUMER))
    :: else -> filled = got; got = 0
    fi
}

/* stream.c: tsqp_inflow_copy: what is there is copied, then the mark is looked at again. */
inline copy_message() {
    do
    :: part < filled -> check_part(next); part++
    :: part == filled && part < size ->
#ifdef BROKEN_FOLLOW_RELAXED
        /* A load that may be done before the mark is looked at. */
        early = mem[DATA(slot, part)];
        follow();
        if
        :: filled > part -> assert(early == NAME(next)); part++
        :: else
        fi
#else
        follow()
#endif
    :: part == size -> break
    od;
#ifdef BROKEN_RELEASE_RELAXED
    /* Loads may be done as late as after a relaxed store that follows them. */
    release(next);
    part = 0;
    do
    :: part < size -> check_part(next); part++
    :: else -> break
    od
#else
    release(next)
#endif
}

/* A lease is handed out when the whole message is there. */
inline lease_message() {
#ifndef BROKEN_LEASE_EARLY
    do
    :: filled < size -> follow()
    :: else -> break
    od;
#endif
    do
    :: part < size -> check_part(next); part++
    :: else -> break
    od;
    skip; /* no jump may end in a d_step */
    d_step { is_leased[next % N] = 1; leased_slot[next % N] = slot; leased_k[next % N] = next; leases++ }
}

/* The holder of a lease looks at its tensors to the very end. */
inline give_back(e) {
    d_step { slot = leased_slot[e]; k = leased_k[e]; part = 0 };
    do
    :: part < SIZE(k) -> check_part(k); part++
    :: else -> break
    od;
    skip;
    d_step { is_leased[e] = 0; leases--; leased_slot[e] = 0; leased_k[e] = 0 };
    release(k);
    d_step { slot = 0; k = 0; part = 0 }
}

/* ring.c: the part of tsqp_ring_try_read after the sequence word */
inline read_entry() {
    slot = mem[SLOT(next % N)];
    size = mem[NBYTES(next % N)];
    load(CONSUMER, FILLED(next % N), filled)
}

active proctype consumer() {
    byte next, slot, size, filled, part, k, got, at, look, leases;
    bool is_leased[N];
    byte leased_slot[N], leased_k[N];
#ifdef BROKEN_FOLLOW_RELAXED
    byte early;
#endif
    do
#ifdef CLOSE
    :: break /* this end closes, with leases in its hands or not */
    :: !is_leased[next % N] ->
#else
    :: next == M && leases == 0 -> break
    :: next < M && !is_leased[next % N] ->
#endif
        /* ring.c: tsqp_ring_try_read */
#ifdef BROKEN_READ_RELAXED
        read_entry();
#endif
        load(CONSUMER, SEQ(next % N), got);
        if
        :: got == EVEN(next) ->
            load(CONSUMER, CLOSED(PRODUCER), got);
            if
            :: got ->
#ifdef BROKEN_CLOSE_ONE_LOOK
                got = EVEN(next);
#else
                load(CONSUMER, SEQ(next % N), got);
#endif
                if
                :: got == EVEN(next) -> assert(next == published); break
                :: else
                fi
            :: else ->
                wait(CONSUMER, SEQ(next % N), EVEN(next), WAITING(next % N, CONSUMER));
                goto again
            fi
        :: else
        fi;
        assert(got == EVEN(next) + 1);
        got = 0;
#ifndef BROKEN_READ_RELAXED
        read_entry();
#endif
        assert(slot < N && size == SIZE(next) && filled <= size && filled > 0);
        if
        :: copy_message()
        :: lease_message()
        :: filled < size ->
            /* ring.c: tsqp_ring_unread, then a wait with tsqp_ring_watch for all of it */
            wait(CONSUMER, FILLED(next % N), filled, WAITING(next % N, CONSUMER));
            d_step { slot = 0; size = 0; filled = 0 };
            goto again
        fi;
        skip;
        d_step { delivered++; next++; slot = 0; size = 0; filled = 0; part = 0 };
again: skip
    :: is_leased[0] -> give_back(0)
#if N > 1
    :: is_leased[1] -> give_back(1)
#endif
#if N > 2
    :: is_leased[2] -> give_back(2)
#endif
    od;
#ifdef CLOSE
    close_end(CONSUMER);
#endif
    ended++
}

/* ---- what happens by itself: stores become visible; sleepers wake for no reason ---- */

active proctype nature() {
    byte move;
end:
    do
    :: d_step { MAY_DRAIN_0(PRODUCER) -> drain(PRODUCER, 0) }
    :: d_step { MAY_DRAIN_1(PRODUCER) -> drain(PRODUCER, 1) }
    :: d_step { MAY_DRAIN_2(PRODUCER) -> drain(PRODUCER, 2) }
    :: d_step { MAY_DRAIN_3(PRODUCER) -> drain(PRODUCER, 3) }
    :: d_step { MAY_DRAIN_0(CONSUMER) -> drain(CONSUMER, 0) }
    :: d_step { MAY_DRAIN_1(CONSUMER) -> drain(CONSUMER, 1) }
    :: d_step { MAY_DRAIN_2(CONSUMER) -> drain(CONSUMER, 2) }
    :: d_step { MAY_DRAIN_3(CONSUMER) -> drain(CONSUMER, 3) }
    od
}

/* The end of a slice, or a signal. Only a close needs it: the wake of tsqp_ring_wake_peer may fall between the
 * peer's look at `closed` and its sleep, in which the kernel compares another word. So without SPURIOUS no sleep
 * ends by itself but that of an end whose peer closed. */
#ifdef SPURIOUS
#define ENDS_BY_ITSELF(end) (asleep[end] != NOBODY)
#else
#define ENDS_BY_ITSELF(end) (asleep[end] != NOBODY && mem[CLOSED(1 - (end))])
#endif
#if defined(SPURIOUS) || defined(CLOSE) && !defined(BROKEN_CLOSE_UNSLICED)
active proctype disturbance() {
end:
    do
    :: d_step { ENDS_BY_ITSELF(PRODUCER) -> asleep[PRODUCER] = NOBODY }
    :: d_step { ENDS_BY_ITSELF(CONSUMER) -> asleep[CONSUMER] = NOBODY }
    od
}
#endif
