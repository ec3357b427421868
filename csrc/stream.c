/* stream.c: the payload of one message through a slot, with both ends at work on it at the same time.
 *
 * A long message is published once its first part is in the slot; from then on the producer marks how far it
 * got and the consumer copies what is there. The two copies overlap, and the consumer finds the lines while
 * they are still near.
 */
#include "access.h"
#include "tsqp.h"

/* Shorter messages are published whole: another look at the flag line costs more than it saves. */
#define CUT_FROM_BYTES (UINT64_C(32) << 10)
/* A step is an eighth of the message within these limits: each mark takes the flag line from the consumer. */
#define MIN_STEP_BYTES (UINT64_C(16) << 10)
#define MAX_STEP_BYTES (UINT64_C(128) << 10)

static uint64_t step_bytes(uint64_t total) {
    uint64_t step = total / 8 / TSQP_PAGE * TSQP_PAGE;
    return step < MIN_STEP_BYTES ? MIN_STEP_BYTES : step > MAX_STEP_BYTES ? MAX_STEP_BYTES : step;
}

int tsqp_outflow_mark(struct tsqp_outflow *flow, uint64_t upto) {
    int rc = TSQP_OK;
    if (upto < flow->total && (flow->total < CUT_FROM_BYTES || upto < flow->marked + step_bytes(flow->total)))
        return TSQP_OK;
    if (flow->marked == 0)
        rc = tsqp_ring_publish_part(flow->ring, flow->slot, flow->total, upto);
    else if (upto > flow->marked)
        rc = tsqp_ring_fill(flow->ring, upto);
    flow->marked = upto;
    return rc;
}

void tsqp_outflow_copy(struct tsqp_outflow *flow, uint64_t offset, const void *src, uint64_t nbytes) {
    uint64_t step = flow->total < CUT_FROM_BYTES ? nbytes : step_bytes(flow->total);
    for (uint64_t at = 0; at < nbytes;) {
        uint64_t part = nbytes - at < step ? nbytes - at : step;
        tsqp_copy_to_shared(flow->slot->data + offset + at, (const uint8_t *)src + at, part);
        at += part;
        tsqp_outflow_mark(flow, offset + at < flow->total ? offset + at : flow->total - 1);
    }
}

int tsqp_inflow_copy(struct tsqp_ring *ring, struct tsqp_slot *slot, uint64_t offset, void *dst,
                     uint64_t nbytes, uint64_t *done) {
    while (*done < nbytes) {
        uint64_t there = slot->filled > offset ? slot->filled - offset : 0;
        uint64_t upto = there < nbytes ? there / TSQP_LINE * TSQP_LINE : nbytes;
        if (upto > *done) {
            tsqp_copy_from_shared((uint8_t *)dst + *done, slot->data + offset + *done, upto - *done);
            *done = upto;
            continue;
        }
        uint64_t next = offset + *done + TSQP_LINE;
        int rc = tsqp_ring_follow(ring, slot, next < slot->nbytes ? next : slot->nbytes);
        if (rc != TSQP_OK)
            return rc;
    }
    return TSQP_OK;
}
