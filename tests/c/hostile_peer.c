/* hostile_peer.c: the other end of a channel's segment, gone bad. It keeps the victim at work with messages
 * that are mostly right, takes its answers, and rewrites flags, header words, slot numbers, lengths, message
 * headers and payload all the time. tests/hostile_peers.py builds it as a library and runs it in a process of
 * its own. */
#include "access.h"
#include "check.h"
#include "segment.h"
#include "tsqp.h"

#include <string.h>

#define MAX_UNDO 32
#define MAX_AT_ONCE 300 /* mutations before the victim has to do something again */
#define ENTRY_FILLED_WORD 5
#define TAG_AND_FLAGS_WORD 1
#define VIA_ZMQ (UINT32_C(1) << 24)
#define TILED (UINT32_C(1) << 25)

struct hostile_counts {
    uint64_t mutations, flags, header_words, message_words,
        payload_words; /* mutations: the sum of the others */
    uint64_t published, taken, woken;
};

struct undo {
    uint64_t *word;
    uint64_t before, after, due;
};

struct hostile {
    uint8_t *base;
    struct tsqp_geometry geometry;
    unsigned end;              /* which end this is: 0 the server, 1 the client */
    uint64_t next_tx, next_rx; /* where an honest end would be */
    uint64_t random, step;
    struct undo undo[MAX_UNDO];
    struct hostile_counts *counts;
};

static uint64_t below(struct hostile *hostile, uint64_t limit) {
    return check_random(&hostile->random) % limit;
}

/* ---- the segment ---- */

static uint64_t *entry_words(struct hostile *hostile, unsigned ring, uint64_t k) {
    uint64_t at =
        tsqp_entries_offset(&hostile->geometry, ring) + k % hostile->geometry.max_chunks * TSQP_LINE;
    return (uint64_t *)(hostile->base + at);
}

static struct tsqp_entry *entry_of(struct hostile *hostile, unsigned ring, uint64_t k) {
    return (struct tsqp_entry *)entry_words(hostile, ring, k);
}

static uint8_t *slot_of(struct hostile *hostile, unsigned ring, uint64_t slot) {
    return hostile->base + tsqp_slots_offset(&hostile->geometry, ring) +
           slot * tsqp_slot_stride(&hostile->geometry);
}

static unsigned tx_ring(const struct hostile *hostile) {
    return 1 - hostile->end;
}

static uint64_t lap_even(const struct hostile *hostile, uint64_t k) {
    return 2 * (k / hostile->geometry.max_chunks);
}

/* ---- what an honest peer would do ---- */

static bool is_changed(const struct hostile *hostile, const uint64_t *word) {
    for (int i = 0; i < MAX_UNDO; i++)
        if (hostile->undo[i].word == word)
            return true;
    return false;
}

static uint64_t plan_message(struct hostile *hostile, struct tsqp_message *message) {
    do {
        memset(&message->header, 0, sizeof message->header);
        message->header.tensor_count = (uint32_t)below(hostile, 4);
        message->header.meta_bytes = below(hostile, 4) == 0 ? (uint32_t)below(hostile, 40) : 0;
        message->header.request_id = hostile->next_tx;
        for (uint32_t i = 0; i < message->header.tensor_count; i++) {
            message->tensors[i].dtype = (uint8_t)(1 + below(hostile, TSQP_DTYPE_END - 1));
            message->tensors[i].ndim = (uint8_t)below(hostile, 4);
            for (unsigned d = 0; d < message->tensors[i].ndim; d++)
                message->tensors[i].shape[d] = (int64_t)below(hostile, 9);
        }
    } while (tsqp_message_plan(message) != TSQP_OK ||
             message->header.total_bytes > hostile->geometry.max_chunk_bytes);
    return message->header.total_bytes;
}

/* The head of a message that is said to follow in tiles or over ZeroMQ, and to be huge. */
static uint64_t plan_elsewhere(struct hostile *hostile, struct tsqp_message *message) {
    memset(&message->header, 0, sizeof message->header);
    message->header.tensor_count = 1;
    message->tensors[0].dtype = TSQP_FLOAT32;
    message->tensors[0].ndim = 1;
    message->tensors[0].shape[0] = (int64_t)1 << below(hostile, 40);
    message->header.flags = below(hostile, 8) ? TILED : VIA_ZMQ;
    tsqp_message_plan(message);
    return tsqp_message_head_bytes(&message->header);
}

static void publish(struct hostile *hostile) {
    static struct tsqp_message message;
    static const uint8_t META[] = "\x82\xa1x\x01\xa1y\xa3"
                                  "abcdefghijklmnopqrstuvwxyz0123456789";
    uint8_t head[4096] = {0};
    struct tsqp_entry *entry = entry_of(hostile, tx_ring(hostile), hostile->next_tx);
    uint64_t even = lap_even(hostile, hostile->next_tx), seq = tsqp_load_acquire(&entry->seq);
    if (is_changed(hostile, &entry->seq))
        return;
    if (seq == even + 2) { /* the victim took a message that was only claimed */
        hostile->next_tx++;
        return;
    }
    if (seq != even)
        return;
    bool elsewhere = below(hostile, 1000) == 0;
    uint64_t nbytes = elsewhere ? plan_elsewhere(hostile, &message) : plan_message(hostile, &message);
    uint64_t slot = below(hostile, hostile->geometry.max_chunks);
    tsqp_message_write_head(&message, META, head);
    tsqp_copy_to_shared(slot_of(hostile, tx_ring(hostile), slot), head,
                        tsqp_message_head_bytes(&message.header));
    tsqp_store_relaxed(&entry->slot, slot);
    tsqp_store_relaxed(&entry->nbytes, nbytes);
    tsqp_store_relaxed((uint64_t *)entry + ENTRY_FILLED_WORD, nbytes);
    tsqp_publish(&entry->seq, even + 1);
    hostile->counts->woken += tsqp_load_seq_cst(&entry->consumer_waiting) != 0;
    tsqp_wake(&entry->seq, &entry->consumer_waiting, true);
    hostile->next_tx++;
    hostile->counts->published++;
}

static void take_answer(struct hostile *hostile) {
    struct tsqp_entry *entry = entry_of(hostile, 1 - tx_ring(hostile), hostile->next_rx);
    if (tsqp_load_acquire(&entry->seq) != lap_even(hostile, hostile->next_rx) + 1 ||
        is_changed(hostile, &entry->seq))
        return;
    tsqp_publish(&entry->seq, lap_even(hostile, hostile->next_rx) + 2);
    tsqp_wake(&entry->seq, &entry->producer_waiting, true);
    hostile->next_rx++;
    hostile->counts->taken++;
}

/* ---- what a hostile one does ---- */

static uint64_t a_value(struct hostile *hostile, uint64_t before) {
    static const uint64_t WORDS[] = {0,         1,         2, 3, 7, 63, 64, 4095, 4096, UINT64_C(1) << 31,
                                     INT64_MAX, UINT64_MAX};
    switch (below(hostile, 4)) {
    case 0:
        return before ^ UINT64_C(1) << below(hostile, 64);
    case 1:
        return before + below(hostile, 5) - 2;
    case 2:
        return WORDS[below(hostile, sizeof WORDS / sizeof WORDS[0])];
    default:
        return check_random(&hostile->random);
    }
}

/* Some changes stay; most that would end the connection are taken back after some steps. */
static void change(struct hostile *hostile, uint64_t *word, uint64_t value, bool take_back) {
    struct undo *undo = &hostile->undo[below(hostile, MAX_UNDO)];
    if ((take_back && undo->word) || is_changed(hostile, word))
        return;
    if (take_back)
        *undo = (struct undo){word, tsqp_load_relaxed(word), value, hostile->step + 1 + below(hostile, 30)};
    tsqp_store_relaxed(word, value);
    hostile->counts->mutations++;
}

static void take_back_changes(struct hostile *hostile, bool all) {
    for (int i = 0; i < MAX_UNDO; i++) {
        struct undo *undo = &hostile->undo[i];
        if (undo->word && (all || undo->due <= hostile->step)) {
            /* Unless it went on meanwhile. */
            if (tsqp_load_relaxed(undo->word) == undo->after)
                tsqp_store_relaxed(undo->word, undo->before);
            undo->word = NULL;
        }
    }
}

static void change_flags(struct hostile *hostile) {
    unsigned ring = (unsigned)below(hostile, 2);
    uint64_t *words = entry_words(hostile, ring, check_random(&hostile->random));
    uint64_t *word = words + below(hostile, ENTRY_FILLED_WORD + 1);
    change(hostile, word, a_value(hostile, tsqp_load_relaxed(word)), below(hostile, 3000) != 0);
    hostile->counts->flags++;
}

static void change_header(struct hostile *hostile) {
    struct tsqp_segment_header *header = (struct tsqp_segment_header *)hostile->base;
    uint64_t *word = (uint64_t *)header + below(hostile, 32);
    bool says_closed = word == &header->ends[0].closed || word == &header->ends[1].closed;
    if (says_closed && below(hostile, 100) != 0)
        word--; /* the heartbeat: a close ends the connection, which takes long to come back */
    change(hostile, word, a_value(hostile, tsqp_load_relaxed(word)), true);
    hostile->counts->header_words++;
}

static void change_slot(struct hostile *hostile, uint64_t first, uint64_t nbytes, uint64_t *count) {
    unsigned ring = below(hostile, 4) ? tx_ring(hostile) : 1 - tx_ring(hostile);
    uint8_t *slot = slot_of(hostile, ring, below(hostile, hostile->geometry.max_chunks));
    uint64_t *word = (uint64_t *)(slot + first + below(hostile, nbytes / 8) * 8);
    if (word == (uint64_t *)slot + TAG_AND_FLAGS_WORD && below(hostile, 50) != 0)
        word--; /* such flags say: wait for what comes another way; nothing does, and the connection is over
                 */
    change(hostile, word, a_value(hostile, tsqp_load_relaxed(word)), false);
    ++*count;
}

static void mutate(struct hostile *hostile) {
    struct hostile_counts *counts = hostile->counts;
    uint64_t before = counts->mutations, kind = below(hostile, 100);
    while (counts->mutations == before) {
        if (kind < 50)
            change_slot(hostile, 256, hostile->geometry.max_chunk_bytes - 256, &counts->payload_words);
        else if (kind < 85)
            change_slot(hostile, 0, 512, &counts->message_words);
        else if (kind < 97)
            change_flags(hostile);
        else
            change_header(hostile);
        kind = 0; /* no room to take a change back: one that stays */
    }
}

/* It said goodbye, and that is not what this end wrote there. */
static bool victim_left(const struct hostile *hostile) {
    struct tsqp_segment_header *header = (struct tsqp_segment_header *)hostile->base;
    uint64_t *closed = &header->ends[1 - hostile->end].closed;
    return !is_changed(hostile, closed) && tsqp_load_relaxed(closed) == 1;
}

static uint64_t progress(const struct hostile *hostile) {
    return hostile->next_tx + hostile->next_rx;
}

/* Goes on until `mutations` were made in all, or the victim left or did nothing for `patience_ns`, or
 * `limit_ns` passed; adds to `counts`. `pause_ns` lies between two mutations. */
int hostile_run(uint8_t *base, uint64_t max_chunk_bytes, uint64_t max_chunks, unsigned end, uint64_t seed,
                uint64_t mutations, uint64_t pause_ns, uint64_t patience_ns, uint64_t limit_ns,
                struct hostile_counts *counts) {
    struct hostile hostile = {.base = base,
                              .geometry = {max_chunk_bytes, max_chunks, 2},
                              .end = end,
                              .random = seed,
                              .counts = counts};
    uint64_t start = tsqp_now_ns(), moved = start, before = 0, at_once = 0;
    while (counts->mutations < mutations) {
        uint64_t now = tsqp_now_ns();
        if (progress(&hostile) != before) {
            before = progress(&hostile);
            moved = now;
            at_once = 0;
        }
        if (victim_left(&hostile) || now - moved > patience_ns || now - start > limit_ns)
            break;
        publish(&hostile);
        take_answer(&hostile);
        for (uint64_t burst = below(&hostile, 12); burst > 0 && at_once < MAX_AT_ONCE; burst--, at_once++)
            mutate(&hostile);
        take_back_changes(&hostile, false);
        hostile.step++;
        while (tsqp_now_ns() - now < pause_ns)
            ;
    }
    take_back_changes(&hostile, true);
    return 0;
}
