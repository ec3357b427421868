/* Two threads over one ring, one producer and one consumer, and what is left in it by a close. */
#include "stress.h"

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

static const struct scenario CLOSING[] = {
    {"auto, ", TSQP_WAIT_AUTO, 3, 1, false, 8},
    {"block, ", TSQP_WAIT_BLOCK, 3, 1, false, 8},
};

int main(int argc, char **argv) {
    uint64_t messages;
    stress_start(argc, argv, &messages);
    RUN_SCENARIOS(STREAMS, messages, messages_arrive_whole_and_in_order);
    RUN_SCENARIOS(CLOSING, messages < 400000 ? messages : 400000, nothing_published_is_lost_by_a_close);
    return stress_end();
}
