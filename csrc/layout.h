/* layout.h: the bytes of a segment and of a message header. Nothing here is code.
 *
 * Segment: one page of header, then per ring its flag lines (one cache line a slot, rounded up to whole
 * pages), then per ring its page-aligned slots. All words are 8 bytes and naturally aligned: an enclave may
 * touch untrusted memory in no other unit (CVE-2022-21233). Everything is little-endian.
 */
#ifndef TSQP_LAYOUT_H
#define TSQP_LAYOUT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define TSQP_PAGE 4096u
#define TSQP_LINE 64u
#define TSQP_ALIGN 64u
#define TSQP_ENDS 2u
#define TSQP_MAX_RINGS 2u
#define TSQP_MAX_CHUNKS 1024u
#define TSQP_MAX_CHUNK_BYTES (UINT64_C(1) << 40)

/* "tsqpseg" and the layout's version in the top byte; stored last, with release. */
#define TSQP_SEGMENT_MAGIC UINT64_C(0x0067657370717374)
#define TSQP_SEGMENT_VERSION UINT64_C(1)
#define TSQP_SEGMENT_TAG (TSQP_SEGMENT_MAGIC | (TSQP_SEGMENT_VERSION << 56))

/* What one end tells the other; a line each so that the ends do not share one. */
struct tsqp_end_words {
    uint64_t heartbeat; /* counts this end's waits and calls; judged by the reader's own clock */
    uint64_t closed;    /* 1 once this end closed in an orderly way */
    uint64_t attached;  /* 1: this end is there; 2: and holds its file lock */
    uint64_t pad[5];
};

struct tsqp_segment_header {
    uint64_t tag;
    uint64_t session[2];
    uint64_t max_chunk_bytes;
    uint64_t max_chunks;
    uint64_t ring_count;
    uint64_t segment_bytes;
    /* Who may reap the file when its owner is gone; read on the owner's host only. */
    uint64_t owner_pid;
    uint64_t owner_start; /* clock ticks after boot, from /proc/PID/stat */
    uint64_t owner_pidns; /* inode of the owner's pid namespace: a pid means nothing outside it */
    uint64_t pad0[6];
    struct tsqp_end_words ends[TSQP_ENDS]; /* 0: creator, 1: attacher */
    uint8_t pad1[TSQP_PAGE - 128 - 2 * 64];
};

static_assert(sizeof(struct tsqp_end_words) == TSQP_LINE, "one line an end");
static_assert(offsetof(struct tsqp_segment_header, ends) == 128, "ends start on a line");
static_assert(sizeof(struct tsqp_segment_header) == TSQP_PAGE, "header is one page");

/* The k-th message of a ring uses entry k % max_chunks. The written/read flag pair of an entry is one
 * sequence word: 2 * lap when the producer may write, 2 * lap + 1 when the consumer may read. The payload
 * lies in slot `slot`, which the producer picks. The `waiting` words count who sleeps or is about to. */
struct tsqp_entry {
    uint64_t seq;
    uint64_t consumer_waiting;
    uint64_t producer_waiting;
    uint64_t slot;
    uint64_t nbytes;
    uint64_t filled; /* how many of the nbytes are written; less than all while the producer still copies */
    uint64_t pad[2];
};

static_assert(sizeof(struct tsqp_entry) == TSQP_LINE, "one line an entry");

/* ---- message ---- */

#define TSQP_MESSAGE_MAGIC UINT32_C(0x4d515354) /* "TSQM" */
#define TSQP_MESSAGE_VERSION 1u
#define TSQP_MAX_NDIM 8u
#define TSQP_MAX_TENSORS 64u
#define TSQP_MAX_META_BYTES 65536u

struct tsqp_message_header {
    uint32_t magic;
    uint16_t version;
    uint16_t header_bytes; /* of this struct */
    uint32_t tag;          /* the method, or what the user likes */
    uint32_t flags;
    uint64_t request_id;
    int32_t status;
    uint32_t tensor_count;
    uint32_t meta_bytes;
    uint32_t site;  /* per-call site id */
    uint64_t index; /* how often that site was called */
    uint64_t total_bytes;
    uint64_t compute_ns; /* durations, never timestamps: clocks of the ends are not comparable */
    uint64_t queue_ns;
    uint64_t reserved[7]; /* zero */
};

static_assert(sizeof(struct tsqp_message_header) == 128, "message header is two lines");
static_assert(offsetof(struct tsqp_message_header, request_id) == 16, "layout");
static_assert(offsetof(struct tsqp_message_header, total_bytes) == 48, "layout");

struct tsqp_tensor_desc {
    uint8_t dtype; /* enum tsqp_dtype */
    uint8_t ndim;
    uint8_t encoding; /* enum tsqp_encoding: how the elements lie on the wire */
    uint8_t reserved0;
    uint32_t reserved1;
    uint64_t nbytes; /* on the wire */
    uint64_t offset; /* from the message's first byte; a multiple of 64 */
    int64_t shape[TSQP_MAX_NDIM];
    uint64_t reserved2;
};

static_assert(sizeof(struct tsqp_tensor_desc) == 96, "tensor descriptor");
static_assert(offsetof(struct tsqp_tensor_desc, shape) == 24, "layout");

enum tsqp_dtype {
    TSQP_FLOAT32 = 1,
    TSQP_FLOAT16,
    TSQP_BFLOAT16,
    TSQP_FLOAT64,
    TSQP_INT8,
    TSQP_INT16,
    TSQP_INT32,
    TSQP_INT64,
    TSQP_UINT8,
    TSQP_UINT16,
    TSQP_UINT32,
    TSQP_BOOL,
    TSQP_FLOAT8_E4M3FN,
    TSQP_FLOAT8_E5M2,
    TSQP_DTYPE_END
};

#endif
