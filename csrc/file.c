/* file.c: a segment's file: its name, its space, the locks of its two ends, and who owns it. */
#include "file.h"
#include "tsqp.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __linux__
#define DEFAULT_DIRECTORY "/dev/shm"
#else
#define DEFAULT_DIRECTORY "/tmp" /* a mapped file: macOS has no shared-memory file system */
#endif

const char *tsqp_shm_directory(void) {
    const char *directory = getenv("TSQP_SHM_DIR");
    return directory && *directory ? directory : DEFAULT_DIRECTORY;
}

/* ---- names ---- */

static bool name_is_valid(const char *name) {
    size_t length = strlen(name);
    if (length < 4 || length >= TSQP_NAME_BYTES || strncmp(name, "tsqp", 4) != 0)
        return false;
    return strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") == length;
}

int tsqp_file_path(const char *name, char path[TSQP_PATH_BYTES]) {
    if (!name_is_valid(name))
        return TSQP_BAD_NAME;
    int n = snprintf(path, TSQP_PATH_BYTES, "%s/%s", tsqp_shm_directory(), name);
    return n > 0 && n < TSQP_PATH_BYTES ? TSQP_OK : TSQP_BAD_NAME;
}

int tsqp_random_bytes(void *out, size_t nbytes) {
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return TSQP_ERRNO;
    ssize_t n = read(fd, out, nbytes);
    close(fd);
    return n == (ssize_t)nbytes ? TSQP_OK : TSQP_ERRNO;
}

int tsqp_code_of_errno(int error) {
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

/* ---- locks: the kernel's word on who lives ---- */

#ifdef F_OFD_SETLK
/* 1 taken, 0 held by somebody else, -1 no locks here */
static int lock_end(int fd, unsigned end) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = end, .l_len = 1};
    if (fcntl(fd, F_OFD_SETLK, &lock) == 0)
        return 1;
    return errno == EAGAIN || errno == EACCES ? 0 : -1;
}

/* 1 held by somebody else, 0 free, -1 no locks here */
int tsqp_file_end_locked(int fd, unsigned end) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = end, .l_len = 1};
    if (fcntl(fd, F_OFD_GETLK, &lock) != 0)
        return -1;
    return lock.l_type == F_UNLCK ? 0 : 1;
}
#else
static int lock_end(int fd, unsigned end) {
    (void)fd, (void)end;
    return -1;
}
int tsqp_file_end_locked(int fd, unsigned end) {
    (void)fd, (void)end;
    return -1;
}
#endif

/* Opens the file a second time and takes the lock of `end`: *lock_fd is the descriptor that holds it, or -1
 * where there are no locks. It is not the one that was mapped: a mapping keeps the open file description it
 * was made from, and with it that description's locks, alive in every forked child; this one's are gone with
 * the last copy of the descriptor, and a forked child closes its copy. Of several that try at once the kernel
 * lets one win. */
int tsqp_file_open_locked(const char *path, int mapped_fd, unsigned end, int *lock_fd) {
    struct stat mapped, opened;
    *lock_fd = -1;
    int held = tsqp_file_end_locked(mapped_fd, end);
    if (held != 0)
        return held == 1 ? TSQP_ATTACHED : TSQP_OK;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return tsqp_code_of_errno(errno);
    bool same = fstat(mapped_fd, &mapped) == 0 && fstat(fd, &opened) == 0 && mapped.st_dev == opened.st_dev &&
                mapped.st_ino == opened.st_ino;
    int taken = same ? lock_end(fd, end) : 0;
    if (taken == 1) {
        *lock_fd = fd;
        return TSQP_OK;
    }
    close(fd);
    if (!same)
        return TSQP_NOT_FOUND; /* its name was given to another file meanwhile */
    return taken == 0 ? TSQP_ATTACHED : TSQP_OK;
}

int tsqp_file_reserve(int fd, uint64_t nbytes) {
#ifdef __linux__
    int error;
    do
        error = posix_fallocate(fd, 0, (off_t)nbytes);
    while (error == EINTR);
    if (error == 0)
        return TSQP_OK;
    if (error != EINVAL && error != ENODEV && error != EOPNOTSUPP) {
        errno = error;
        return tsqp_code_of_errno(error);
    }
#endif
    return ftruncate(fd, (off_t)nbytes) == 0 ? TSQP_OK : tsqp_code_of_errno(errno);
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
    char path[TSQP_PATH_BYTES];
    struct tsqp_segment_header header;
    struct stat st;
    int rc = tsqp_file_path(name, path);
    if (rc)
        return rc;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return tsqp_code_of_errno(errno);
    ssize_t n = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) ? pread(fd, &header, sizeof header, 0) : -1;
    bool locked = tsqp_file_end_locked(fd, 0) == 1;
    close(fd);
    if (n != (ssize_t)sizeof header || header.tag != TSQP_SEGMENT_TAG)
        return TSQP_BAD_MAGIC;
    *out = (struct tsqp_owner){header.owner_pid, header.owner_start, header.owner_pidns, (uint64_t)st.st_size,
                               locked};
    return TSQP_OK;
}
