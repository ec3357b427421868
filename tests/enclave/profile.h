/* profile.h: what a process finds inside Gramine, enforced natively; see README.md beside it. */
#ifndef TSQP_TESTS_ENCLAVE_PROFILE_H
#define TSQP_TESTS_ENCLAVE_PROFILE_H

#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Files opened in /dev/shm get descriptors in this range, so that the filter itself, which can't look behind
 * a number, knows them: no system call on them slips through. */
#define SEGMENT_FD_FIRST 800
#define SEGMENT_FD_LAST 899

/* When a rule applies, by one argument of the system call. */
enum test { ALWAYS, SEGMENT_FD, OTHER_PID, LACKS_BITS };

/* What happens then: the process is killed by the filter, or the supervisor answers: with `error`, or as one
 * of its functions decides. */
enum answer {
    KILL,
    REFUSE,
    OPEN,
    OPENAT,
    TWO_PATHS,
    EXECUTE,
    FSTAT,
    FSTATAT,
    CONTROL,
    DUPLICATE,
    SHARED_FUTEX,
    SOCKET,
    BIND,
    CONNECT,
    SENDMSG
};

struct rule {
    const char *name;
    int nr;
    enum test test;
    unsigned argument;
    uint32_t bits;
    enum answer answer;
    int error;
};

extern const struct rule rules[];
extern const size_t rule_count;

/* filter.c: installs the filter of `rules` in the calling thread; the descriptor its supervisor listens on,
 * or -1. */
int install_filter(void);
/* The rule that `call` fell under. */
const struct rule *rule_of(const struct seccomp_data *call);

/* view.c: a private view of the file system: /tmp, /dev, /proc, no names. 0, or -1 after saying why. */
struct view {
    const char *shm;          /* what is seen as /dev/shm */
    const char *const *keeps; /* directories below /tmp that stay visible */
    size_t keep_count;
};
int enter_view(const struct view *view);

/* supervisor.c */
struct supervisor {
    int listener;
    pid_t pid; /* of the supervised process */
    int pidfd;
    int executed;
    char (*bound)[108]; /* Unix sockets bound inside */
    size_t bound_count;
    uint64_t *refusals; /* by rule */
};
/* Answers one notification. */
void answer_one(struct supervisor *supervisor);

#endif
