/* ring.c: a single-producer, single-consumer ring of slots.
 *
 * The k-th message uses entry k % n. Its sequence word is the whole hand-over: even (2 * lap) when the
 * producer may write, odd (2 * lap + 1) when the consumer may read. Which slot holds the payload is the
 * producer's choice and private knowledge; the consumer checks the number it is told. Index and geometry are
 * private.
 */
#include "access.h"
#include "tsqp.h"
#include "segment.h"

#include <stdlib.h>
#include <string.h>

#define NO_SLOT UINT32_MAX
/* Which free slot to take: for a message this long or longer, slots in turn until this many bytes are in use.
 * What the other core still has in its own cache is slow to get (to read, and to own for writing), what it
 * pushed out to the cache both share is fast: between two Zen 5 cores 100 KB there and back took 7.3 us in
 * one slot, 5.2 us in ten; 1 MB 50 us in one, 42 us in three, 73 us in ten. Shorter ones stay in the slot
 * freed last. */
#define ROTATE_FROM_BYTES (UINT64_C(16) << 10)
#define ROTATE_BYTES (UINT64_C(5) << 19)
#define MAX_ROTATE 64u
/* A sender of messages this long does not run further ahead than the slots in turn while the reader keeps up:
 * it gives it a moment, about what the copy takes. Streams of 1 MB went from 34 to 41 GB/s. */
#define PACE_FROM_BYTES (UINT64_C(256) << 10)
#define PACE_BYTES_PER_NS 16
/* How long follow looks before it leaves the wait to tsqp_wait. */
#define FOLLOW_SPINS 2000

struct tsqp_ring {
    struct tsqp_segment *segment;
    struct tsqp_entry *entries;
    uint8_t *slots;
    uint64_t count; /* entries, and slots */
    uint64_t stride;
    uint64_t chunk_bytes;
    uint64_t next; /* producer: next to publish; consumer: next to acquire */
    /* Its entry and lap: a server looks at all its rings for every message, and a division takes longer. */
    uint64_t place, even;
    enum tsqp_role role;
    struct tsqp_waiter waiter;
    /* producer */
    bool writing;
    uint64_t filling; /* bytes of the message published in part; 0: none */
    uint64_t last_nbytes;
    bool paced_in_vain;
    uint64_t unreclaimed; /* the slots of all entries before this one are free again */
    uint32_t write_slot;
    uint32_t free_count;
    uint32_t *free_slots; /* a stack: the slot freed last is on top */
    uint32_t *entry_slot; /* entry -> slot of its unreclaimed message, or NO_SLOT */
    /* consumer */
    uint8_t *leased; /* entry -> acquired and not yet released */
};

static uint64_t lap_even(const struct tsqp_ring *ring, uint64_t k) {
    return 2 * (k / ring->count);
}

static void move_to(struct tsqp_ring *ring, uint64_t k) {
    ring->next = k;
    ring->place = k % ring->count;
    ring->even = lap_even(ring, k);
}

static struct tsqp_entry *entry_at(const struct tsqp_ring *ring, uint64_t k) {
    return &ring->entries[k % ring->count];
}

struct tsqp_waiter *tsqp_ring_waiter(struct tsqp_ring *ring) {
    return &ring->waiter;
}

int tsqp_ring_open(struct tsqp_segment *segment, unsigned index, enum tsqp_role role,
                   struct tsqp_ring **out) {
    if (index >= segment->geometry.ring_count)
        return TSQP_USAGE;
    struct tsqp_ring *ring = calloc(1, sizeof *ring);
    if (!ring)
        return TSQP_NO_MEMORY;
    uint64_t n = segment->geometry.max_chunks;
    ring->free_slots = calloc(n, sizeof *ring->free_slots);
    ring->entry_slot = calloc(n, sizeof *ring->entry_slot);
    ring->leased = calloc(n, 1);
    if (!ring->free_slots || !ring->entry_slot || !ring->leased) {
        tsqp_ring_close(ring);
        return TSQP_NO_MEMORY;
    }
    for (uint64_t i = 0; i < n; i++) {
        ring->free_slots[i] = (uint32_t)(n - 1 - i);
        ring->entry_slot[i] = NO_SLOT;
    }
    ring->free_count = (uint32_t)n;
    ring->count = n;
    ring->chunk_bytes = segment->geometry.max_chunk_bytes;
    ring->stride = tsqp_slot_stride(&segment->geometry);
    ring->entries = (struct tsqp_entry *)(segment->base + tsqp_entries_offset(&segment->geometry, index));
    ring->slots = segment->base + tsqp_slots_offset(&segment->geometry, index);
    ring->role = role;
    tsqp_waiter_init(&ring->waiter, TSQP_WAIT_AUTO, 400000, true);
    tsqp_segment_retain(segment);
    ring->segment = segment;
    *out = ring;
    return TSQP_OK;
}

void tsqp_ring_close(struct tsqp_ring *ring) {
    if (!ring)
        return;
    if (ring->segment)
        tsqp_segment_release(ring->segment);
    free(ring->free_slots);
    free(ring->entry_slot);
    free(ring->leased);
    free(ring);
}

static uint64_t *peer_closed_word(const struct tsqp_ring *ring) {
    return &tsqp_header(ring->segment)->ends[1 - ring->segment->end].closed;
}

struct tsqp_watch tsqp_ring_watch(struct tsqp_ring *ring) {
    struct tsqp_entry *entry = &ring->entries[ring->place];
    uint64_t even = ring->even;
    uint64_t *closed = peer_closed_word(ring);
    if (ring->role == TSQP_CONSUMER) {
        bool leased = ring->leased[ring->place] != 0;
        if (!leased && tsqp_load_acquire(&entry->seq) == even + 1) {
            uint64_t filled = tsqp_load_acquire(&entry->filled);
            if (filled < tsqp_load_relaxed(&entry->nbytes))
                return (struct tsqp_watch){&entry->filled, filled, &entry->consumer_waiting, closed};
        }
        /* While the message one lap ago is leased there is none to read, whatever the producer does. */
        return (struct tsqp_watch){&entry->seq, leased ? even - 1 : even, &entry->consumer_waiting, closed};
    }
    /* Not writable yet means: the message one lap ago is still unread. In lap 0 every entry is writable, and
     * the idle value below is one the word never has. */
    return (struct tsqp_watch){&entry->seq, even - 1, &entry->producer_waiting, closed};
}

/* ---- producer ---- */

/* Takes back the slot of entry `k`, whose sequence word was just read as `seq`, if its message was released.
 * The word is read once: what the peer makes of it later can't turn this decision back. */
static bool reclaim(struct tsqp_ring *ring, uint64_t k, uint64_t seq) {
    uint64_t i = k % ring->count;
    if (ring->entry_slot[i] == NO_SLOT || seq != lap_even(ring, k) + 2)
        return false;
    ring->free_slots[ring->free_count++] = ring->entry_slot[i];
    ring->entry_slot[i] = NO_SLOT;
    return true;
}

/* SYNC: acquire pairs with the consumer's tsqp_publish in tsqp_ring_release: its reads of the slot are over.
 */
static bool try_reclaim(struct tsqp_ring *ring, uint64_t k) {
    return reclaim(ring, k, tsqp_load_acquire(&entry_at(ring, k)->seq));
}

static uint32_t slots_in_turn(const struct tsqp_ring *ring) {
    if (ring->last_nbytes < ROTATE_FROM_BYTES)
        return 1;
    uint64_t in_turn = (ROTATE_BYTES + ring->last_nbytes / 2) / ring->last_nbytes;
    return in_turn > MAX_ROTATE ? MAX_ROTATE : in_turn > 1 ? (uint32_t)in_turn : 1;
}

static uint32_t pop_slot(struct tsqp_ring *ring) {
    uint32_t depth = slots_in_turn(ring);
    uint32_t at = ring->free_count - (depth < ring->free_count ? depth : ring->free_count);
    uint32_t slot = ring->free_slots[at];
    ring->free_count--;
    memmove(&ring->free_slots[at], &ring->free_slots[at + 1], (ring->free_count - at) * sizeof slot);
    return slot;
}

/* Released slots go back on the stack at once, so that the same few are used while the reader keeps up. */
static uint32_t take_slot(struct tsqp_ring *ring) {
    uint64_t oldest = ring->next < ring->count ? 0 : ring->next - ring->count + 1;
    if (ring->unreclaimed < oldest)
        ring->unreclaimed = oldest;
    while (ring->unreclaimed < ring->next && (ring->entry_slot[ring->unreclaimed % ring->count] == NO_SLOT ||
                                              try_reclaim(ring, ring->unreclaimed)))
        ring->unreclaimed++;
    for (uint64_t k = ring->unreclaimed; ring->free_count == 0 && k < ring->next; k++)
        try_reclaim(ring, k); /* leases may be released in any order */
    return ring->free_count ? pop_slot(ring) : NO_SLOT;
}

/* Never more than a moment, and not again before a release was seen: the reader need not read at all now. */
static void pace(struct tsqp_ring *ring) {
    uint64_t ahead = slots_in_turn(ring);
    if (ring->last_nbytes < PACE_FROM_BYTES || ring->next < ahead)
        return;
    uint64_t k = ring->next - ahead, unread = lap_even(ring, k) + 1;
    uint64_t *seq = &entry_at(ring, k)->seq;
    uint64_t until = 0;
    /* Relaxed: only a hint of when to go on; what is reclaimed is looked at anew. */
    while (tsqp_load_relaxed(seq) == unread) {
        uint64_t now = tsqp_now_ns();
        if (until == 0)
            until = now + ring->last_nbytes / PACE_BYTES_PER_NS;
        if (ring->paced_in_vain || now >= until) {
            ring->paced_in_vain = true;
            return;
        }
        tsqp_cpu_relax();
    }
    ring->paced_in_vain = false;
}

int tsqp_ring_try_write(struct tsqp_ring *ring, struct tsqp_slot *out) {
    if (ring->role != TSQP_PRODUCER || ring->writing || ring->filling)
        return TSQP_USAGE;
    uint64_t even = ring->even;
    uint64_t seq = tsqp_load_acquire(&ring->entries[ring->place].seq);
    if (seq != even) {
        if (seq + 1 != even)
            return TSQP_CORRUPTED;
        return tsqp_segment_peer_closed(ring->segment) ? TSQP_PEER_CLOSED : TSQP_AGAIN;
    }
    if (tsqp_segment_peer_closed(ring->segment))
        return TSQP_PEER_CLOSED; /* nobody will read it */
    pace(ring);
    if (ring->next >= ring->count)
        reclaim(ring, ring->next - ring->count, seq);
    uint32_t slot = take_slot(ring);
    if (slot == NO_SLOT)
        return TSQP_CORRUPTED; /* the entry came back, another one's flag was turned back */
    ring->writing = true;
    ring->write_slot = slot;
    out->data = ring->slots + slot * ring->stride;
    out->nbytes = ring->chunk_bytes;
    out->filled = 0;
    out->ticket = ring->next;
    return TSQP_OK;
}

int tsqp_ring_publish_part(struct tsqp_ring *ring, const struct tsqp_slot *slot, uint64_t nbytes,
                           uint64_t filled) {
    if (!ring->writing || slot->ticket != ring->next || nbytes > ring->chunk_bytes || filled > nbytes)
        return TSQP_USAGE;
    struct tsqp_entry *entry = &ring->entries[ring->place];
    tsqp_store_relaxed(&entry->slot, ring->write_slot);
    tsqp_store_relaxed(&entry->nbytes, nbytes);
    tsqp_store_relaxed(&entry->filled, filled);
    ring->entry_slot[ring->place] = ring->write_slot;
    ring->last_nbytes = nbytes;
    ring->writing = false;
    ring->filling = filled < nbytes ? nbytes : 0;
    /* SYNC: pairs with the consumer's acquire of seq in tsqp_ring_try_read; slot, nbytes, filled and the
     * bytes it counts are before it. */
    tsqp_publish(&entry->seq, ring->even + 1);
    tsqp_wake(&entry->seq, &entry->consumer_waiting, ring->waiter.futex);
    move_to(ring, ring->next + 1);
    return TSQP_OK;
}

int tsqp_ring_publish(struct tsqp_ring *ring, const struct tsqp_slot *slot, uint64_t nbytes) {
    return tsqp_ring_publish_part(ring, slot, nbytes, nbytes);
}

int tsqp_ring_fill(struct tsqp_ring *ring, uint64_t filled) {
    if (!ring->filling || filled > ring->filling)
        return TSQP_USAGE;
    struct tsqp_entry *entry = entry_at(ring, ring->next - 1);
    if (filled < ring->filling) {
        /* SYNC: pairs with the acquire of filled in tsqp_ring_follow; the bytes it counts are before it.
         * Nobody is woken: who sleeps by now sleeps until all is there. */
        tsqp_store_release(&entry->filled, filled);
        return TSQP_OK;
    }
    ring->filling = 0;
    /* SYNC: as above, and the sleep handshake of access.h. */
    tsqp_publish(&entry->filled, filled);
    tsqp_wake(&entry->filled, &entry->consumer_waiting, ring->waiter.futex);
    return TSQP_OK;
}

int tsqp_ring_cancel(struct tsqp_ring *ring, const struct tsqp_slot *slot) {
    if (!ring->writing || slot->ticket != ring->next)
        return TSQP_USAGE;
    ring->free_slots[ring->free_count++] = ring->write_slot;
    ring->writing = false;
    return TSQP_OK;
}

bool tsqp_ring_ready(struct tsqp_ring *ring) {
    struct tsqp_watch watch = tsqp_ring_watch(ring);
    if (tsqp_load_acquire(watch.word) == watch.idle)
        return false;
    /* A word that changed since it was looked at may still mean a message in part. */
    watch = tsqp_ring_watch(ring);
    return watch.word == &ring->entries[ring->place].seq;
}

/* How many entries from the next one on have the word they have `lead` steps into their lap. */
static uint64_t count_from_next(const struct tsqp_ring *ring, uint64_t lead) {
    uint64_t n = 0;
    while (n < ring->count &&
           tsqp_load_acquire(&entry_at(ring, ring->next + n)->seq) == lap_even(ring, ring->next + n) + lead)
        n++;
    return n;
}

uint64_t tsqp_ring_free_slots(struct tsqp_ring *ring) {
    return count_from_next(ring, 0);
}

uint64_t tsqp_ring_unread_slots(struct tsqp_ring *ring) {
    return count_from_next(ring, 1);
}

/* ---- consumer ---- */

int tsqp_ring_try_read(struct tsqp_ring *ring, struct tsqp_slot *out) {
    if (ring->role != TSQP_CONSUMER)
        return TSQP_USAGE;
    uint64_t i = ring->place;
    if (ring->leased[i])
        return TSQP_USAGE; /* every slot is leased; waiting would be for ever */
    struct tsqp_entry *entry = &ring->entries[i];
    uint64_t even = ring->even;
    uint64_t seq = tsqp_load_acquire(&entry->seq);
    if (seq == even) {
        if (!tsqp_segment_peer_closed(ring->segment))
            return TSQP_AGAIN;
        /* It may have published and closed between the two looks. */
        seq = tsqp_load_acquire(&entry->seq);
        if (seq == even)
            return TSQP_PEER_CLOSED;
    }
    if (seq != even + 1)
        return TSQP_CORRUPTED;
    uint64_t slot = tsqp_load_relaxed(&entry->slot);
    uint64_t nbytes = tsqp_load_relaxed(&entry->nbytes);
    /* SYNC: acquire, as it may count more by now than when seq was stored; pairs with tsqp_ring_fill. */
    uint64_t filled = tsqp_load_acquire(&entry->filled);
    if (slot >= ring->count || nbytes > ring->chunk_bytes || filled > nbytes)
        return TSQP_CORRUPTED;
    out->data = ring->slots + slot * ring->stride;
    out->nbytes = nbytes;
    out->filled = filled;
    out->ticket = ring->next;
    ring->leased[i] = 1;
    move_to(ring, ring->next + 1);
    return TSQP_OK;
}

int tsqp_ring_unread(struct tsqp_ring *ring, const struct tsqp_slot *slot) {
    if (ring->role != TSQP_CONSUMER || ring->next == 0 || slot->ticket != ring->next - 1 ||
        !ring->leased[slot->ticket % ring->count])
        return TSQP_USAGE;
    ring->leased[slot->ticket % ring->count] = 0;
    move_to(ring, ring->next - 1);
    return TSQP_OK;
}

int tsqp_ring_follow(struct tsqp_ring *ring, struct tsqp_slot *slot, uint64_t upto) {
    uint64_t *word = &entry_at(ring, slot->ticket)->filled;
    for (int i = 0; slot->filled < upto; i++) {
        /* SYNC: pairs with tsqp_ring_fill. */
        uint64_t filled = tsqp_load_acquire(word);
        if (filled > slot->nbytes || filled < slot->filled)
            return TSQP_CORRUPTED;
        slot->filled = filled;
        if (filled >= upto)
            break;
        if (i >= FOLLOW_SPINS)
            return TSQP_AGAIN;
        tsqp_cpu_relax();
    }
    return TSQP_OK;
}

struct tsqp_watch tsqp_ring_fill_watch(struct tsqp_ring *ring, const struct tsqp_slot *slot) {
    struct tsqp_entry *entry = entry_at(ring, slot->ticket);
    return (struct tsqp_watch){&entry->filled, slot->filled, &entry->consumer_waiting,
                               peer_closed_word(ring)};
}

int tsqp_ring_release(struct tsqp_ring *ring, const struct tsqp_slot *slot) {
    uint64_t i = slot->ticket % ring->count;
    /* A ticket of an earlier lap must not release the lease that has its entry now. */
    bool current = slot->ticket < ring->next && ring->next - slot->ticket <= ring->count;
    if (ring->role != TSQP_CONSUMER || !current || !ring->leased[i])
        return TSQP_USAGE;
    struct tsqp_entry *entry = &ring->entries[i];
    ring->leased[i] = 0;
    /* SYNC: pairs with the producer's acquire of seq in tsqp_ring_try_write and reclaim; our reads are
     * before. */
    tsqp_publish(&entry->seq, lap_even(ring, slot->ticket) + 2);
    tsqp_wake(&entry->seq, &entry->producer_waiting, ring->waiter.futex);
    return TSQP_OK;
}

/* Ends the peer's wait, whichever entry it sleeps on, so that it sees our closed word. */
void tsqp_ring_wake_peer(struct tsqp_ring *ring) {
    for (uint64_t i = 0; i < ring->count; i++) {
        struct tsqp_entry *entry = &ring->entries[i];
        bool producer = ring->role == TSQP_PRODUCER;
        uint64_t *waiting = producer ? &entry->consumer_waiting : &entry->producer_waiting;
        tsqp_wake(&entry->seq, waiting, ring->waiter.futex);
        if (producer) /* it may wait for the rest of a message */
            tsqp_wake(&entry->filled, waiting, ring->waiter.futex);
    }
}

void tsqp_ring_rouse(struct tsqp_ring *ring) {
    struct tsqp_entry *entry = &ring->entries[ring->place];
    /* A hint, so relaxed will do: the publish wakes whoever this misses. */
    if (tsqp_load_relaxed(&entry->consumer_waiting) != 0)
        tsqp_wake(&entry->seq, &entry->consumer_waiting, ring->waiter.futex);
}
