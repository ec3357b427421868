/* segment.h: what shm.c and ring.c share about a mapping; private to the core. */
#ifndef TSQP_SEGMENT_H
#define TSQP_SEGMENT_H

#include "tsqp.h"

#include <stdatomic.h>
#include <sys/types.h>

struct tsqp_segment {
    uint8_t *base;
    uint64_t length;
    struct tsqp_geometry geometry; /* private copy: never read back from shared memory */
    uint64_t session[2];
    atomic_uint references;
    int fd; /* holds this end's lock; -1 where there are none */
    unsigned end;
    bool unlinked;
    pid_t creator_pid;
    char name[TSQP_NAME_BYTES];
};

uint64_t tsqp_slot_stride(const struct tsqp_geometry *geometry);
uint64_t tsqp_entries_offset(const struct tsqp_geometry *geometry, unsigned ring);
uint64_t tsqp_slots_offset(const struct tsqp_geometry *geometry, unsigned ring);

static inline struct tsqp_segment_header *tsqp_header(const struct tsqp_segment *segment) {
    return (struct tsqp_segment_header *)segment->base;
}

#endif
