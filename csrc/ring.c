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

#define NO_SLOT UINT32_MAX

struct tsqp_ring {
    struct tsqp_segment *segment;
    struct tsqp_entry *entries;
    uint8_t *slots;
    uint64_t count; /* entries, and slots */
    uint64_t stride;
    uint64_t chunk_bytes;
    uint64_t next; /* producer: next to publish; consumer: next to acquire */
    enum tsqp_role role;
    struct tsqp_waiter waiter;
    /* producer */
    bool writing;
    uint32_t write_slot;
    uint32_t free_count;
    uint32_t *free_slots; /* a stack: the slot freed last is still in cache */
    uint32_t *entry_slot; /* entry -> slot of its unreclaimed message, or NO_SLOT */
    /* consumer */
    uint8_t *leased; /* entry -> acquired and not yet released */
};

static uint64_t lap_even(const struct tsqp_ring *ring, uint64_t k) {
    return 2 * (k / ring->count);
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

struct tsqp_watch tsqp_ring_watch(struct tsqp_ring *ring) {
    struct tsqp_entry *entry = entry_at(ring, ring->next);
    uint64_t even = lap_even(ring, ring->next);
    uint64_t *closed = &tsqp_header(ring->segment)->ends[1 - ring->segment->end].closed;
    if (ring->role == TSQP_CONSUMER) {
        /* While the message one lap ago is leased there is none to read, whatever the producer does. */
        bool leased = ring->leased[ring->next % ring->count] != 0;
        return (struct tsqp_watch){&entry->seq, leased ? even - 1 : even, &entry->consumer_waiting, closed};
    }
    /* Not writable yet means: the message one lap ago is still unread. In lap 0 every entry is writable, and
     * the idle value below is one the word never has. */
    return (struct tsqp_watch){&entry->seq, even - 1, &entry->producer_waiting, closed};
}

/* ---- producer ---- */

/* Takes back the slot of entry `k` if its message was released. */
static bool reclaim(struct tsqp_ring *ring, uint64_t k) {
    uint64_t i = k % ring->count;
    /* SYNC: acquire pairs with the consumer's tsqp_publish in tsqp_ring_release: its reads of the slot are
     * over. */
    if (ring->entry_slot[i] == NO_SLOT || tsqp_load_acquire(&ring->entries[i].seq) != lap_even(ring, k) + 2)
        return false;
    ring->free_slots[ring->free_count++] = ring->entry_slot[i];
    ring->entry_slot[i] = NO_SLOT;
    return true;
}

static uint32_t take_slot(struct tsqp_ring *ring) {
    uint64_t oldest = ring->next < ring->count ? 0 : ring->next - ring->count;
    if (ring->next > 0)
        reclaim(ring, ring->next - 1);
    for (uint64_t k = oldest; ring->free_count == 0 && k < ring->next; k++)
        reclaim(ring, k);
    return ring->free_count ? ring->free_slots[--ring->free_count] : NO_SLOT;
}

int tsqp_ring_try_write(struct tsqp_ring *ring, struct tsqp_slot *out) {
    if (ring->role != TSQP_PRODUCER || ring->writing)
        return TSQP_USAGE;
    uint64_t even = lap_even(ring, ring->next);
    uint64_t seq = tsqp_load_acquire(&entry_at(ring, ring->next)->seq);
    if (seq != even) {
        if (seq + 1 != even)
            return TSQP_CORRUPTED;
        return tsqp_segment_peer_closed(ring->segment) ? TSQP_PEER_CLOSED : TSQP_AGAIN;
    }
    if (tsqp_segment_peer_closed(ring->segment))
        return TSQP_PEER_CLOSED; /* nobody will read it */
    if (ring->next >= ring->count)
        reclaim(ring, ring->next - ring->count);
    uint32_t slot = take_slot(ring);
    if (slot == NO_SLOT)
        return TSQP_CORRUPTED; /* the entry came back, another one's flag was turned back */
    ring->writing = true;
    ring->write_slot = slot;
    out->data = ring->slots + slot * ring->stride;
    out->nbytes = ring->chunk_bytes;
    out->ticket = ring->next;
    return TSQP_OK;
}

int tsqp_ring_publish(struct tsqp_ring *ring, const struct tsqp_slot *slot, uint64_t nbytes) {
    if (!ring->writing || slot->ticket != ring->next || nbytes > ring->chunk_bytes)
        return TSQP_USAGE;
    struct tsqp_entry *entry = entry_at(ring, ring->next);
    tsqp_store_relaxed(&entry->slot, ring->write_slot);
    tsqp_store_relaxed(&entry->nbytes, nbytes);
    ring->entry_slot[ring->next % ring->count] = ring->write_slot;
    ring->writing = false;
    /* SYNC: pairs with the consumer's acquire of seq in tsqp_ring_try_read; payload, slot and nbytes are
     * before it. */
    tsqp_publish(&entry->seq, lap_even(ring, ring->next) + 1);
    tsqp_wake(&entry->seq, &entry->consumer_waiting, ring->waiter.futex);
    ring->next++;
    return TSQP_OK;
}

int tsqp_ring_cancel(struct tsqp_ring *ring, const struct tsqp_slot *slot) {
    if (!ring->writing || slot->ticket != ring->next)
        return TSQP_USAGE;
    ring->free_slots[ring->free_count++] = ring->write_slot;
    ring->writing = false;
    return TSQP_OK;
}

uint64_t tsqp_ring_free_slots(struct tsqp_ring *ring) {
    uint64_t free_entries = 0;
    while (free_entries < ring->count) {
        uint64_t k = ring->next + free_entries;
        if (tsqp_load_acquire(&entry_at(ring, k)->seq) != lap_even(ring, k))
            break;
        free_entries++;
    }
    return free_entries;
}

/* ---- consumer ---- */

int tsqp_ring_try_read(struct tsqp_ring *ring, struct tsqp_slot *out) {
    if (ring->role != TSQP_CONSUMER)
        return TSQP_USAGE;
    uint64_t i = ring->next % ring->count;
    if (ring->leased[i])
        return TSQP_USAGE; /* every slot is leased; waiting would be for ever */
    struct tsqp_entry *entry = &ring->entries[i];
    uint64_t even = lap_even(ring, ring->next);
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
    if (slot >= ring->count || nbytes > ring->chunk_bytes)
        return TSQP_CORRUPTED;
    out->data = ring->slots + slot * ring->stride;
    out->nbytes = nbytes;
    out->ticket = ring->next;
    ring->leased[i] = 1;
    ring->next++;
    return TSQP_OK;
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
        tsqp_wake(&entry->seq,
                  ring->role == TSQP_PRODUCER ? &entry->consumer_waiting : &entry->producer_waiting,
                  ring->waiter.futex);
    }
}
