/* tsqp.h: the C core's interface. It knows no Python.
 *
 * Every function returns 0 or a count, or one of the negative codes below; what an out-parameter points to is
 * written only on success. Ownership: segments and buffers are counted (retain/release); a ring belongs to
 * whoever opened it and keeps its segment alive. One thread at a time per ring.
 */
#ifndef TSQP_H
#define TSQP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"

enum tsqp_code {
    TSQP_OK = 0,
    /* waits */
    TSQP_AGAIN = -1,       /* the slice passed; look at signals and the peer, then call again */
    TSQP_INTERRUPTED = -2, /* a signal arrived */
    TSQP_PEER_CLOSED = -3, /* the peer closed and nothing is left to read */
    TSQP_CLOSED = -4,      /* this end is closed */
    TSQP_CORRUPTED = -5,   /* a flag word, slot number or length the protocol forbids */
    TSQP_USAGE = -6,       /* called against the contract */
    /* segments */
    TSQP_ERRNO = -10,     /* see errno */
    TSQP_NOT_FOUND = -11, /* no such segment */
    TSQP_EXISTS = -12,
    TSQP_PERMISSION = -13,
    TSQP_FULL = -14,      /* no space for the segment */
    TSQP_BAD_MAGIC = -15, /* not a tsqp segment / message */
    TSQP_BAD_VERSION = -16,
    TSQP_BAD_GEOMETRY = -17,
    TSQP_TRUNCATED = -18,
    TSQP_NO_MEMORY = -19,
    TSQP_BAD_NAME = -20,
    TSQP_BAD_SESSION = -21,
    TSQP_ATTACHED = -22, /* the segment's second end is taken */
    /* messages */
    TSQP_TOO_LARGE = -30,
    TSQP_BAD_DTYPE = -31,
    TSQP_BAD_RANK = -32,
    TSQP_BAD_SHAPE = -33,
    TSQP_BAD_NBYTES = -34,
    TSQP_BAD_OFFSET = -35,
    TSQP_TOO_MANY_TENSORS = -36,
    TSQP_BAD_META = -37,
    TSQP_BAD_RESERVED = -38,
    TSQP_BAD_TOTAL = -39,
    TSQP_BAD_ENCODING = -40,
};

/* ---- segment (shm.c) ---- */

struct tsqp_geometry {
    uint64_t max_chunk_bytes; /* 64 .. 2^40 */
    uint64_t max_chunks;      /* 1 .. 1024 */
    uint64_t ring_count;      /* 1 or 2 */
};

#define TSQP_NAME_BYTES 64

struct tsqp_segment; /* a mapping; counted */

struct tsqp_owner {
    uint64_t pid, start, pidns;
    uint64_t segment_bytes; /* of the file */
    bool locked;            /* the creator lives */
};

/* Checked: returns 0 where the geometry is out of range or overflows. */
uint64_t tsqp_segment_bytes(const struct tsqp_geometry *geometry);
/* `name` NULL picks a random one. Space is reserved before the first store, so that a full file system is
 * TSQP_FULL here and never a SIGBUS later. */
int tsqp_segment_create(const struct tsqp_geometry *geometry, const char *name, struct tsqp_segment **out);
/* `session` NULL skips the session check. The length comes from `geometry` (the handshake), never from fstat,
 * whose answer is stale inside Gramine; where fstat sees a regular file that is too short: TSQP_TRUNCATED. */
int tsqp_segment_attach(const struct tsqp_geometry *geometry, const char *name, const uint64_t session[2],
                        struct tsqp_segment **out);
void tsqp_segment_retain(struct tsqp_segment *segment);
void tsqp_segment_release(struct tsqp_segment *segment); /* unmaps after the last; the creator unlinks */
int tsqp_segment_unlink(struct tsqp_segment *segment);   /* once; later calls do nothing */
const char *tsqp_segment_name(const struct tsqp_segment *segment);
void tsqp_segment_session(const struct tsqp_segment *segment, uint64_t out[2]);
uint64_t tsqp_segment_length(const struct tsqp_segment *segment);
/* Where the segment is mapped in this process. */
void *tsqp_segment_address(const struct tsqp_segment *segment);
void tsqp_segment_close_end(struct tsqp_segment *segment); /* sets this end's closed word */
bool tsqp_segment_peer_closed(struct tsqp_segment *segment);
void tsqp_segment_beat(struct tsqp_segment *segment);
uint64_t tsqp_segment_peer_heartbeat(struct tsqp_segment *segment);
/* 1: the peer holds its lock; 0: it attached with a lock and holds it no more (dead, unless it closed); -1:
 * can't be told (not attached yet, inside an enclave, file system without locks). The kernel drops the lock
 * with the process, whatever killed it and in whatever pid namespace it lived. */
int tsqp_segment_peer_locked(struct tsqp_segment *segment);
void tsqp_segment_forget_after_fork(struct tsqp_segment *segment); /* child: drop the inherited descriptor */

const char *tsqp_shm_directory(void);
int tsqp_process_start(uint64_t pid, uint64_t *start); /* TSQP_NOT_FOUND: no such process */
uint64_t tsqp_pid_namespace(void);
/* Reads who owns the segment file `name`, for the reaper. */
int tsqp_segment_owner(const char *name, struct tsqp_owner *out);

/* ---- waiting (wait.c) ---- */

enum tsqp_wait_mode {
    TSQP_WAIT_AUTO = 0, /* spin a little while that pays, yield, block */
    TSQP_WAIT_SPIN = 1, /* never leave the core */
    TSQP_WAIT_BLOCK = 2,
    TSQP_WAIT_POLL = 3, /* no futex: spin, yield, short sleeps (what an enclave can do) */
};

struct tsqp_estimate {
    uint64_t mean_ns, deviation_ns;
    uint32_t count; /* of samples, up to the number from which it does not matter */
};
void tsqp_estimate_add(struct tsqp_estimate *estimate, uint64_t sample_ns);

struct tsqp_waiter {
    enum tsqp_wait_mode mode;
    uint64_t spin_max_ns;
    uint64_t spin_ns; /* what spinning is worth now; learns */
    uint32_t misses;  /* waits in a row that spinning did not cover */
    uint64_t sleep_ns;
    bool futex;                /* both ends are native Linux */
    struct tsqp_estimate late; /* how long after the time it was to end a sleep ends */
    uint32_t crowded;          /* answers slept for after one that was looked for while others had the core */
    uint32_t crowded_skips;    /* those of them that are still to come */
};

/* One word to watch: ready when it differs from `idle`. */
struct tsqp_watch {
    uint64_t *word;
    uint64_t idle;
    uint64_t *waiting; /* the word the publisher looks at before it wakes */
    uint64_t *closed;  /* ends the wait with TSQP_AGAIN when not 0; NULL: nobody to close */
};

void tsqp_waiter_init(struct tsqp_waiter *waiter, enum tsqp_wait_mode mode, uint64_t spin_ns, bool futex);
/* Waits until a watched word is ready, at most `slice_ns`. 0 ready, TSQP_AGAIN, TSQP_INTERRUPTED. */
int tsqp_wait(struct tsqp_waiter *waiter, const struct tsqp_watch *watches, size_t count, uint64_t slice_ns);

/* What is known of the answers to one kind of request. It decides when a waiter looks, and nothing else: a
 * peer that makes it wrong is waited for as without it. */
struct tsqp_forecast {
    uint64_t kind;
    struct tsqp_estimate took; /* from the begin of the wait */
    uint32_t misses;           /* times in a row that the answer was not there when it was looked for */
    uint64_t begin_ns;         /* of the wait under way; its slices share it */
};

#define TSQP_FORECASTS 4
/* Those of one place that asks, by the request's size: a prompt takes longer than a token. All 0: nothing is
 * known. */
struct tsqp_forecasts {
    struct tsqp_forecast of[TSQP_FORECASTS];
};
/* That of requests of about this size; it starts afresh where its place was another size's. */
struct tsqp_forecast *tsqp_forecast_of(struct tsqp_forecasts *forecasts, uint64_t request_bytes);
/* tsqp_wait for one word that answers a request: sleeps until shortly before the answer is expected, so that
 * this thread is awake, and its core with it, when it comes. `forecast->begin_ns` is set by the caller. */
int tsqp_wait_answer(struct tsqp_waiter *waiter, const struct tsqp_watch *watch,
                     struct tsqp_forecast *forecast, uint64_t slice_ns);
void tsqp_wake(uint64_t *word, uint64_t *waiting, bool futex);
uint64_t tsqp_now_ns(void); /* CLOCK_MONOTONIC */

/* A private word that other threads of this process ring to end a wait. */
struct tsqp_doorbell {
    uint64_t count, waiting;
};
void tsqp_doorbell_ring(struct tsqp_doorbell *bell);

/* ---- ring (ring.c) ---- */

struct tsqp_ring;

enum tsqp_role { TSQP_PRODUCER, TSQP_CONSUMER };

struct tsqp_slot {
    uint8_t *data;   /* shared memory, page-aligned */
    uint64_t nbytes; /* capacity when writing, the message's length when reading; a private copy */
    uint64_t filled; /* reading: how much of it is known to be there */
    uint64_t ticket; /* names the entry for publish, release */
};

int tsqp_ring_open(struct tsqp_segment *segment, unsigned index, enum tsqp_role role, struct tsqp_ring **out);
void tsqp_ring_close(struct tsqp_ring *ring); /* frees; does not close the end */
struct tsqp_waiter *tsqp_ring_waiter(struct tsqp_ring *ring);
/* What to wait for before the next acquire can succeed. */
struct tsqp_watch tsqp_ring_watch(struct tsqp_ring *ring);
/* Not blocking: 0, TSQP_AGAIN, TSQP_CORRUPTED, TSQP_PEER_CLOSED, TSQP_USAGE. */
int tsqp_ring_try_write(struct tsqp_ring *ring, struct tsqp_slot *out);
int tsqp_ring_try_read(struct tsqp_ring *ring, struct tsqp_slot *out);
int tsqp_ring_publish(struct tsqp_ring *ring, const struct tsqp_slot *slot, uint64_t nbytes);
int tsqp_ring_cancel(struct tsqp_ring *ring, const struct tsqp_slot *slot);  /* nothing is published */
int tsqp_ring_release(struct tsqp_ring *ring, const struct tsqp_slot *slot); /* in any order */
bool tsqp_ring_ready(
    struct tsqp_ring *ring); /* a whole message waits / a slot is free, or something is wrong */
/* Cut-through: a long message is published when its first part is written, so that the consumer copies while
 * the producer still does. publish_part announces `nbytes` of which `filled` are there; fill says how many
 * are by now and must end with all of them before anything else is done with the ring. */
int tsqp_ring_publish_part(struct tsqp_ring *ring, const struct tsqp_slot *slot, uint64_t nbytes,
                           uint64_t filled);
int tsqp_ring_fill(struct tsqp_ring *ring, uint64_t filled);
/* Consumer: waits a moment until `upto` bytes are there and keeps the new mark in slot->filled. 0, TSQP_AGAIN
 * (wait with tsqp_ring_fill_watch), TSQP_CORRUPTED. */
int tsqp_ring_follow(struct tsqp_ring *ring, struct tsqp_slot *slot, uint64_t upto);
struct tsqp_watch tsqp_ring_fill_watch(struct tsqp_ring *ring, const struct tsqp_slot *slot);
/* Consumer: gives the message acquired last back unread; the next try_read gets it again. */
int tsqp_ring_unread(struct tsqp_ring *ring, const struct tsqp_slot *slot);
uint64_t tsqp_ring_free_slots(struct tsqp_ring *ring);   /* producer: how many writes would not wait */
uint64_t tsqp_ring_unread_slots(struct tsqp_ring *ring); /* consumer: published, and not acquired yet */
void tsqp_ring_wake_peer(struct tsqp_ring *ring);
/* Producer: wakes a sleeping consumer for a message that is still being made; its wake-up takes about as
 * long. */
void tsqp_ring_rouse(struct tsqp_ring *ring);

/* ---- the payload of one message through a slot (stream.c) ---- */

struct tsqp_outflow {
    struct tsqp_ring *ring;
    const struct tsqp_slot *slot;
    uint64_t total;  /* the message's bytes */
    uint64_t marked; /* published so far; 0: nothing is */
};

/* Copies contiguous memory to `offset` of the slot; parts must come in order and leave only padding out. */
void tsqp_outflow_copy(struct tsqp_outflow *flow, uint64_t offset, const void *src, uint64_t nbytes);
/* Everything before `upto` was written. The last mark is `total` and publishes what is not published yet. */
int tsqp_outflow_mark(struct tsqp_outflow *flow, uint64_t upto);
/* Copies [offset + *done, offset + nbytes) to `dst` as far as the producer got within a moment; 0 when all is
 * there, else as tsqp_ring_follow. */
int tsqp_inflow_copy(struct tsqp_ring *ring, struct tsqp_slot *slot, uint64_t offset, void *dst,
                     uint64_t nbytes, uint64_t *done);

/* ---- messages (codec.c): private memory only ---- */

struct tsqp_message {
    struct tsqp_message_header header;
    struct tsqp_tensor_desc tensors[TSQP_MAX_TENSORS];
};

uint32_t tsqp_dtype_itemsize(unsigned dtype); /* 0: unknown */
/* Fills header.{magic,version,...,total_bytes} and each tensor's nbytes and offset from dtype, encoding, ndim
 * and shape. */
int tsqp_message_plan(struct tsqp_message *message);
/* Of a descriptor that passed the checks: bytes of its elements in memory, and its rows (all dimensions but
 * the last) and columns as the encodings of convert.h count them. */
uint64_t tsqp_tensor_nbytes(const struct tsqp_tensor_desc *tensor);
void tsqp_tensor_rows(const struct tsqp_tensor_desc *tensor, uint64_t *rows, uint64_t *cols);
/* Bytes before the payload: header, descriptors and meta, padded to 64. */
uint64_t tsqp_message_head_bytes(const struct tsqp_message_header *header);
/* Writes header, descriptors and meta to `dst` (head_bytes long, private). */
void tsqp_message_write_head(const struct tsqp_message *message, const void *meta, void *dst);
/* Validates a private copy of a header against the bytes that are there. */
int tsqp_message_check_header(const struct tsqp_message_header *header, uint64_t available_bytes);
/* Validates private copies of the descriptors; the only accepted layout is the one tsqp_message_plan makes.
 */
int tsqp_message_check_tensors(const struct tsqp_message *message);

/* ---- private result memory (pool.c) and DLPack tensors on it (tensor.c) ---- */

struct tsqp_buffer; /* counted, 64-byte aligned */

struct tsqp_buffer *tsqp_buffer_new(uint64_t nbytes); /* NULL: no memory */
void *tsqp_buffer_data(struct tsqp_buffer *buffer);
void tsqp_buffer_release(struct tsqp_buffer *buffer);
void tsqp_pool_limit(uint64_t nbytes); /* how much freed memory is kept for reuse */
void tsqp_pool_trim(void);
uint64_t tsqp_pool_idle_bytes(void);

struct DLManagedTensor;
struct DLManagedTensorVersioned;
/* A tensor over `data` that releases its owner (a buffer or a segment; one of them NULL) when the consumer is
 * done with it. Takes over the caller's reference on the owner, also on failure. */
struct DLManagedTensor *tsqp_tensor_new(const struct tsqp_tensor_desc *desc, void *data,
                                        struct tsqp_buffer *buffer, struct tsqp_segment *segment);
/* The same in the struct of DLPack 1, which has codes for float8; the other gives those as bytes. */
struct DLManagedTensorVersioned *tsqp_tensor_new_versioned(const struct tsqp_tensor_desc *desc, void *data,
                                                           struct tsqp_buffer *buffer,
                                                           struct tsqp_segment *segment);
void tsqp_tensor_delete(struct DLManagedTensor *tensor);
unsigned tsqp_dtype_of_dlpack(unsigned code, unsigned bits, unsigned lanes); /* 0: none of ours */

#endif
