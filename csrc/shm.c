/* shm.c: the life of a segment: exclusive create, reserve, initialise, publish the tag last; attach with
 * every field checked; unlink by the creator only. */
#include "access.h"
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

#define PATH_BYTES 512
#ifdef __linux__
#define DEFAULT_DIRECTORY "/dev/shm"
#else
#define DEFAULT_DIRECTORY "/tmp" /* a mapped file: macOS has no shared-memory file system */
#endif

const char *tsqp_shm_directory(void) {
    const char *directory = getenv("TSQP_SHM_DIR");
    return directory && *directory ? directory : DEFAULT_DIRECTORY;
}

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

/* ---- names ---- */

static bool name_is_valid(const char *name) {
    size_t length = strlen(name);
    if (length < 4 || length >= TSQP_NAME_BYTES || strncmp(name, "tsqp", 4) != 0)
        return false;
    return strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") == length;
}

static int path_of(const char *name, char path[PATH_BYTES]) {
    if (!name_is_valid(name))
        return TSQP_BAD_NAME;
    int n = snprintf(path, PATH_BYTES, "%s/%s", tsqp_shm_directory(), name);
    return n > 0 && n < PATH_BYTES ? TSQP_OK : TSQP_BAD_NAME;
}

static int random_bytes(void *out, size_t nbytes) {
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return TSQP_ERRNO;
    ssize_t n = read(fd, out, nbytes);
    close(fd);
    return n == (ssize_t)nbytes ? TSQP_OK : TSQP_ERRNO;
}

/* ---- locks: the kernel's word on who lives ---- */

#ifdef F_OFD_SETLK
static bool lock_end(int fd, unsigned end) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = end, .l_len = 1};
    return fcntl(fd, F_OFD_SETLK, &lock) == 0;
}

/* 1 held by somebody else, 0 free, -1 no locks here */
static int end_locked(int fd, unsigned end) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = end, .l_len = 1};
    if (fcntl(fd, F_OFD_GETLK, &lock) != 0)
        return -1;
    return lock.l_type == F_UNLCK ? 0 : 1;
}
#else
static bool lock_end(int fd, unsigned end) {
    (void)fd, (void)end;
    return false;
}
static int end_locked(int fd, unsigned end) {
    (void)fd, (void)end;
    return -1;
}
#endif

/* A descriptor that holds the lock of `end`, or -1. It is not the one that was mapped: a mapping keeps the
 * open file description it was made from, and with it that description's locks, alive in every forked child;
 * this one's are gone with the last copy of the descriptor, and a forked child closes its copy. */
static int open_locked(const char *path, int mapped_fd, unsigned end) {
    struct stat mapped, opened;
    if (end_locked(mapped_fd, end) != 0)
        return -1;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -1;
    bool same = fstat(mapped_fd, &mapped) == 0 && fstat(fd, &opened) == 0 && mapped.st_dev == opened.st_dev &&
                mapped.st_ino == opened.st_ino;
    if (same && lock_end(fd, end))
        return fd;
    close(fd);
    return -1;
}

/* ---- create ---- */

static int code_of_errno(int error) {
    switch (error) {
    case ENOENT:
        return TSQP_NOT_FOUND;
    case EEXIST:
        return TSQP_EXISTS;
    case EACCES:
    case EPERM:
        return TSQP_PERMISSION;
    case ENOSPC:
    case EDQUOT:
        return TSQP_FULL;
    default:
        return TSQP_ERRNO;
    }
}

static int reserve(int fd, uint64_t nbytes) {
#ifdef __linux__
    int error;
    do
        error = posix_fallocate(fd, 0, (off_t)nbytes);
    while (error == EINTR);
    if (error == 0)
        return TSQP_OK;
    if (error != EINVAL && error != ENODEV && error != EOPNOTSUPP) {
        errno = error;
        return code_of_errno(error);
    }
#endif
    return ftruncate(fd, (off_t)nbytes) == 0 ? TSQP_OK : code_of_errno(errno);
}

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

static int create_named(const struct tsqp_geometry *geometry, const char *name, struct tsqp_segment **out) {
    char path[PATH_BYTES];
    int rc = path_of(name, path);
    if (rc)
        return rc;
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return errno == ENOENT ? TSQP_ERRNO : code_of_errno(errno);
    int lock_fd = open_locked(path, fd, 0);
    struct tsqp_segment *segment = segment_new(geometry, 0, name);
    rc = segment ? reserve(fd, segment->length) : TSQP_NO_MEMORY;
    if (rc == TSQP_OK)
        rc = random_bytes(segment->session, sizeof segment->session);
    if (rc == TSQP_OK)
        rc = map_segment(segment, fd);
    if (rc != TSQP_OK) {
        int error = errno;
        unlink(path);
        if (lock_fd >= 0)
            close(lock_fd);
        close(fd);
        free(segment);
        errno = error;
        return rc;
    }
    close(fd);
    keep_lock(segment, lock_fd);
    initialise(segment);
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
        int rc = random_bytes(id, sizeof id);
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
    int lock_fd = rc == TSQP_OK ? open_locked(path, fd, 1) : -1;
    if (rc == TSQP_OK && lock_fd < 0 && end_locked(fd, 1) == 1)
        rc = TSQP_ATTACHED;
    if (rc != TSQP_OK)
        munmap(segment->base, segment->length);
    else
        keep_lock(segment, lock_fd);
    return rc;
}

int tsqp_segment_attach(const struct tsqp_geometry *geometry, const char *name, const uint64_t session[2],
                        struct tsqp_segment **out) {
    if (tsqp_segment_bytes(geometry) == 0)
        return TSQP_BAD_GEOMETRY;
    char path[PATH_BYTES];
    int rc = path_of(name, path);
    if (rc)
        return rc;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return code_of_errno(errno);
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
    char path[PATH_BYTES];
    /* A forked child holds a copy of this struct: the file is not its to remove. */
    if (segment->unlinked || segment->creator_pid != getpid())
        return TSQP_OK;
    segment->unlinked = true;
    if (path_of(segment->name, path) != TSQP_OK || (unlink(path) != 0 && errno != ENOENT))
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
    return end_locked(segment->fd, peer);
}

/* ---- owners, for the reaper ---- */

int tsqp_process_start(uint64_t pid, uint64_t *start) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%llu/stat", (unsigned long long)pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return TSQP_NOT_FOUND;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    /* The command name may hold spaces and brackets; the fields start after its last bracket. */
    char *field = strrchr(text, ')');
    for (int i = 2; field && i < 22; i++)
        field = strchr(field + 1, ' ');
    if (!field)
        return TSQP_NOT_FOUND;
    *start = strtoull(field, NULL, 10);
    return TSQP_OK;
}

uint64_t tsqp_pid_namespace(void) {
    struct stat st;
    return stat("/proc/self/ns/pid", &st) == 0 ? (uint64_t)st.st_ino : 0;
}

int tsqp_segment_owner(const char *name, struct tsqp_owner *out) {
    char path[PATH_BYTES];
    struct tsqp_segment_header header;
    struct stat st;
    int rc = path_of(name, path);
    if (rc)
        return rc;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return code_of_errno(errno);
    ssize_t n = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) ? pread(fd, &header, sizeof header, 0) : -1;
    bool locked = end_locked(fd, 0) == 1;
    close(fd);
    if (n != (ssize_t)sizeof header || header.tag != TSQP_SEGMENT_TAG)
        return TSQP_BAD_MAGIC;
    *out = (struct tsqp_owner){header.owner_pid, header.owner_start, header.owner_pidns, (uint64_t)st.st_size,
                               locked};
    return TSQP_OK;
}
