/* supervisor.c: answers the system calls that the filter hands over, looking behind pointers and descriptors.
 *
 * What is looked at can change before the kernel reads it again (SECCOMP_USER_NOTIF_FLAG_CONTINUE): this is
 * good enough to hold a program to its limits, and would not hold an attacker. */
#define _GNU_SOURCE
#include "profile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096
#define MOST_BOUND 64
/* Answers of the functions below, beside an errno. */
#define LET_IT_GO 0
#define ANSWERED (-1)

static bool copy_in(pid_t pid, uint64_t address, void *out, size_t nbytes) {
    struct iovec here = {out, nbytes}, there = {(void *)(uintptr_t)address, nbytes};
    return process_vm_readv(pid, &here, 1, &there, 1, 0) == (ssize_t)nbytes;
}

static bool copy_out(pid_t pid, uint64_t address, const void *from, size_t nbytes) {
    struct iovec here = {(void *)from, nbytes}, there = {(void *)(uintptr_t)address, nbytes};
    return process_vm_writev(pid, &here, 1, &there, 1, 0) == (ssize_t)nbytes;
}

/* A string that may end right before a page that is not mapped. */
static bool copy_string(pid_t pid, uint64_t address, char out[PAGE]) {
    size_t first = PAGE - address % PAGE;
    if (!copy_in(pid, address, out, first))
        return false;
    if (memchr(out, 0, first))
        return true;
    return first < PAGE && copy_in(pid, address + first, out + first, PAGE - first) &&
           memchr(out + first, 0, PAGE - first);
}

/* ---- paths ---- */

/* The absolute path that `path` at `dirfd` means, without `.` and `..`; symbolic links stay as they are. */
static bool absolute(pid_t pid, int dirfd, const char *path, char out[2 * PAGE]) {
    char link[64], base[PAGE] = "", *part, *save = NULL, joined[2 * PAGE];
    if (path[0] != '/') {
        if (dirfd == AT_FDCWD)
            snprintf(link, sizeof link, "/proc/%d/cwd", pid);
        else
            snprintf(link, sizeof link, "/proc/%d/fd/%d", pid, dirfd);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0)
            return false;
        base[n] = 0;
    }
    snprintf(joined, sizeof joined, "%s/%s", base, path);
    size_t length = 0;
    for (part = strtok_r(joined, "/", &save); part; part = strtok_r(NULL, "/", &save)) {
        if (strcmp(part, "..") == 0) {
            while (length > 0 && out[--length] != '/')
                ;
        } else if (strcmp(part, ".") != 0) {
            length += (size_t)snprintf(out + length, 2 * PAGE - length, "/%s", part);
        }
    }
    out[length] = 0;
    return true;
}

static bool is_below(const char *path, const char *directory) {
    size_t n = strlen(directory);
    return strncmp(path, directory, n) == 0 && (path[n] == 0 || path[n] == '/');
}

static bool is_hidden(const char *path) {
    return strcmp(path, "/proc/uptime") == 0 || is_below(path, "/proc/sys/kernel/random");
}

/* ---- files ---- */

static int free_segment_fd(pid_t pid) {
    char link[64];
    struct stat st;
    for (int fd = SEGMENT_FD_FIRST; fd <= SEGMENT_FD_LAST; fd++) {
        snprintf(link, sizeof link, "/proc/%d/fd/%d", pid, fd);
        if (lstat(link, &st) != 0)
            return fd;
    }
    return -1;
}

/* Answers the call with `mine` (taken over) as a descriptor of the process that the filter knows. */
static int give(struct supervisor *s, const struct seccomp_notif *call, int mine, int flags) {
    int theirs = free_segment_fd(s->pid);
    struct seccomp_notif_addfd add = {
        .id = call->id,
        .flags = SECCOMP_ADDFD_FLAG_SETFD | SECCOMP_ADDFD_FLAG_SEND,
        .srcfd = (uint32_t)mine,
        .newfd = (uint32_t)theirs,
        .newfd_flags = (uint32_t)flags,
    };
    int rc = theirs < 0 ? -1 : ioctl(s->listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
    int error = theirs < 0 ? EMFILE : errno;
    close(mine);
    return rc < 0 ? error : ANSWERED;
}

/* Opens `path` as the process sees it. */
static int open_segment(struct supervisor *s, const struct seccomp_notif *call, const char *path, int flags,
                        int mode) {
    char seen[3 * PAGE];
    if ((flags & O_TMPFILE) == O_TMPFILE)
        return EOPNOTSUPP;
    snprintf(seen, sizeof seen, "/proc/%d/root%s", s->pid, path);
    int mine = open(seen, flags | O_CLOEXEC, mode);
    if (mine < 0)
        return errno;
    return give(s, call, mine, flags & O_CLOEXEC);
}

static int duplicate(struct supervisor *s, const struct seccomp_notif *call, int flags) {
    int mine = (int)syscall(SYS_pidfd_getfd, s->pidfd, (int)call->data.args[0], 0);
    return mine < 0 ? errno : give(s, call, mine, flags);
}

static int answer_open(struct supervisor *s, const struct seccomp_notif *call, int dirfd, unsigned first) {
    const __u64 *args = call->data.args;
    char path[PAGE], full[2 * PAGE];
    if (!copy_string((pid_t)call->pid, args[first], path) || !absolute((pid_t)call->pid, dirfd, path, full))
        return LET_IT_GO; /* the kernel says what is wrong */
    if (is_hidden(full))
        return ENOENT;
    if (!is_below(full, "/dev/shm"))
        return LET_IT_GO;
    return open_segment(s, call, full, (int)args[first + 1], (int)args[first + 2]);
}

static int two_paths(const struct seccomp_notif *call) {
    const __u64 *args = call->data.args;
#ifdef __x86_64__
    bool plain = call->data.nr == SYS_rename || call->data.nr == SYS_link;
#else
    bool plain = false;
#endif
    for (unsigned i = 0; i < 2; i++) {
        char path[PAGE], full[2 * PAGE];
        int dirfd = plain ? AT_FDCWD : (int)args[2 * i];
        if (copy_string((pid_t)call->pid, args[plain ? i : 2 * i + 1], path) &&
            absolute((pid_t)call->pid, dirfd, path, full) && is_below(full, "/dev/shm"))
            return ENOSYS;
    }
    return LET_IT_GO;
}

/* A character device; its size is what it was when it was first looked at. */
static int stat_segment(struct supervisor *s, const struct seccomp_notif *call, unsigned buffer) {
    static struct {
        dev_t dev;
        ino_t ino;
        off_t size;
    } seen[64];
    char link[64];
    struct stat st;
    snprintf(link, sizeof link, "/proc/%d/fd/%d", s->pid, (int)call->data.args[0]);
    if (stat(link, &st) != 0)
        return errno;
    st.st_mode = (st.st_mode & ~(mode_t)S_IFMT) | (S_ISDIR(st.st_mode) ? S_IFDIR : S_IFCHR);
    for (size_t i = 0; i < sizeof seen / sizeof seen[0]; i++) {
        if (seen[i].ino == 0) {
            seen[i].dev = st.st_dev;
            seen[i].ino = st.st_ino;
            seen[i].size = st.st_size;
        }
        if (seen[i].dev == st.st_dev && seen[i].ino == st.st_ino) {
            st.st_size = seen[i].size;
            break;
        }
    }
    if (!copy_out((pid_t)call->pid, call->data.args[buffer], &st, sizeof st))
        return EFAULT;
    struct seccomp_notif_resp done = {.id = call->id};
    ioctl(s->listener, SECCOMP_IOCTL_NOTIF_SEND, &done);
    return ANSWERED;
}

static int stat_at(struct supervisor *s, const struct seccomp_notif *call) {
    char path[PAGE];
    if (!copy_string((pid_t)call->pid, call->data.args[1], path))
        return EFAULT;
    return path[0] ? LET_IT_GO : stat_segment(s, call, 2);
}

static int control(struct supervisor *s, const struct seccomp_notif *call) {
    int command = (int)call->data.args[1];
    if (command == F_DUPFD || command == F_DUPFD_CLOEXEC)
        return duplicate(s, call, command == F_DUPFD ? 0 : O_CLOEXEC);
    bool plain = command == F_GETFD || command == F_SETFD || command == F_GETFL || command == F_SETFL;
    return plain ? LET_IT_GO : EINVAL;
}

/* Within the process a shared futex works (the C library joins threads by one); on a segment it never wakes.
 */
static int shared_futex(const struct seccomp_notif *call) {
    char name[64], line[PAGE + 256];
    snprintf(name, sizeof name, "/proc/%d/maps", (int)call->pid);
    FILE *maps = fopen(name, "r");
    if (!maps)
        return ENOSYS;
    int found = LET_IT_GO;
    while (found == LET_IT_GO && fgets(line, sizeof line, maps)) {
        unsigned long begin, end;
        char rights[8] = "";
        uint64_t word = call->data.args[0];
        if (sscanf(line, "%lx-%lx %7s", &begin, &end, rights) == 3 && word >= begin && word < end)
            found = rights[3] == 's' ? ENOSYS : LET_IT_GO;
    }
    fclose(maps);
    return found;
}

/* ---- sockets ---- */

static int make_socket(const struct seccomp_notif *call) {
    int domain = (int)call->data.args[0], type = (int)call->data.args[1] & 0xf;
    if (domain == AF_UNIX)
        return type == SOCK_STREAM ? LET_IT_GO : ESOCKTNOSUPPORT;
    return domain == AF_INET || domain == AF_INET6 ? LET_IT_GO : EAFNOSUPPORT;
}

/* The path of a Unix socket's address; an empty one for another kind, NULL where it can't be read. */
static const char *unix_path(const struct seccomp_notif *call, struct sockaddr_un *address) {
    size_t nbytes = (size_t)call->data.args[2];
    memset(address, 0, sizeof *address);
    if (nbytes < sizeof(sa_family_t) || nbytes > sizeof(struct sockaddr_storage))
        return NULL;
    if (nbytes > sizeof *address)
        nbytes = sizeof *address;
    if (!copy_in((pid_t)call->pid, call->data.args[1], address, nbytes))
        return NULL;
    if (address->sun_family != AF_UNIX)
        return "";
    if (address->sun_path[0] == 0)
        address->sun_path[0] = '@'; /* an abstract name */
    return address->sun_path;
}

static int bind_socket(struct supervisor *s, const struct seccomp_notif *call) {
    struct sockaddr_un address;
    const char *path = unix_path(call, &address);
    if (path && *path && s->bound_count < MOST_BOUND)
        snprintf(s->bound[s->bound_count++], sizeof s->bound[0], "%.107s", path);
    return LET_IT_GO;
}

static int connect_socket(const struct supervisor *s, const struct seccomp_notif *call) {
    struct sockaddr_un address;
    const char *path = unix_path(call, &address);
    if (!path || !*path)
        return LET_IT_GO;
    for (size_t i = 0; i < s->bound_count; i++)
        if (strcmp(s->bound[i], path) == 0)
            return LET_IT_GO;
    return ECONNREFUSED;
}

/* Descriptors don't travel. */
static int send_message(const struct seccomp_notif *call) {
    struct msghdr message;
    struct cmsghdr first;
    if (!copy_in((pid_t)call->pid, call->data.args[1], &message, sizeof message) ||
        message.msg_controllen < sizeof first ||
        !copy_in((pid_t)call->pid, (uint64_t)(uintptr_t)message.msg_control, &first, sizeof first))
        return LET_IT_GO;
    return first.cmsg_level == SOL_SOCKET && first.cmsg_type == SCM_RIGHTS ? ENOSYS : LET_IT_GO;
}

/* ---- one call ---- */

static int decide(struct supervisor *s, const struct seccomp_notif *call, const struct rule *rule) {
    switch (rule->answer) {
    case OPEN:
        return answer_open(s, call, AT_FDCWD, 0);
    case OPENAT:
        return answer_open(s, call, (int)call->data.args[0], 1);
    case TWO_PATHS:
        return two_paths(call);
    case EXECUTE:
        return s->executed++ == 0 ? LET_IT_GO : EPERM; /* the first is the program's own start */
    case FSTAT:
        return stat_segment(s, call, 1);
    case FSTATAT:
        return stat_at(s, call);
    case CONTROL:
        return control(s, call);
    case DUPLICATE:
        return duplicate(s, call, 0);
    case SHARED_FUTEX:
        return shared_futex(call);
    case SOCKET:
        return make_socket(call);
    case BIND:
        return bind_socket(s, call);
    case CONNECT:
        return connect_socket(s, call);
    case SENDMSG:
        return send_message(call);
    default:
        return rule->error;
    }
}

void answer_one(struct supervisor *s) {
    struct seccomp_notif call = {0};
    if (ioctl(s->listener, SECCOMP_IOCTL_NOTIF_RECV, &call) != 0)
        return; /* it was killed meanwhile */
    const struct rule *rule = rule_of(&call.data);
    int error = rule ? decide(s, &call, rule) : ENOSYS;
    if (error == ANSWERED)
        return;
    struct seccomp_notif_resp answer = {.id = call.id, .error = -error};
    if (error == LET_IT_GO)
        answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    else if (rule)
        s->refusals[rule - rules]++;
    ioctl(s->listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
}
