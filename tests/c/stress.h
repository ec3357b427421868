/* stress.h: what the stress tests share: two threads over one segment, messages of random size, whole or in
 * parts, whose every byte follows from their number. Meant for the thread sanitizer, and for the bare machine
 * at full speed.
 *
 *   stress_... [MESSAGES] [SEED]      MESSAGES in all, spread over the scenarios (default 400000)
 */
#ifndef TSQP_STRESS_H
#define TSQP_STRESS_H

#include "access.h"
#include "scratch.h"

#include <pthread.h>
#include <time.h>

/* A waiter that sleeps this long while its word is ready has missed its wake-up. */
#define SLICE_NS UINT64_C(30000000000)
#define CHUNK_BYTES 3000
#define MAX_CHUNKS 16

static uint64_t seed = 1;

static inline _Noreturn void die(const char *what, uint64_t at) {
    printf("message %" PRIu64 ": %s\n", at, what);
    fflush(stdout);
    scratch_remove();
    _exit(1); /* the other thread still waits */
}

/* ---- both ends in one process ---- */

/* The sanitizer follows addresses, so both threads use one mapping: a second handle on it plays the attacher.
 */
static inline struct tsqp_segment *other_end(const struct tsqp_segment *creator) {
    struct tsqp_segment *end = check_malloc(sizeof *end);
    *end = *creator;
    end->end = 1;
    end->fd = -1;
    end->unlinked = true;
    atomic_init(&end->references, 1000); /* never released: the mapping is the creator's */
    return end;
}

struct link {
    struct tsqp_segment *creator, *attacher;
    struct tsqp_ring *producer, *consumer;
    bool two_mappings;
};

static inline struct link link_open(uint64_t chunks, enum tsqp_wait_mode mode, bool two_mappings) {
    struct tsqp_geometry geometry = {CHUNK_BYTES, chunks, 1};
    struct link link = {.two_mappings = two_mappings};
    CHECK_EQ(tsqp_segment_create(&geometry, NULL, &link.creator), TSQP_OK);
    if (two_mappings)
        CHECK_EQ(tsqp_segment_attach(&geometry, tsqp_segment_name(link.creator), NULL, &link.attacher),
                 TSQP_OK);
    else
        link.attacher = other_end(link.creator);
    CHECK_EQ(tsqp_ring_open(link.creator, 0, TSQP_PRODUCER, &link.producer), TSQP_OK);
    CHECK_EQ(tsqp_ring_open(link.attacher, 0, TSQP_CONSUMER, &link.consumer), TSQP_OK);
    /* A short spin: both ways to wait are taken all the time. */
    tsqp_waiter_init(tsqp_ring_waiter(link.producer), mode, 3000, true);
    tsqp_waiter_init(tsqp_ring_waiter(link.consumer), mode, 3000, true);
    return link;
}

static inline void link_close(struct link *link) {
    tsqp_ring_close(link->producer);
    tsqp_ring_close(link->consumer);
    if (link->two_mappings)
        tsqp_segment_release(link->attacher);
    else
        free(link->attacher);
    tsqp_segment_release(link->creator);
}

/* ---- messages whose every byte follows from their number ---- */

static inline uint64_t message_bytes(uint64_t k) {
    uint64_t state = seed ^ (k << 1), kind = check_random(&state), size = check_random(&state);
    if (kind % 16 == 0)
        return CHUNK_BYTES;
    return kind % 4 == 0 ? size % (CHUNK_BYTES + 1) : size % 129;
}

static inline uint64_t message_word(uint64_t k, uint64_t i) {
    return (k + 1) * UINT64_C(0x9e3779b97f4a7c15) ^ i * seed;
}

static inline void fill(uint8_t *out, uint64_t k, uint64_t nbytes) {
    for (uint64_t i = 0; i * 8 < nbytes; i++) {
        uint64_t word = message_word(k, i), left = nbytes - i * 8;
        memcpy(out + i * 8, &word, left < 8 ? left : 8);
    }
}

static inline void verify(const uint8_t *data, uint64_t k, uint64_t nbytes) {
    for (uint64_t i = 0; i * 8 < nbytes; i++) {
        uint64_t want = message_word(k, i), word = want, left = nbytes - i * 8;
        memcpy(&word, data + i * 8, left < 8 ? left : 8);
        if (word != want)
            die("its bytes are not those that were sent", k);
    }
}

/* Now and then an end dawdles, so that the other finds the ring empty, or full, and goes to sleep. */
static inline void dawdle(uint64_t *state) {
    if (check_random(state) % 256 == 0) {
        struct timespec ts = {.tv_nsec = (long)(check_random(state) % 60000)};
        nanosleep(&ts, NULL);
    }
}

static inline void wait_for(struct tsqp_ring *ring, uint64_t k) {
    struct tsqp_watch watch = tsqp_ring_watch(ring);
    uint64_t start = tsqp_now_ns();
    tsqp_wait(tsqp_ring_waiter(ring), &watch, 1, SLICE_NS);
    if (tsqp_now_ns() - start >= SLICE_NS)
        die("nobody woke the waiting end", k);
}

/* ---- messages published while they are still written ---- */

static inline void write_in_parts(struct tsqp_ring *ring, const struct tsqp_slot *slot, const uint8_t *data,
                                  uint64_t nbytes, uint64_t *state) {
    uint64_t filled = 0;
    int rc = TSQP_OK;
    do {
        /* Blocks are shared whole, so a part ends with one, or with the message. */
        uint64_t part = (check_random(state) % 12 + 1) * TSQP_LINE;
        uint64_t upto = filled + part < nbytes ? filled + part : nbytes;
        tsqp_copy_to_shared(slot->data + filled, data + filled, upto - filled);
        rc = filled == 0 ? tsqp_ring_publish_part(ring, slot, nbytes, upto) : tsqp_ring_fill(ring, upto);
        filled = upto;
        if (check_random(state) % 1024 == 0)
            nanosleep(&(struct timespec){.tv_nsec = 20000},
                      NULL); /* long enough for the reader to go to sleep */
    } while (rc == TSQP_OK && filled < nbytes);
    if (rc != TSQP_OK)
        die("a part could not be published", slot->ticket);
}

static inline void follow(struct tsqp_ring *ring, struct tsqp_slot *slot) {
    int rc;
    while ((rc = tsqp_ring_follow(ring, slot, slot->nbytes)) == TSQP_AGAIN) {
        struct tsqp_watch watch = tsqp_ring_fill_watch(ring, slot);
        uint64_t start = tsqp_now_ns();
        tsqp_wait(tsqp_ring_waiter(ring), &watch, 1, SLICE_NS);
        if (tsqp_now_ns() - start >= SLICE_NS)
            die("nobody woke the reader of a message in parts", slot->ticket);
    }
    if (rc != TSQP_OK)
        die("its parts went wrong", slot->ticket);
}

/* As the parts come, or once all of them are there. */
static inline void read_in_parts(struct tsqp_ring *ring, struct tsqp_slot *slot, uint8_t *out,
                                 bool as_they_come) {
    uint64_t done = 0;
    if (!as_they_come)
        follow(ring, slot);
    while (tsqp_inflow_copy(ring, slot, 0, out, slot->nbytes, &done) == TSQP_AGAIN) {
        struct tsqp_watch watch = tsqp_ring_fill_watch(ring, slot);
        tsqp_wait(tsqp_ring_waiter(ring), &watch, 1, SLICE_NS);
    }
    if (done != slot->nbytes)
        die("its parts went wrong", slot->ticket);
    follow(ring, slot);
}

/* ---- one producer, one consumer ---- */

struct scenario {
    const char *name;
    enum tsqp_wait_mode mode;
    uint64_t chunks;
    unsigned
        held; /* how many leases the consumer holds and gives back in random order; 1: one after the other */
    bool two_mappings;
    uint64_t share; /* of all messages */
};

struct run {
    const struct scenario *scenario;
    struct link link;
    uint64_t messages;
};

static inline void *produce(void *argument) {
    struct run *run = argument;
    struct tsqp_ring *ring = run->link.producer;
    uint8_t private[CHUNK_BYTES];
    uint64_t state = seed + 1;
    for (uint64_t k = 0; k < run->messages; k++) {
        struct tsqp_slot slot;
        int rc;
        while ((rc = tsqp_ring_try_write(ring, &slot)) == TSQP_AGAIN)
            wait_for(ring, k);
        if (rc != TSQP_OK)
            die("try_write failed", k);
        if (check_random(&state) % 64 == 0) { /* a write that is given up leaves no trace */
            memset(slot.data, 0xff, 64);
            tsqp_ring_cancel(ring, &slot);
            k--;
            continue;
        }
        uint64_t nbytes = message_bytes(k);
        fill(private, k, nbytes);
        if (check_random(&state) % 2 && nbytes > 0) {
            write_in_parts(ring, &slot, private, nbytes, &state);
        } else {
            tsqp_copy_to_shared(slot.data, private, nbytes);
            if (tsqp_ring_publish(ring, &slot, nbytes) != TSQP_OK)
                die("publish failed", k);
        }
        dawdle(&state);
    }
    return NULL;
}

static const struct scenario *current;
static uint64_t current_messages;

static inline void run_scenarios(const struct scenario *all, size_t count, uint64_t messages,
                                 const char *name, void (*test)(void)) {
    for (size_t i = 0; i < count; i++) {
        current = &all[i];
        current_messages = messages * current->share / 100;
        check_group = current->name;
        check_run(name, test);
    }
}

static inline void stress_start(int argc, char **argv, uint64_t *messages) {
    *messages = argc > 1 ? strtoull(argv[1], NULL, 10) : 400000;
    seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    scratch_make();
}

static inline int stress_end(void) {
    scratch_remove();
    return check_result();
}

#define RUN_SCENARIOS(all, messages, test)                                                                   \
    run_scenarios(all, sizeof all / sizeof all[0], messages, #test, test)

#endif
