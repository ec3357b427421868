/* scratch.h: a directory of the test's own for segments, and both ends of a segment in one process. */
#ifndef TSQP_SCRATCH_H
#define TSQP_SCRATCH_H

#include "check.h"
#include "segment.h"
#include "tsqp.h"

#include <dirent.h>
#include <string.h>
#include <unistd.h>

static char scratch[128];

/* Any file system does: /dev/shm may be too small or missing where tests run. */
static inline void scratch_make(void) {
    snprintf(scratch, sizeof scratch, "/tmp/tsqp-ctest-XXXXXX");
    if (!mkdtemp(scratch) || setenv("TSQP_SHM_DIR", scratch, 1) != 0) {
        perror(scratch);
        exit(2);
    }
}

static inline int scratch_files(void) {
    int count = 0;
    DIR *directory = opendir(scratch);
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        count += entry->d_name[0] != '.';
    if (directory)
        closedir(directory);
    return count;
}

static inline void scratch_path(char *path, size_t nbytes, const char *name) {
    snprintf(path, nbytes, "%s/%s", scratch, name);
}

/* Removes what failed tests left; a clean run leaves nothing. */
static inline void scratch_remove(void) {
    DIR *directory = opendir(scratch);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", scratch, entry->d_name);
        if (entry->d_name[0] != '.')
            unlink(path);
    }
    if (directory)
        closedir(directory);
    rmdir(scratch);
}

struct pair {
    struct tsqp_segment *creator, *attacher; /* two mappings of one file */
    struct tsqp_ring *producer, *consumer;   /* of ring 0 */
};

static inline struct pair pair_open(uint64_t chunk_bytes, uint64_t chunks) {
    struct tsqp_geometry geometry = {chunk_bytes, chunks, 2};
    struct pair pair;
    CHECK_EQ(tsqp_segment_create(&geometry, NULL, &pair.creator), TSQP_OK);
    CHECK_EQ(tsqp_segment_attach(&geometry, tsqp_segment_name(pair.creator), NULL, &pair.attacher), TSQP_OK);
    CHECK_EQ(tsqp_ring_open(pair.creator, 0, TSQP_PRODUCER, &pair.producer), TSQP_OK);
    CHECK_EQ(tsqp_ring_open(pair.attacher, 0, TSQP_CONSUMER, &pair.consumer), TSQP_OK);
    return pair;
}

static inline void pair_close(struct pair *pair) {
    tsqp_ring_close(pair->producer);
    tsqp_ring_close(pair->consumer);
    tsqp_segment_release(pair->attacher);
    tsqp_segment_release(pair->creator);
}

static inline struct tsqp_entry *pair_entry(const struct pair *pair, uint64_t i) {
    uint64_t offset = tsqp_entries_offset(&pair->creator->geometry, 0);
    return (struct tsqp_entry *)(pair->creator->base + offset) + i;
}

#endif
