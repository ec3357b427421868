/* The ring under random steps: against a model of it, and against a peer that writes anything anywhere. */
#include "access.h"
#include "scratch.h"

#define MODEL_CHUNKS 5

struct model {
    uint64_t written, read;
    struct tsqp_slot leases[MODEL_CHUNKS];
    unsigned lease_count;
    bool leased[MODEL_CHUNKS]; /* by entry */
    uint64_t unread_or_leased; /* entries the producer can't have */
};

static bool model_can_write(const struct model *m) {
    uint64_t entry = m->written % MODEL_CHUNKS;
    return m->written - m->read < MODEL_CHUNKS && !m->leased[entry];
}

static void step_write(struct pair *pair, struct model *m, bool cancel) {
    struct tsqp_slot slot;
    bool can = model_can_write(m);
    CHECK_EQ(tsqp_ring_try_write(pair->producer, &slot), can ? TSQP_OK : TSQP_AGAIN);
    if (!can)
        return;
    memset(slot.data, (int)(m->written & 0xff), 64);
    if (cancel) {
        CHECK_EQ(tsqp_ring_cancel(pair->producer, &slot), TSQP_OK);
        return;
    }
    CHECK_EQ(tsqp_ring_publish(pair->producer, &slot, m->written % 65), TSQP_OK);
    m->written++;
}

static void step_read(struct pair *pair, struct model *m) {
    struct tsqp_slot slot;
    int want = m->leased[m->read % MODEL_CHUNKS] ? TSQP_USAGE : m->read < m->written ? TSQP_OK : TSQP_AGAIN;
    CHECK_EQ(tsqp_ring_try_read(pair->consumer, &slot), want);
    if (want != TSQP_OK)
        return;
    CHECK_EQ(slot.ticket, m->read);
    CHECK_EQ(slot.nbytes, m->read % 65);
    m->leased[m->read % MODEL_CHUNKS] = true;
    m->leases[m->lease_count++] = slot;
    m->read++;
}

static void step_release(struct pair *pair, struct model *m, uint64_t choice) {
    if (m->lease_count == 0)
        return;
    unsigned at = (unsigned)(choice % m->lease_count);
    struct tsqp_slot slot = m->leases[at];
    for (uint64_t i = 0; i < 64; i++) /* untouched since it was published */
        CHECK_EQ(slot.data[i], slot.ticket & 0xff);
    CHECK_EQ(tsqp_ring_release(pair->consumer, &slot), TSQP_OK);
    m->leased[slot.ticket % MODEL_CHUNKS] = false;
    m->leases[at] = m->leases[--m->lease_count];
}

static void random_steps_match_the_model(void) {
    struct pair pair = pair_open(64, MODEL_CHUNKS);
    struct model m = {0};
    uint64_t state = 5;
    for (int i = 0; i < 200000; i++) {
        uint64_t choice = check_random(&state);
        switch (choice % 8) {
        case 0:
            step_write(&pair, &m, true);
            break;
        case 1:
        case 2:
        case 3:
            step_write(&pair, &m, false);
            break;
        case 4:
        case 5:
            step_read(&pair, &m);
            break;
        default:
            step_release(&pair, &m, choice >> 8);
        }
    }
    CHECK(m.read > 10000);
    pair_close(&pair);
}

/* Whatever the peer writes into every word of the ring, each end stays within its own slots. */
static void random_words_never_lead_outside_the_slots(void) {
    uint64_t state = 4, survived = 0;
    for (int round = 0; round < 400; round++) {
        struct pair pair = pair_open(64, 3);
        uint8_t *low[2] = {pair.creator->base, pair.attacher->base};
        for (int step = 0; step < 60; step++) {
            struct tsqp_slot slot;
            uint64_t *word = &pair_entry(&pair, check_random(&state) % 3)->seq + check_random(&state) % 5;
            if (check_random(&state) % 4 == 0)
                tsqp_store_relaxed(word, check_random(&state) % 9 - 1);
            if (tsqp_ring_try_write(pair.producer, &slot) == TSQP_OK) {
                CHECK(slot.data >= low[0] && slot.data + 64 <= low[0] + pair.creator->length);
                memset(slot.data, 1, slot.nbytes);
                CHECK_EQ(tsqp_ring_publish(pair.producer, &slot, 64), TSQP_OK);
                survived++;
            }
            if (tsqp_ring_try_read(pair.consumer, &slot) == TSQP_OK) {
                CHECK(slot.nbytes <= 64);
                CHECK(slot.data >= low[1] && slot.data + slot.nbytes <= low[1] + pair.attacher->length);
                CHECK_EQ(tsqp_ring_release(pair.consumer, &slot), TSQP_OK);
            }
        }
        pair_close(&pair);
    }
    CHECK(survived > 1000);
}

/* Every test before this one released what it created. */
static void no_file_is_left(void) {
    CHECK_EQ(scratch_files(), 0);
}

int main(void) {
    scratch_make();
    RUN(random_steps_match_the_model);
    RUN(random_words_never_lead_outside_the_slots);
    RUN(no_file_is_left);
    scratch_remove();
    return check_result();
}
