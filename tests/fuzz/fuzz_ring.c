/* fuzz_ring.c: an end of a ring faces a segment whose every byte comes from the input, and changes between
 * steps. Whatever lies there: only the documented codes come out, what is handed out lies in the segment, and
 * the private accounts stay right. */
#include "ring.c"

#include "fuzz.h"

#include <fcntl.h>
#include <unistd.h>

#define MAX_STEPS 200
#define MAX_LEASES 8

struct victim {
    struct tsqp_segment segment; /* over plain memory of exactly its length: the sanitizer sees its end */
    struct tsqp_ring *producer, *consumer;
    struct tsqp_slot writing;
    struct tsqp_slot leases[MAX_LEASES];
    unsigned lease_count;
};

static const uint64_t WORDS[] = {
    0,
    1,
    2,
    3,
    4,
    5,
    63,
    64,
    128,
    TSQP_PAGE,
    UINT64_C(1) << 32,
    UINT64_C(1) << 40,
    INT64_MAX,
    UINT64_MAX - 1,
    UINT64_MAX,
};

/* ---- what must always hold ---- */

static void check_wait_code(int rc) {
    DEMAND(rc == TSQP_OK || rc == TSQP_AGAIN || rc == TSQP_CORRUPTED || rc == TSQP_PEER_CLOSED ||
           rc == TSQP_USAGE);
}

/* Each slot is in one place: free, being written, or out with the entry it was published by. */
static void check_accounts(const struct tsqp_ring *ring) {
    unsigned places[8] = {0};
    DEMAND(ring->free_count <= ring->count);
    for (uint32_t i = 0; i < ring->free_count; i++)
        places[ring->free_slots[i]]++;
    for (uint64_t i = 0; i < ring->count; i++)
        if (ring->entry_slot[i] != NO_SLOT)
            places[ring->entry_slot[i]]++;
    if (ring->writing)
        places[ring->write_slot]++;
    for (uint64_t i = 0; i < ring->count; i++)
        DEMAND(places[i] == 1);
}

static void check_slot(const struct tsqp_ring *ring, const struct tsqp_slot *slot) {
    const struct tsqp_geometry *geometry = &ring->segment->geometry;
    uint64_t offset = (uint64_t)(slot->data - ring->slots);
    DEMAND(slot->data >= ring->slots && offset % tsqp_slot_stride(geometry) == 0);
    DEMAND(offset / tsqp_slot_stride(geometry) < geometry->max_chunks);
    DEMAND(slot->nbytes <= geometry->max_chunk_bytes);
}

/* ---- a segment of the input's making ---- */

static void shape_of(struct fuzz_input *input, struct tsqp_geometry *geometry) {
    static const uint64_t CHUNK_BYTES[] = {64, 192, 4096, 5000};
    uint8_t kind = fuzz_u8(input);
    geometry->max_chunk_bytes = CHUNK_BYTES[kind % 4];
    geometry->max_chunks = 1 + kind / 4 % 5;
    geometry->ring_count = 1 + kind / 32 % 2;
}

/* The entries come from the input; header and slots hold zeros until a step changes them. */
static void victim_open(struct victim *victim, struct fuzz_input *input) {
    struct tsqp_segment *segment = &victim->segment;
    memset(victim, 0, sizeof *victim);
    shape_of(input, &segment->geometry);
    segment->length = tsqp_segment_bytes(&segment->geometry);
    DEMAND(posix_memalign((void **)&segment->base, TSQP_PAGE, segment->length) == 0);
    memset(segment->base, 0, segment->length);
    segment->fd = -1;
    segment->end = fuzz_u8(input) % 2;
    segment->unlinked = true;
    atomic_init(&segment->references, 1);
    unsigned rings = (unsigned)segment->geometry.ring_count;
    DEMAND(tsqp_ring_open(segment, 0, TSQP_PRODUCER, &victim->producer) == TSQP_OK);
    DEMAND(tsqp_ring_open(segment, rings - 1, TSQP_CONSUMER, &victim->consumer) == TSQP_OK);
    DEMAND(tsqp_ring_open(segment, rings, TSQP_CONSUMER, &victim->consumer) == TSQP_USAGE);
    tsqp_waiter_init(tsqp_ring_waiter(victim->producer), TSQP_WAIT_SPIN, 0, false);
    tsqp_waiter_init(tsqp_ring_waiter(victim->consumer), TSQP_WAIT_SPIN, 0, false);
}

static void victim_close(struct victim *victim) {
    tsqp_ring_close(victim->producer);
    tsqp_ring_close(victim->consumer);
    DEMAND(atomic_load(&victim->segment.references) == 1);
    free(victim->segment.base);
}

/* ---- steps ---- */

static uint64_t a_word(struct fuzz_input *input) {
    uint8_t kind = fuzz_u8(input);
    return kind < sizeof WORDS / sizeof WORDS[0] ? WORDS[kind] : fuzz_u64(input);
}

static void change_entry(struct victim *victim, struct fuzz_input *input) {
    struct tsqp_ring *ring = fuzz_u8(input) % 2 ? victim->producer : victim->consumer;
    uint64_t *word = (uint64_t *)&ring->entries[fuzz_u8(input) % ring->count] + fuzz_u8(input) % 8;
    *word = a_word(input);
}

/* What an honest peer does next, so that the victim gets on. */
static void advance_entry(struct victim *victim, struct fuzz_input *input) {
    struct tsqp_ring *consumer = victim->consumer, *producer = victim->producer;
    uint8_t kind = fuzz_u8(input);
    if (kind % 2) {
        struct tsqp_entry *entry = entry_at(consumer, consumer->next);
        entry->slot = kind / 2 % consumer->count;
        entry->nbytes = fuzz_u16(input) % (consumer->chunk_bytes + 1);
        entry->filled = kind >= 224 ? entry->nbytes / 2 : entry->nbytes;
        entry->seq = lap_even(consumer, consumer->next) + 1;
    } else if (producer->next > 0) {
        uint64_t k = producer->next - 1 -
                     kind / 2 % (producer->next < producer->count ? producer->next : producer->count);
        entry_at(producer, k)->seq = lap_even(producer, k) + 2;
    }
}

static void change_anything(struct victim *victim, struct fuzz_input *input) {
    uint64_t at = (fuzz_u16(input) * UINT64_C(8)) % victim->segment.length;
    uint64_t word = a_word(input);
    memcpy(victim->segment.base + at, &word, sizeof word);
}

static void write_slot(struct victim *victim) {
    struct tsqp_slot slot = {0};
    bool writing = victim->producer->writing || victim->producer->filling;
    int rc = tsqp_ring_try_write(victim->producer, &slot);
    check_wait_code(rc);
    DEMAND(!writing || rc == TSQP_USAGE);
    if (rc != TSQP_OK)
        return;
    check_slot(victim->producer, &slot);
    DEMAND(slot.nbytes == victim->segment.geometry.max_chunk_bytes);
    for (unsigned i = 0; i < victim->lease_count; i++) /* its own ring's slots are nobody else's */
        DEMAND(victim->segment.geometry.ring_count == 1 || victim->leases[i].data != slot.data);
    memset(slot.data, 0x5a, slot.nbytes);
    victim->writing = slot;
}

static void publish_slot(struct victim *victim, struct fuzz_input *input) {
    struct tsqp_slot slot = victim->writing;
    uint64_t nbytes = fuzz_u16(input);
    bool may = victim->producer->writing && nbytes <= victim->segment.geometry.max_chunk_bytes;
    if (fuzz_u8(input) % 8 == 0) {
        slot.ticket += 1 + fuzz_u8(input);
        may = false;
    }
    uint64_t filled = fuzz_u8(input) % 4 ? nbytes : nbytes * fuzz_u8(input) / 255;
    DEMAND(tsqp_ring_publish_part(victim->producer, &slot, nbytes, filled) == (may ? TSQP_OK : TSQP_USAGE));
}

static void fill_slot(struct victim *victim, struct fuzz_input *input) {
    uint64_t filling = victim->producer->filling, filled = filling * fuzz_u8(input) / 255;
    DEMAND(tsqp_ring_fill(victim->producer, filling + 1) == TSQP_USAGE);
    DEMAND(tsqp_ring_fill(victim->producer, filled) == (filling ? TSQP_OK : TSQP_USAGE));
}

static void cancel_slot(struct victim *victim) {
    int rc = tsqp_ring_cancel(victim->producer, &victim->writing);
    DEMAND(rc == TSQP_OK || rc == TSQP_USAGE);
}

/* Follows the marks of a peer that may have set them anywhere. The wait for more is the caller's: it ends
 * here. */
static void copy_slot(struct victim *victim, struct tsqp_slot *slot, bool waits) {
    uint8_t *copy = fuzz_malloc(slot->nbytes);
    uint64_t offset = slot->nbytes / 2 / TSQP_LINE * TSQP_LINE, done = 0;
    bool whole = slot->filled == slot->nbytes;
    if (whole || waits) {
        int rc = tsqp_inflow_copy(victim->consumer, slot, offset, copy, slot->nbytes - offset, &done);
        DEMAND(rc == TSQP_OK || rc == TSQP_AGAIN || rc == TSQP_CORRUPTED);
        DEMAND(done <= slot->nbytes - offset && (rc != TSQP_OK || done == slot->nbytes - offset));
        DEMAND(!whole || rc == TSQP_OK);
        rc = tsqp_ring_follow(victim->consumer, slot, slot->nbytes);
        DEMAND(rc == TSQP_OK || rc == TSQP_AGAIN || rc == TSQP_CORRUPTED);
    }
    DEMAND(slot->filled <= slot->nbytes);
    struct tsqp_watch watch = tsqp_ring_fill_watch(victim->consumer, slot);
    check_wait_code(tsqp_wait(tsqp_ring_waiter(victim->consumer), &watch, 1, 0));
    free(copy);
}

static void read_slot(struct victim *victim, struct fuzz_input *input) {
    struct tsqp_slot slot = {0};
    int rc = tsqp_ring_try_read(victim->consumer, &slot);
    check_wait_code(rc);
    if (rc != TSQP_OK)
        return;
    check_slot(victim->consumer, &slot);
    DEMAND(slot.filled <= slot.nbytes);
    for (unsigned i = 0; i < victim->lease_count; i++)
        DEMAND(victim->leases[i].ticket != slot.ticket);
    uint8_t how = fuzz_u8(input);
    if (how % 16 == 0) {
        DEMAND(tsqp_ring_unread(victim->consumer, &slot) == TSQP_OK);
        DEMAND(tsqp_ring_unread(victim->consumer, &slot) == TSQP_USAGE);
        return;
    }
    copy_slot(victim, &slot, how % 16 == 1);
    if (victim->lease_count < MAX_LEASES)
        victim->leases[victim->lease_count++] = slot;
}

static void release_slot(struct victim *victim, struct fuzz_input *input) {
    if (victim->lease_count == 0 || fuzz_u8(input) % 8 == 0) {
        struct tsqp_slot never = {.ticket = victim->consumer->next + fuzz_u64(input) % 8};
        DEMAND(tsqp_ring_release(victim->consumer, &never) == TSQP_USAGE);
        return;
    }
    unsigned choice = fuzz_u8(input) % victim->lease_count;
    struct tsqp_slot slot = victim->leases[choice];
    victim->leases[choice] = victim->leases[--victim->lease_count];
    DEMAND(tsqp_ring_release(victim->consumer, &slot) == TSQP_OK);
    DEMAND(tsqp_ring_release(victim->consumer, &slot) == TSQP_USAGE);
}

static void look_around(struct victim *victim) {
    struct tsqp_watch watch = tsqp_ring_watch(victim->consumer);
    (void)tsqp_ring_ready(victim->consumer);
    (void)tsqp_ring_ready(victim->producer);
    DEMAND(tsqp_ring_free_slots(victim->producer) <= victim->segment.geometry.max_chunks);
    check_wait_code(tsqp_wait(tsqp_ring_waiter(victim->consumer), &watch, 1, 0));
    watch = tsqp_ring_watch(victim->producer);
    check_wait_code(tsqp_wait(tsqp_ring_waiter(victim->producer), &watch, 1, 0));
    tsqp_ring_wake_peer(victim->producer);
    tsqp_ring_wake_peer(victim->consumer);
    tsqp_segment_beat(&victim->segment);
    (void)tsqp_segment_peer_heartbeat(&victim->segment);
    (void)tsqp_segment_peer_closed(&victim->segment);
    DEMAND(tsqp_segment_peer_locked(&victim->segment) == -1);
}

static void step(struct victim *victim, struct fuzz_input *input) {
    switch (fuzz_u8(input) % 11) {
    case 0:
        change_entry(victim, input);
        break;
    case 1:
        change_anything(victim, input);
        break;
    case 2:
    case 3:
        advance_entry(victim, input);
        break;
    case 4:
        write_slot(victim);
        break;
    case 5:
        publish_slot(victim, input);
        break;
    case 6:
        cancel_slot(victim);
        break;
    case 7:
        read_slot(victim, input);
        break;
    case 8:
        release_slot(victim, input);
        break;
    case 9:
        fill_slot(victim, input);
        break;
    default:
        look_around(victim);
    }
    check_accounts(victim->producer);
}

/* ---- attaching to a file of the input's making ---- */

static char scratch[64] = "/tmp/tsqp-fuzz-XXXXXX";

static void remove_scratch(void) {
    rmdir(scratch);
}

static void make_scratch(void) {
    static bool made;
    if (made)
        return;
    /* run.py gives a directory and removes it: libFuzzer ends without calling what atexit was told. */
    const char *given = getenv("TSQP_SHM_DIR");
    if (given)
        DEMAND(snprintf(scratch, sizeof scratch, "%s", given) < (int)sizeof scratch);
    else
        DEMAND(mkdtemp(scratch) && setenv("TSQP_SHM_DIR", scratch, 1) == 0 && atexit(remove_scratch) == 0);
    made = true;
}

static void attach_to_file(struct fuzz_input *input) {
    char path[128];
    struct tsqp_geometry geometry;
    struct tsqp_segment_header header;
    struct tsqp_segment *segment = NULL;
    struct tsqp_owner owner;
    shape_of(input, &geometry);
    make_scratch();
    uint64_t length = tsqp_segment_bytes(&geometry), change = a_word(input);
    fuzz_take(input, &header, sizeof header);
    snprintf(path, sizeof path, "%s/tsqp-fuzz", scratch);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    DEMAND(fd >= 0 && ftruncate(fd, (off_t)(change % 4 == 3 ? length - 1 : length)) == 0);
    DEMAND(pwrite(fd, &header, sizeof header, 0) == sizeof header);
    close(fd);
    uint64_t session[2] = {header.session[0], header.session[1] ^ (change % 4 == 2)};
    int rc = tsqp_segment_attach(&geometry, "tsqp-fuzz", session, &segment);
    DEMAND(rc == TSQP_OK || rc == TSQP_TRUNCATED || rc == TSQP_BAD_MAGIC || rc == TSQP_BAD_VERSION ||
           rc == TSQP_BAD_GEOMETRY || rc == TSQP_BAD_SESSION);
    if (rc == TSQP_OK) {
        DEMAND(header.tag == TSQP_SEGMENT_TAG && header.segment_bytes == length && change % 4 < 2);
        tsqp_segment_release(segment);
    }
    rc = tsqp_segment_owner("tsqp-fuzz", &owner);
    DEMAND(rc == TSQP_OK ? header.tag == TSQP_SEGMENT_TAG && !owner.locked : rc == TSQP_BAD_MAGIC);
    unlink(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes) {
    struct fuzz_input input = {data, nbytes};
    if (fuzz_u8(&input) % 16 == 15) {
        attach_to_file(&input);
        return 0;
    }
    struct victim victim;
    victim_open(&victim, &input);
    for (int i = 0; i < MAX_STEPS && input.left > 0; i++)
        step(&victim, &input);
    victim_close(&victim);
    return 0;
}
