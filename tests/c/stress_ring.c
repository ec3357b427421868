/* Two threads over one segment, messages of random size, whole or in parts, each byte checked; then one
 * thread waiting for many rings and a bell. Meant for the thread sanitizer, and for the bare machine at full
 * speed.
 *
 *   stress_ring [MESSAGES] [SEED]      MESSAGES in all, spread over the scenarios (default 400000)
 */
#include "access.h"
#include "scratch.h"

#include <pthread.h>
#include <time.h>

/* A waiter that sleeps this long while its word is ready has missed its wake-up. */
#define SLICE_NS UINT64_C(30000000000)
#define CHUNK_BYTES 3000
#define MAX_CHUNKS 16

static uint64_t seed = 1;

static _Noreturn void die(const char *what, uint64_t at) {
    printf("message %" PRIu64 ": %s\n", at, what);
    fflush(stdout);
    scratch_remove();
    _exit(1); /* the other thread still waits */
}

/* ---- both ends in one process ---- */

/* The sanitizer follows addresses, so both threads use one mapping: a second handle on it plays the attacher.
 */
static struct tsqp_segment *other_end(const struct tsqp_segment *creator) {
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

static struct link link_open(uint64_t chunks, enum tsqp_wait_mode mode, bool two_mappings) {
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

static void link_close(struct link *link) {
    tsqp_ring_close(link->producer);
    tsqp_ring_close(link->consumer);
    if (link->two_mappings)
        tsqp_segment_release(link->attacher);
    else
        free(link->attacher);
    tsqp_segment_release(link->creator);
}

/* ---- messages whose every byte follows from their number ---- */

static uint64_t message_bytes(uint64_t k) {
    uint64_t state = seed ^ (k << 1), kind = check_random(&state), size = check_random(&state);
    if (kind % 16 == 0)
        return CHUNK_BYTES;
    return kind % 4 == 0 ? size % (CHUNK_BYTES + 1) : size % 129;
}

static uint64_t message_word(uint64_t k, uint64_t i) {
    return (k + 1) * UINT64_C(0x9e3779b97f4a7c15) ^ i * seed;
}

static void fill(uint8_t *out, uint64_t k, uint64_t nbytes) {
    for (uint64_t i = 0; i * 8 < nbytes; i++) {
        uint64_t word = message_word(k, i), left = nbytes - i * 8;
        memcpy(out + i * 8, &word, left < 8 ? left : 8);
    }
}

static void verify(const uint8_t *data, uint64_t k, uint64_t nbytes) {
    for (uint64_t i = 0; i * 8 < nbytes; i++) {
        uint64_t want = message_word(k, i), word = want, left = nbytes - i * 8;
        memcpy(&word, data + i * 8, left < 8 ? left : 8);
        if (word != want)
            die("its bytes are not those that were sent", k);
    }
}

/* Now and then an end dawdles, so that the other finds the ring empty, or full, and goes to sleep. */
static void dawdle(uint64_t *state) {
    if (check_random(state) % 256 == 0) {
        struct timespec ts = {.tv_nsec = (long)(check_random(state) % 60000)};
        nanosleep(&ts, NULL);
    }
}

static void wait_for(struct tsqp_ring *ring, uint64_t k) {
    struct tsqp_watch watch = tsqp_ring_watch(ring);
    uint64_t start = tsqp_now_ns();
    tsqp_wait(tsqp_ring_waiter(ring), &watch, 1, SLICE_NS);
    if (tsqp_now_ns() - start >= SLICE_NS)
        die("nobody woke the waiting end", k);
}

/* ---- messages published while they are still written ---- */

static void write_in_parts(struct tsqp_ring *ring, const struct tsqp_slot *slot, const uint8_t *data,
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

static void follow(struct tsqp_ring *ring, struct tsqp_slot *slot) {
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
static void read_in_parts(struct tsqp_ring *ring, struct tsqp_slot *slot, uint8_t *out, bool as_they_come) {
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

static void *produce(void *argument) {
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

static void give_back(struct tsqp_ring *ring, struct tsqp_slot *leases, unsigned *count, uint64_t choice) {
    struct tsqp_slot *slot = &leases[choice % *count];
    verify(slot->data, slot->ticket, slot->nbytes); /* nobody wrote there meanwhile */
    if (tsqp_ring_release(ring, slot) != TSQP_OK)
        die("release failed", slot->ticket);
    *slot = leases[--*count];
}

static void *consume(void *argument) {
    struct run *run = argument;
    struct tsqp_ring *ring = run->link.consumer;
    struct tsqp_slot leases[MAX_CHUNKS];
    uint8_t private[CHUNK_BYTES];
    unsigned count = 0;
    uint64_t state = seed + 2;
    for (uint64_t k = 0; k < run->messages; k++) {
        struct tsqp_slot slot;
        int rc;
        while ((rc = tsqp_ring_try_read(ring, &slot)) == TSQP_AGAIN || rc == TSQP_USAGE) {
            if (count >
                0) /* what is held may be what the producer waits for, or this entry's own last lease */
                give_back(ring, leases, &count, check_random(&state));
            else
                wait_for(ring, k);
        }
        if (rc != TSQP_OK || slot.ticket != k || slot.nbytes != message_bytes(k))
            die("it arrived wrong, or not at all", k);
        if (check_random(&state) % 64 == 0) { /* given back unread, it comes again */
            if (tsqp_ring_unread(ring, &slot) != TSQP_OK || tsqp_ring_try_read(ring, &slot) != TSQP_OK)
                die("it could not be given back unread", k);
        }
        read_in_parts(ring, &slot, private, check_random(&state) % 2);
        verify(private, k, slot.nbytes);
        leases[count++] = slot;
        if (count >= run->scenario->held)
            give_back(ring, leases, &count, check_random(&state));
        dawdle(&state);
    }
    while (count > 0)
        give_back(ring, leases, &count, 0);
    return NULL;
}

static const struct scenario *current;
static uint64_t current_messages;

static void messages_arrive_whole_and_in_order(void) {
    struct run run = {.scenario = current, .messages = current_messages};
    pthread_t producer, consumer;
    run.link = link_open(current->chunks, current->mode, current->two_mappings);
    CHECK_EQ(pthread_create(&producer, NULL, produce, &run), 0);
    CHECK_EQ(pthread_create(&consumer, NULL, consume, &run), 0);
    pthread_join(producer, NULL);
    pthread_join(consumer, NULL);
    CHECK_EQ(tsqp_ring_free_slots(run.link.producer), current->chunks);
    link_close(&run.link);
}

/* ---- many rings and a bell in one wait ---- */

#define RINGS 4

struct many {
    struct run runs[RINGS];
    struct tsqp_doorbell bell;
    uint64_t rung;     /* what the bell announces */
    uint64_t produced; /* 1: nothing but the bell wakes the server from now on */
};

#define LONE_RINGS 200

static uint64_t ring_count(const struct many *many) {
    return many->runs[0].messages / 4 + LONE_RINGS;
}

static void *ring_bell(void *argument) {
    struct many *many = argument;
    uint64_t state = seed + 3;
    for (uint64_t i = 0; i < ring_count(many); i++) {
        bool lone = i + LONE_RINGS >= ring_count(many);
        while (lone && !tsqp_load_acquire(&many->produced))
            dawdle(&state);
        tsqp_store_release(&many->rung, i + 1);
        tsqp_doorbell_ring(&many->bell);
        if (lone)
            nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
        else
            dawdle(&state);
    }
    return NULL;
}

/* One message of each ring that has one; returns how many. */
static unsigned take_turn(struct many *many, uint64_t read[RINGS]) {
    unsigned taken = 0;
    for (unsigned r = 0; r < RINGS; r++) {
        struct tsqp_slot slot;
        int rc = tsqp_ring_try_read(many->runs[r].link.consumer, &slot);
        if (rc == TSQP_AGAIN)
            continue;
        if (rc != TSQP_OK || slot.ticket != read[r])
            die("a ring of many delivered it wrong", read[r]);
        follow(many->runs[r].link.consumer, &slot);
        verify(slot.data, slot.ticket, slot.nbytes);
        tsqp_ring_release(many->runs[r].link.consumer, &slot);
        read[r]++;
        taken++;
    }
    return taken;
}

static void *serve(void *argument) {
    struct many *many = argument;
    struct tsqp_watch watches[RINGS + 1];
    struct tsqp_waiter waiter;
    uint64_t read[RINGS] = {0}, total = 0, want = RINGS * many->runs[0].messages, bells = 0;
    memset(&waiter, 0, sizeof waiter);
    tsqp_waiter_init(&waiter, current->mode, 3000, true);
    while (total < want || bells < ring_count(many)) {
        uint64_t seen = tsqp_load_acquire(&many->bell.count), start = tsqp_now_ns();
        if (tsqp_load_acquire(&many->rung) < seen)
            die("the bell rang before what it announces", seen);
        bells = seen;
        unsigned taken = take_turn(many, read);
        total += taken;
        if (taken > 0 || (total == want && bells == ring_count(many)))
            continue;
        watches[0] = (struct tsqp_watch){&many->bell.count, seen, &many->bell.waiting, NULL};
        for (unsigned r = 0; r < RINGS; r++)
            watches[r + 1] = tsqp_ring_watch(many->runs[r].link.consumer);
        tsqp_wait(&waiter, watches, RINGS + 1, SLICE_NS);
        if (tsqp_now_ns() - start >= SLICE_NS)
            die("nobody woke the server of many rings", total);
    }
    return NULL;
}

static void one_thread_serves_many_rings_and_a_bell(void) {
    struct many *many = check_malloc(sizeof *many);
    pthread_t producers[RINGS], bell, server;
    memset(many, 0, sizeof *many);
    for (unsigned r = 0; r < RINGS; r++) {
        many->runs[r] = (struct run){.scenario = current, .messages = current_messages / RINGS};
        many->runs[r].link = link_open(current->chunks, current->mode, current->two_mappings);
    }
    CHECK_EQ(pthread_create(&server, NULL, serve, many), 0);
    CHECK_EQ(pthread_create(&bell, NULL, ring_bell, many), 0);
    for (unsigned r = 0; r < RINGS; r++)
        CHECK_EQ(pthread_create(&producers[r], NULL, produce, &many->runs[r]), 0);
    for (unsigned r = 0; r < RINGS; r++)
        pthread_join(producers[r], NULL);
    tsqp_store_release(&many->produced, 1);
    pthread_join(bell, NULL);
    pthread_join(server, NULL);
    for (unsigned r = 0; r < RINGS; r++)
        link_close(&many->runs[r].link);
    free(many);
}

/* ---- closing ---- */

static void *publish_and_close(void *argument) {
    struct run *run = argument;
    for (uint64_t k = 0; k < run->messages; k++) {
        struct tsqp_slot slot;
        if (tsqp_ring_try_write(run->link.producer, &slot) != TSQP_OK)
            die("no room in an empty ring", k);
        fill(slot.data, k, message_bytes(k));
        tsqp_ring_publish(run->link.producer, &slot, message_bytes(k));
    }
    tsqp_segment_close_end(run->link.creator);
    tsqp_ring_wake_peer(run->link.producer);
    return NULL;
}

static uint64_t read_until_closed(struct run *run) {
    for (uint64_t k = 0;; k++) {
        struct tsqp_slot slot;
        int rc;
        while ((rc = tsqp_ring_try_read(run->link.consumer, &slot)) == TSQP_AGAIN) {
            struct tsqp_watch watch = tsqp_ring_watch(run->link.consumer);
            /* A close may slip in just before the sleep: the end of a short slice finds it. */
            tsqp_wait(tsqp_ring_waiter(run->link.consumer), &watch, 1, 5000000);
        }
        if (rc == TSQP_PEER_CLOSED)
            return k;
        if (rc != TSQP_OK || slot.ticket != k)
            die("the last messages before a close arrived wrong", k);
        verify(slot.data, k, slot.nbytes);
        tsqp_ring_release(run->link.consumer, &slot);
    }
}

static void nothing_published_is_lost_by_a_close(void) {
    for (uint64_t i = 0; i < current_messages / 40 + 1; i++) {
        struct run run = {.scenario = current, .messages = i % (current->chunks + 1)};
        pthread_t thread;
        run.link = link_open(current->chunks, current->mode, current->two_mappings);
        CHECK_EQ(pthread_create(&thread, NULL, publish_and_close, &run), 0);
        uint64_t read = read_until_closed(&run);
        pthread_join(thread, NULL);
        CHECK_EQ(read, run.messages);
        link_close(&run.link);
    }
}

/* ---- scenarios ---- */

static const struct scenario STREAMS[] = {
    {"auto, ", TSQP_WAIT_AUTO, 10, 1, false, 20},
    {"auto, one slot, ", TSQP_WAIT_AUTO, 1, 1, false, 6},
    {"auto, out of order, ", TSQP_WAIT_AUTO, 5, 4, false, 12},
    {"auto, two mappings, ", TSQP_WAIT_AUTO, 10, 3, true, 12},
    {"block, ", TSQP_WAIT_BLOCK, 4, 1, false, 8},
    {"block, one slot, two mappings, ", TSQP_WAIT_BLOCK, 1, 1, true, 4},
    {"block, out of order, ", TSQP_WAIT_BLOCK, 7, 7, false, 8},
    {"poll, ", TSQP_WAIT_POLL, 3, 2, false, 8},
    {"spin, ", TSQP_WAIT_SPIN, 16, 16, false, 4},
};

static const struct scenario MANY[] = {
    {"auto, ", TSQP_WAIT_AUTO, 3, 1, false, 8},
    {"block, ", TSQP_WAIT_BLOCK, 2, 1, false, 8},
    {"poll, ", TSQP_WAIT_POLL, 2, 1, false, 2},
};

static const struct scenario CLOSING[] = {
    {"auto, ", TSQP_WAIT_AUTO, 3, 1, false, 8},
    {"block, ", TSQP_WAIT_BLOCK, 3, 1, false, 8},
};

static void run_scenarios(const struct scenario *all, size_t count, uint64_t messages, const char *name,
                          void (*test)(void)) {
    for (size_t i = 0; i < count; i++) {
        current = &all[i];
        current_messages = messages * current->share / 100;
        check_group = current->name;
        check_run(name, test);
    }
}

#define RUN_SCENARIOS(all, messages, test)                                                                   \
    run_scenarios(all, sizeof all / sizeof all[0], messages, #test, test)

int main(int argc, char **argv) {
    uint64_t messages = argc > 1 ? strtoull(argv[1], NULL, 10) : 400000;
    seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    scratch_make();
    RUN_SCENARIOS(STREAMS, messages, messages_arrive_whole_and_in_order);
    RUN_SCENARIOS(MANY, messages, one_thread_serves_many_rings_and_a_bell);
    RUN_SCENARIOS(CLOSING, messages < 400000 ? messages : 400000, nothing_published_is_lost_by_a_close);
    scratch_remove();
    return check_result();
}
