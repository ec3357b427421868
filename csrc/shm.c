/* shm.c: the life of a segment: create without a name, reserve, initialise, name it last; attach with every
 * field checked; unlink by the creator only. */
#include "access.h"
#include "file.h"
#include "segment.h"
#include "tsqp.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- geometry ---- */

static uint64_t round_up(uint64_t value, uint64_t to) {
    return (value + to - 1) / to * to;
}

uint64_t tsqp_slot_stride(const struct tsqp_geometry *g) {
    return round_up(g->max_chunk_bytes, TSQP_PAGE);
}

uint64_t tsqp_entries_offset(const struct tsqp_geometry *g, unsigned ring) {
    return TSQP_PAGE + ring * round_up(g->max_chunks * TSQP_LINE, TSQP_PAGE);
}

uint64_t tsqp_slots_offset(const struct tsqp_geometry *g, unsigned ring) {
    return tsqp_entries_offset(g, (unsigned)g->ring_count) + ring * g->max_chunks * tsqp_slot_stride(g);
}

uint64_t tsqp_segment_bytes(const struct tsqp_geometry *g) {
    if (g->max_chunk_bytes < TSQP_LINE || g->max_chunk_bytes > TSQP_MAX_CHUNK_BYTES || g->max_chunks < 1 ||
        g->max_chunks > TSQP_MAX_CHUNKS || g->ring_count < 1 || g->ring_count > TSQP_MAX_RINGS)
        return 0;
    /* At most 2 * 2^10 * 2^40 and a few pages: far below 2^63. */
    return tsqp_slots_offset(g, (unsigned)g->ring_count);
}

/* ---- create ---- */

static struct tsqp_segment *segment_new(const struct tsqp_geometry *geometry, unsigned end,
                                        const char *name) {
    struct tsqp_segment *segment = calloc(1, sizeof *segment);
    if (!segment)
        return NULL;
    segment->geometry = *geometry;
    segment->length = tsqp_segment_bytes(geometry);
    segment->end = end;
    segment->fd = -1;
    segment->creator_pid = end == 0 ? getpid() : -1;
    segment->unlinked = end != 0;
    atomic_init(&segment->references, 1);
    snprintf(segment->name, sizeof segment->name, "%s", name);
    return segment;
}

static int map_segment(struct tsqp_segment *segment, int fd) {
    void *base = mmap(NULL, segment->length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        return errno == ENOMEM ? TSQP_NO_MEMORY : TSQP_ERRNO;
    segment->base = base;
    return TSQP_OK;
}

/* From here on `lock_fd` belongs to the segment, and the peer can tell whether this end lives. */
static void keep_lock(struct tsqp_segment *segment, int lock_fd) {
    segment->fd = lock_fd;
    tsqp_store_release(&tsqp_header(segment)->ends[segment->end].attached, lock_fd >= 0 ? 2 : 1);
}

static void initialise(struct tsqp_segment *segment) {
    struct tsqp_segment_header *header = tsqp_header(segment);
    uint64_t start = 0;
    tsqp_process_start((uint64_t)getpid(), &start);
    tsqp_store_relaxed(&header->session[0], segment->session[0]);
    tsqp_store_relaxed(&header->session[1], segment->session[1]);
    tsqp_store_relaxed(&header->max_chunk_bytes, segment->geometry.max_chunk_bytes);
    tsqp_store_relaxed(&header->max_chunks, segment->geometry.max_chunks);
    tsqp_store_relaxed(&header->ring_count, segment->geometry.ring_count);
    tsqp_store_relaxed(&header->segment_bytes, segment->length);
    tsqp_store_relaxed(&header->owner_pid, (uint64_t)getpid());
    tsqp_store_relaxed(&header->owner_start, start);
    tsqp_store_relaxed(&header->owner_pidns, tsqp_pid_namespace());
    /* SYNC: pairs with the acquire in check_header: whoever sees the tag sees all of the above. */
    tsqp_store_release(&header->tag, TSQP_SEGMENT_TAG);
}

/* Reserves, maps and initialises the segment in the empty file `fd`. */
static int fill(struct tsqp_segment *segment, int fd) {
    int rc = tsqp_file_reserve(fd, segment->length);
    if (rc == TSQP_OK)
        rc = tsqp_random_bytes(segment->session, sizeof segment->session);
    if (rc == TSQP_OK)
        rc = map_segment(segment, fd);
    if (rc == TSQP_OK)
        initialise(segment);
    return rc;
}

#define NO_NAMELESS_FILES 1

/* A file without a name until it is a whole segment: a creator that is killed before leaves nothing behind,
 * and nobody ever opens half a segment. */
static int create_nameless(struct tsqp_segment *segment, const char *path) {
#ifdef O_TMPFILE
    int fd = open(tsqp_shm_directory(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno == EMFILE || errno == ENFILE ? TSQP_ERRNO : NO_NAMELESS_FILES;
    int rc = fill(segment, fd);
    if (rc == TSQP_OK) {
        char self[32];
        snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
        if (linkat(AT_FDCWD, self, AT_FDCWD, path, AT_SYMLINK_FOLLOW) != 0) {
            rc = errno == EEXIST ? TSQP_EXISTS : NO_NAMELESS_FILES;
            munmap(segment->base, segment->length);
        }
    }
    int error = errno;
    close(fd);
    errno = error;
    return rc;
#else
    (void)segment, (void)path;
    return NO_NAMELESS_FILES;
#endif
}

/* Where files can't be nameless: the tag, stored last, tells when the segment is whole. */
static int create_in_place(struct tsqp_segment *segment, const char *path) {
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return errno == ENOENT ? TSQP_ERRNO : tsqp_code_of_errno(errno);
    int rc = fill(segment, fd);
    int error = errno;
    if (rc != TSQP_OK)
        unlink(path);
    close(fd);
    errno = error;
    return rc;
}

/* Takes this end's lock, and maps the file anew: a mapping made before the file had its name would be shown
 * without one (in /proc/PID/maps, by lsof). */
static int adopt_name(struct tsqp_segment *segment, const char *path) {
    void *nameless = segment->base;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    int lock_fd = -1;
    int rc = fd < 0 ? tsqp_code_of_errno(errno) : tsqp_file_open_locked(path, fd, 0, &lock_fd);
    if (rc == TSQP_OK)
        rc = map_segment(segment, fd);
    if (rc == TSQP_OK)
        keep_lock(segment, lock_fd);
    int error = errno;
    munmap(nameless, segment->length);
    if (rc != TSQP_OK) {
        unlink(path);
        if (lock_fd >= 0)
            close(lock_fd);
    }
    if (fd >= 0)
        close(fd);
    errno = error;
    return rc;
}

static int create_named(const struct tsqp_geometry *geometry, const char *name, struct tsqp_segment **out) {
    char path[TSQP_PATH_BYTES];
    struct stat st;
    int rc = tsqp_file_path(name, path);
    if (rc)
        return rc;
    if (lstat(path, &st) == 0)
        return TSQP_EXISTS; /* before anything is reserved */
    struct tsqp_segment *segment = segment_new(geometry, 0, name);
    if (!segment)
        return TSQP_NO_MEMORY;
    rc = create_nameless(segment, path);
    if (rc == NO_NAMELESS_FILES)
        rc = create_in_place(segment, path);
    if (rc == TSQP_OK)
        rc = adopt_name(segment, path);
    if (rc != TSQP_OK) {
        int error = errno;
        free(segment);
        errno = error;
        return rc;
    }
    *out = segment;
    return TSQP_OK;
}

int tsqp_segment_create(const struct tsqp_geometry *geometry, const char *name, struct tsqp_segment **out) {
    if (tsqp_segment_bytes(geometry) == 0)
        return TSQP_BAD_GEOMETRY;
    if (name)
        return create_named(geometry, name, out);
    for (;;) {
        uint64_t id[2];
        char random_name[TSQP_NAME_BYTES];
        int rc = tsqp_random_bytes(id, sizeof id);
        if (rc)
            return rc;
        snprintf(random_name, sizeof random_name, "tsqp-%016llx%016llx", (unsigned long long)id[0],
                 (unsigned long long)id[1]);
        rc = create_named(geometry, random_name, out);
        if (rc != TSQP_EXISTS)
            return rc;
    }
}

/* ---- attach ---- */

static int check_header(const struct tsqp_segment *segment, const uint64_t session[2]) {
    struct tsqp_segment_header *header = tsqp_header(segment);
    const struct tsqp_geometry *want = &segment->geometry;
    /* SYNC: pairs with the release in initialise. Each word is read once. */
    uint64_t tag = tsqp_load_acquire(&header->tag);
    if ((tag & ~(UINT64_C(0xff) << 56)) != TSQP_SEGMENT_MAGIC)
        return TSQP_BAD_MAGIC;
    if (tag >> 56 != TSQP_SEGMENT_VERSION)
        return TSQP_BAD_VERSION;
    if (tsqp_load_relaxed(&header->max_chunk_bytes) != want->max_chunk_bytes ||
        tsqp_load_relaxed(&header->max_chunks) != want->max_chunks ||
        tsqp_load_relaxed(&header->ring_count) != want->ring_count ||
        tsqp_load_relaxed(&header->segment_bytes) != segment->length)
        return TSQP_BAD_GEOMETRY;
    if (session && (tsqp_load_relaxed(&header->session[0]) != session[0] ||
                    tsqp_load_relaxed(&header->session[1]) != session[1]))
        return TSQP_BAD_SESSION;
    return TSQP_OK;
}

static int attach_fd(struct tsqp_segment *segment, const char *path, int fd, const uint64_t session[2]) {
    struct stat st;
    /* Inside Gramine the segment is a character device of unknown size: there the handshake's length is all
     * there is. */
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size < segment->length)
        return TSQP_TRUNCATED;
    int rc = map_segment(segment, fd);
    if (rc)
        return rc;
    rc = check_header(segment, session);
    int lock_fd = -1;
    if (rc == TSQP_OK)
        rc = tsqp_file_open_locked(path, fd, 1, &lock_fd);
    if (rc != TSQP_OK) {
        int error = errno;
        munmap(segment->base, segment->length);
        errno = error;
    } else {
        keep_lock(segment, lock_fd);
    }
    return rc;
}

int tsqp_segment_attach(const struct tsqp_geometry *geometry, const char *name, const uint64_t session[2],
                        struct tsqp_segment **out) {
    if (tsqp_segment_bytes(geometry) == 0)
        return TSQP_BAD_GEOMETRY;
    char path[TSQP_PATH_BYTES];
    int rc = tsqp_file_path(name, path);
    if (rc)
        return rc;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return tsqp_code_of_errno(errno);
    struct tsqp_segment *segment = segment_new(geometry, 1, name);
    rc = segment ? attach_fd(segment, path, fd, session) : TSQP_NO_MEMORY;
    int error = errno;
    close(fd);
    if (rc != TSQP_OK) {
        free(segment);
        errno = error;
        return rc;
    }
    segment->session[0] = tsqp_load_relaxed(&tsqp_header(segment)->session[0]);
    segment->session[1] = tsqp_load_relaxed(&tsqp_header(segment)->session[1]);
    *out = segment;
    return TSQP_OK;
}

/* ---- life ---- */

void tsqp_segment_retain(struct tsqp_segment *segment) {
    atomic_fetch_add_explicit(&segment->references, 1, memory_order_relaxed);
}

void tsqp_segment_release(struct tsqp_segment *segment) {
    if (!segment || atomic_fetch_sub_explicit(&segment->references, 1, memory_order_acq_rel) != 1)
        return;
    tsqp_segment_unlink(segment);
    munmap(segment->base, segment->length);
    if (segment->fd >= 0)
        close(segment->fd);
    free(segment);
}

int tsqp_segment_unlink(struct tsqp_segment *segment) {
    char path[TSQP_PATH_BYTES];
    /* A forked child holds a copy of this struct: the file is not its to remove. */
    if (segment->unlinked || segment->creator_pid != getpid())
        return TSQP_OK;
    segment->unlinked = true;
    if (tsqp_file_path(segment->name, path) != TSQP_OK || (unlink(path) != 0 && errno != ENOENT))
        return TSQP_ERRNO;
    return TSQP_OK;
}

void tsqp_segment_forget_after_fork(struct tsqp_segment *segment) {
    if (segment->fd >= 0)
        close(segment->fd);
    segment->fd = -1;
}

const char *tsqp_segment_name(const struct tsqp_segment *segment) {
    return segment->name;
}

void tsqp_segment_session(const struct tsqp_segment *segment, uint64_t out[2]) {
    out[0] = segment->session[0];
    out[1] = segment->session[1];
}

uint64_t tsqp_segment_length(const struct tsqp_segment *segment) {
    return segment->length;
}

void *tsqp_segment_address(const struct tsqp_segment *segment) {
    return segment->base;
}

void tsqp_segment_close_end(struct tsqp_segment *segment) {
    /* SYNC: pairs with the acquire in tsqp_segment_peer_closed: what we published before is seen before. */
    tsqp_store_seq_cst(&tsqp_header(segment)->ends[segment->end].closed, 1);
}

bool tsqp_segment_peer_closed(struct tsqp_segment *segment) {
    return tsqp_load_acquire(&tsqp_header(segment)->ends[1 - segment->end].closed) != 0;
}

void tsqp_segment_beat(struct tsqp_segment *segment) {
    uint64_t *word = &tsqp_header(segment)->ends[segment->end].heartbeat;
    tsqp_store_relaxed(word, tsqp_load_relaxed(word) + 1);
}

uint64_t tsqp_segment_peer_heartbeat(struct tsqp_segment *segment) {
    return tsqp_load_relaxed(&tsqp_header(segment)->ends[1 - segment->end].heartbeat);
}

int tsqp_segment_peer_locked(struct tsqp_segment *segment) {
    unsigned peer = 1 - segment->end;
    if (segment->fd < 0 || tsqp_load_acquire(&tsqp_header(segment)->ends[peer].attached) != 2)
        return -1;
    return tsqp_file_end_locked(segment->fd, peer);
}
