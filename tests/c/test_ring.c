/* The ring's protocol, one thread playing both ends. */
#include "access.h"
#include "scratch.h"

static void write_message(struct pair *pair, uint64_t value, uint64_t nbytes) {
    struct tsqp_slot slot;
    CHECK_EQ(tsqp_ring_try_write(pair->producer, &slot), TSQP_OK);
    CHECK_EQ((uintptr_t)slot.data % 4096, 0);
    memset(slot.data, (int)(value & 0xff), nbytes);
    CHECK_EQ(tsqp_ring_publish(pair->producer, &slot, nbytes), TSQP_OK);
}

static struct tsqp_slot read_message(struct pair *pair, uint64_t value, uint64_t nbytes) {
    struct tsqp_slot slot;
    CHECK_EQ(tsqp_ring_try_read(pair->consumer, &slot), TSQP_OK);
    CHECK_EQ(slot.nbytes, nbytes);
    for (uint64_t i = 0; i < nbytes; i++)
        if (slot.data[i] != (value & 0xff))
            CHECK_EQ(slot.data[i], value & 0xff);
    return slot;
}

static void read_and_release(struct pair *pair, uint64_t value, uint64_t nbytes) {
    struct tsqp_slot slot = read_message(pair, value, nbytes);
    CHECK_EQ(tsqp_ring_release(pair->consumer, &slot), TSQP_OK);
}

static int try_write(struct pair *pair) {
    struct tsqp_slot slot;
    int rc = tsqp_ring_try_write(pair->producer, &slot);
    if (rc == TSQP_OK)
        CHECK_EQ(tsqp_ring_cancel(pair->producer, &slot), TSQP_OK);
    return rc;
}

static int try_read(struct pair *pair) {
    struct tsqp_slot slot;
    int rc = tsqp_ring_try_read(pair->consumer, &slot);
    if (rc == TSQP_OK)
        CHECK_EQ(tsqp_ring_release(pair->consumer, &slot), TSQP_OK);
    return rc;
}

/* ---- the plain protocol ---- */

static void wraps_around_at_every_slot_for_several_laps(void) {
    static const uint64_t counts[] = {1, 2, 3, 5, 10, 64, 1024};
    for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        uint64_t n = counts[c];
        for (uint64_t depth = 1; depth <= n; depth = depth < 10 ? depth + 1 : depth * 3 / 2 + 1) {
            struct pair pair = pair_open(64, n);
            uint64_t written = 0, read = 0;
            while (read < 5 * n) {
                for (; written < read + depth; written++)
                    write_message(&pair, written, written % 65);
                read_and_release(&pair, read, read % 65);
                read++;
            }
            pair_close(&pair);
        }
    }
}

static void empty_and_full_say_again(void) {
    struct pair pair = pair_open(100, 3);
    CHECK_EQ(try_read(&pair), TSQP_AGAIN);
    for (uint64_t i = 0; i < 3; i++)
        write_message(&pair, i, 100);
    CHECK_EQ(try_write(&pair), TSQP_AGAIN);
    read_and_release(&pair, 0, 100);
    CHECK_EQ(try_write(&pair), TSQP_OK);
    pair_close(&pair);
}

static void full_capacity_and_nothing_are_messages(void) {
    struct pair pair = pair_open(4097, 2);
    struct tsqp_slot slot;
    CHECK_EQ(tsqp_ring_try_write(pair.producer, &slot), TSQP_OK);
    CHECK_EQ(slot.nbytes, 4097);
    CHECK_EQ(tsqp_ring_cancel(pair.producer, &slot), TSQP_OK);
    write_message(&pair, 1, 4097);
    write_message(&pair, 2, 0);
    read_and_release(&pair, 1, 4097);
    read_and_release(&pair, 2, 0);
    pair_close(&pair);
}

static void cancelled_write_is_never_seen(void) {
    struct pair pair = pair_open(64, 2);
    struct tsqp_slot slot;
    for (int lap = 0; lap < 7; lap++) {
        CHECK_EQ(tsqp_ring_try_write(pair.producer, &slot), TSQP_OK);
        memset(slot.data, 0xff, 64);
        CHECK_EQ(tsqp_ring_cancel(pair.producer, &slot), TSQP_OK);
        CHECK_EQ(try_read(&pair), TSQP_AGAIN);
        write_message(&pair, (uint64_t)lap, 64);
        CHECK_EQ(tsqp_ring_free_slots(pair.producer), 1);
        read_and_release(&pair, (uint64_t)lap, 64);
    }
    pair_close(&pair);
}

static void slots_are_released_in_any_order(void) {
    struct pair pair = pair_open(64, 4);
    for (uint64_t lap = 0; lap < 6; lap++) {
        struct tsqp_slot slots[4];
        for (uint64_t i = 0; i < 4; i++)
            write_message(&pair, 4 * lap + i, 64);
        for (uint64_t i = 0; i < 4; i++)
            slots[i] = read_message(&pair, 4 * lap + i, 64);
        static const unsigned order[] = {2, 1, 3, 0};
        for (unsigned i = 0; i < 4; i++) {
            /* Entries are used in order: nothing is free before the oldest is. */
            CHECK_EQ(try_write(&pair), TSQP_AGAIN);
            CHECK_EQ(tsqp_ring_free_slots(pair.producer), 0);
            CHECK_EQ(tsqp_ring_release(pair.consumer, &slots[order[i]]), TSQP_OK);
        }
        CHECK_EQ(tsqp_ring_free_slots(pair.producer), 4);
    }
    pair_close(&pair);
}

static void slot_freed_last_is_used_next(void) {
    struct pair pair = pair_open(64, 10);
    struct tsqp_slot slot;
    uint8_t *first = NULL;
    for (uint64_t i = 0; i < 35; i++) {
        CHECK_EQ(tsqp_ring_try_write(pair.producer, &slot), TSQP_OK);
        first = first ? first : slot.data;
        CHECK(slot.data == first); /* ping-pong stays in one slot, in cache */
        CHECK_EQ(tsqp_ring_publish(pair.producer, &slot, 64), TSQP_OK);
        CHECK_EQ(try_read(&pair), TSQP_OK);
    }
    pair_close(&pair);
}

static void free_slots_counts_what_would_not_wait(void) {
    struct pair pair = pair_open(64, 3);
    struct tsqp_slot a, b;
    CHECK_EQ(tsqp_ring_free_slots(pair.producer), 3);
    write_message(&pair, 0, 1);
    CHECK_EQ(tsqp_ring_free_slots(pair.producer), 2);
    write_message(&pair, 1, 1);
    write_message(&pair, 2, 1);
    CHECK_EQ(tsqp_ring_free_slots(pair.producer), 0);
    a = read_message(&pair, 0, 1);
    b = read_message(&pair, 1, 1);
    CHECK_EQ(tsqp_ring_free_slots(pair.producer), 0);
    CHECK_EQ(tsqp_ring_release(pair.consumer, &b), TSQP_OK);
    CHECK_EQ(tsqp_ring_free_slots(pair.producer), 0);
    CHECK_EQ(tsqp_ring_release(pair.consumer, &a), TSQP_OK);
    CHECK_EQ(tsqp_ring_free_slots(pair.producer), 2);
    pair_close(&pair);
}

static void unread_slots_counts_what_was_published(void) {
    struct pair pair = pair_open(64, 3);
    struct tsqp_slot a, b;
    CHECK_EQ(tsqp_ring_unread_slots(pair.consumer), 0);
    for (int lap = 0; lap < 3; lap++) {
        write_message(&pair, 0, 1);
        write_message(&pair, 1, 1);
        CHECK_EQ(tsqp_ring_unread_slots(pair.consumer), 2);
        a = read_message(&pair, 0, 1);
        CHECK_EQ(tsqp_ring_unread_slots(pair.consumer), 1);
        b = read_message(&pair, 1, 1);
        write_message(&pair, 2, 1); /* beside two that are leased */
        CHECK_EQ(tsqp_ring_unread_slots(pair.consumer), 1);
        CHECK_EQ(tsqp_ring_release(pair.consumer, &b), TSQP_OK);
        CHECK_EQ(tsqp_ring_release(pair.consumer, &a), TSQP_OK);
        CHECK_EQ(tsqp_ring_unread_slots(pair.consumer), 1);
        a = read_message(&pair, 2, 1);
        CHECK_EQ(tsqp_ring_release(pair.consumer, &a), TSQP_OK);
        CHECK_EQ(tsqp_ring_unread_slots(pair.consumer), 0);
    }
    pair_close(&pair);
}

static void two_rings_of_a_segment_are_apart(void) {
    struct pair pair = pair_open(64, 2);
    struct tsqp_ring *back_producer, *back_consumer;
    struct tsqp_slot slot;
    CHECK_EQ(tsqp_ring_open(pair.attacher, 1, TSQP_PRODUCER, &back_producer), TSQP_OK);
    CHECK_EQ(tsqp_ring_open(pair.creator, 1, TSQP_CONSUMER, &back_consumer), TSQP_OK);
    write_message(&pair, 1, 64);
    CHECK_EQ(tsqp_ring_try_read(back_consumer, &slot), TSQP_AGAIN);
    CHECK_EQ(tsqp_ring_try_write(back_producer, &slot), TSQP_OK);
    memset(slot.data, 9, 64);
    CHECK_EQ(tsqp_ring_publish(back_producer, &slot, 64), TSQP_OK);
    read_and_release(&pair, 1, 64);
    CHECK_EQ(tsqp_ring_try_read(back_consumer, &slot), TSQP_OK);
    CHECK_EQ(slot.data[63], 9);
    tsqp_ring_close(back_producer);
    tsqp_ring_close(back_consumer);
    pair_close(&pair);
}

/* ---- a closed peer ---- */

static void consumer_reads_all_before_it_sees_the_close(void) {
    struct pair pair = pair_open(64, 3);
    write_message(&pair, 1, 8);
    write_message(&pair, 2, 8);
    tsqp_segment_close_end(pair.creator);
    tsqp_ring_wake_peer(pair.producer);
    read_and_release(&pair, 1, 8);
    read_and_release(&pair, 2, 8);
    CHECK_EQ(try_read(&pair), TSQP_PEER_CLOSED);
    CHECK_EQ(try_read(&pair), TSQP_PEER_CLOSED);
    pair_close(&pair);
}

static void producer_sees_the_close_at_once(void) {
    struct pair pair = pair_open(64, 2);
    write_message(&pair, 1, 8);
    tsqp_segment_close_end(pair.attacher);
    CHECK_EQ(try_write(&pair), TSQP_PEER_CLOSED);
    pair_close(&pair);
    pair = pair_open(64, 1);
    write_message(&pair, 1, 8);
    CHECK_EQ(try_write(&pair), TSQP_AGAIN);
    tsqp_segment_close_end(pair.attacher);
    CHECK_EQ(try_write(&pair), TSQP_PEER_CLOSED);
    pair_close(&pair);
}

/* ---- a hostile peer: each word it can reach ---- */

static void corrupted_words_stop_the_consumer(void) {
    static const uint64_t bad_seq[] = {2, 3, 4, UINT64_MAX, UINT64_C(1) << 32 | 1, UINT64_C(1) << 63};
    struct pair pair = pair_open(64, 2);
    struct tsqp_entry *entry = pair_entry(&pair, 0);
    write_message(&pair, 5, 64);
    uint64_t slot = tsqp_load_relaxed(&entry->slot);
    for (size_t i = 0; i < sizeof bad_seq / sizeof bad_seq[0]; i++) {
        tsqp_store_relaxed(&entry->seq, bad_seq[i]);
        CHECK_EQ(try_read(&pair), TSQP_CORRUPTED);
    }
    tsqp_store_relaxed(&entry->seq, 1);
    static const uint64_t bad_slot[] = {2, 1024, UINT32_MAX, UINT64_C(1) << 52, UINT64_MAX};
    for (size_t i = 0; i < sizeof bad_slot / sizeof bad_slot[0]; i++) {
        tsqp_store_relaxed(&entry->slot, bad_slot[i]);
        CHECK_EQ(try_read(&pair), TSQP_CORRUPTED);
    }
    tsqp_store_relaxed(&entry->slot, slot);
    static const uint64_t bad_nbytes[] = {65, 4096, UINT64_MAX, UINT64_C(1) << 63};
    for (size_t i = 0; i < sizeof bad_nbytes / sizeof bad_nbytes[0]; i++) {
        tsqp_store_relaxed(&entry->nbytes, bad_nbytes[i]);
        CHECK_EQ(try_read(&pair), TSQP_CORRUPTED);
    }
    tsqp_store_relaxed(&entry->nbytes, 64);
    read_and_release(&pair, 5, 64); /* nothing was consumed meanwhile */
    pair_close(&pair);
}

static void corrupted_words_stop_the_producer(void) {
    static const uint64_t bad_seq[] = {3, 4, 5, 6, UINT64_MAX, UINT64_C(1) << 33 | 2};
    struct pair pair = pair_open(64, 2);
    for (uint64_t i = 0; i < 2; i++)
        write_message(&pair, i, 64);
    struct tsqp_entry *entry = pair_entry(&pair, 0);
    for (size_t i = 0; i < sizeof bad_seq / sizeof bad_seq[0]; i++) {
        tsqp_store_relaxed(&entry->seq, bad_seq[i]);
        CHECK_EQ(try_write(&pair), TSQP_CORRUPTED);
    }
    tsqp_store_relaxed(&entry->seq, 1);
    CHECK_EQ(try_write(&pair), TSQP_AGAIN);
    read_and_release(&pair, 0, 64);
    CHECK_EQ(try_write(&pair), TSQP_OK);
    pair_close(&pair);
}

/* ---- against the contract ---- */

static void usage_errors_change_nothing(void) {
    struct pair pair = pair_open(64, 2);
    struct tsqp_slot slot = {0}, other;
    struct tsqp_ring *ring;
    CHECK_EQ(tsqp_ring_open(pair.creator, 2, TSQP_PRODUCER, &ring), TSQP_USAGE);
    CHECK_EQ(tsqp_ring_try_write(pair.consumer, &slot), TSQP_USAGE);
    CHECK_EQ(tsqp_ring_try_read(pair.producer, &slot), TSQP_USAGE);
    CHECK_EQ(tsqp_ring_publish(pair.producer, &slot, 0), TSQP_USAGE); /* nothing acquired */
    CHECK_EQ(tsqp_ring_cancel(pair.producer, &slot), TSQP_USAGE);
    CHECK_EQ(tsqp_ring_release(pair.consumer, &slot), TSQP_USAGE);
    CHECK_EQ(tsqp_ring_try_write(pair.producer, &slot), TSQP_OK);
    CHECK_EQ(tsqp_ring_try_write(pair.producer, &other), TSQP_USAGE); /* one open write at a time */
    CHECK_EQ(tsqp_ring_publish(pair.producer, &slot, 65), TSQP_USAGE);
    other = slot;
    other.ticket++;
    CHECK_EQ(tsqp_ring_publish(pair.producer, &other, 8), TSQP_USAGE);
    CHECK_EQ(tsqp_ring_cancel(pair.producer, &other), TSQP_USAGE);
    memset(slot.data, 3, 8);
    CHECK_EQ(tsqp_ring_publish(pair.producer, &slot, 8), TSQP_OK);
    CHECK_EQ(tsqp_ring_publish(pair.producer, &slot, 8), TSQP_USAGE); /* twice */
    CHECK_EQ(tsqp_ring_release(pair.producer, &slot), TSQP_USAGE);
    read_and_release(&pair, 3, 8);
    pair_close(&pair);
}

static void release_takes_each_lease_once(void) {
    struct pair pair = pair_open(64, 2);
    write_message(&pair, 0, 8);
    struct tsqp_slot first = read_message(&pair, 0, 8), future = first;
    future.ticket = 1;
    CHECK_EQ(tsqp_ring_release(pair.consumer, &future), TSQP_USAGE);
    CHECK_EQ(tsqp_ring_release(pair.consumer, &first), TSQP_OK);
    CHECK_EQ(tsqp_ring_release(pair.consumer, &first), TSQP_USAGE);
    write_message(&pair, 1, 8);
    write_message(&pair, 2, 8);
    read_and_release(&pair, 1, 8);
    struct tsqp_slot third = read_message(&pair, 2, 8); /* in the first one's entry, a lap later */
    CHECK_EQ(tsqp_ring_release(pair.consumer, &first), TSQP_USAGE);
    CHECK_EQ(tsqp_ring_release(pair.consumer, &third), TSQP_OK);
    CHECK_EQ(try_write(&pair), TSQP_OK);
    pair_close(&pair);
}

static void all_slots_leased_is_usage_not_a_wait(void) {
    struct pair pair = pair_open(64, 2);
    struct tsqp_slot slots[2], third;
    for (uint64_t i = 0; i < 2; i++)
        write_message(&pair, i, 8);
    for (uint64_t i = 0; i < 2; i++)
        slots[i] = read_message(&pair, i, 8);
    CHECK_EQ(tsqp_ring_try_read(pair.consumer, &third), TSQP_USAGE);
    struct tsqp_watch watch = tsqp_ring_watch(pair.consumer); /* a wait beside other rings sleeps */
    CHECK_EQ(tsqp_load_relaxed(watch.word), watch.idle);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(tsqp_ring_release(pair.consumer, &slots[i]), TSQP_OK);
    CHECK_EQ(try_read(&pair), TSQP_AGAIN);
    pair_close(&pair);
}

/* Every test before this one released what it created. */
static void no_file_is_left(void) {
    CHECK_EQ(scratch_files(), 0);
}

int main(void) {
    scratch_make();
    RUN(wraps_around_at_every_slot_for_several_laps);
    RUN(empty_and_full_say_again);
    RUN(full_capacity_and_nothing_are_messages);
    RUN(cancelled_write_is_never_seen);
    RUN(slots_are_released_in_any_order);
    RUN(slot_freed_last_is_used_next);
    RUN(free_slots_counts_what_would_not_wait);
    RUN(unread_slots_counts_what_was_published);
    RUN(two_rings_of_a_segment_are_apart);
    RUN(consumer_reads_all_before_it_sees_the_close);
    RUN(producer_sees_the_close_at_once);
    RUN(corrupted_words_stop_the_consumer);
    RUN(corrupted_words_stop_the_producer);
    RUN(usage_errors_change_nothing);
    RUN(release_takes_each_lease_once);
    RUN(all_slots_leased_is_usage_not_a_wait);
    RUN(no_file_is_left);
    scratch_remove();
    return check_result();
}
