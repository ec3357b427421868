/* One thread that waits for many rings and a bell. */
#include "stress.h"

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

/* ---- scenarios ---- */

static const struct scenario MANY[] = {
    {"auto, ", TSQP_WAIT_AUTO, 3, 1, false, 8},
    {"block, ", TSQP_WAIT_BLOCK, 2, 1, false, 8},
    {"poll, ", TSQP_WAIT_POLL, 2, 1, false, 2},
};

int main(int argc, char **argv) {
    uint64_t messages;
    stress_start(argc, argv, &messages);
    RUN_SCENARIOS(MANY, messages, one_thread_serves_many_rings_and_a_bell);
    return stress_end();
}
