/* filter.c: the table of rules, and the seccomp filter made of it. */
#define _GNU_SOURCE
#include "profile.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "the enclave profile knows x86-64 and AArch64"
#endif

#define REFUSED(call, error) {#call, SYS_##call, ALWAYS, 0, 0, REFUSE, error}
#define ON_SEGMENT(call, argument, error) {#call, SYS_##call, SEGMENT_FD, argument, 0, REFUSE, error}
#define LOOKED_AT(call, answer) {#call, SYS_##call, ALWAYS, 0, 0, answer, 0}
#define PROBES(call) {#call, SYS_##call, OTHER_PID, 0, 0, KILL, 0}

/* The first rule that applies counts. */
const struct rule rules[] = {
    /* The segment's file can be opened, mapped, closed and unlinked, and that is all. */
    ON_SEGMENT(read, 0, EBADF),
    ON_SEGMENT(write, 0, EBADF),
    ON_SEGMENT(readv, 0, EBADF),
    ON_SEGMENT(writev, 0, EBADF),
    ON_SEGMENT(pread64, 0, ESPIPE),
    ON_SEGMENT(pwrite64, 0, ESPIPE),
    ON_SEGMENT(preadv, 0, ESPIPE),
    ON_SEGMENT(pwritev, 0, ESPIPE),
    ON_SEGMENT(preadv2, 0, ESPIPE),
    ON_SEGMENT(pwritev2, 0, ESPIPE),
    ON_SEGMENT(lseek, 0, ESPIPE),
    ON_SEGMENT(sendfile, 0, EBADF),
    ON_SEGMENT(sendfile, 1, EBADF),
    ON_SEGMENT(copy_file_range, 0, EBADF),
    ON_SEGMENT(copy_file_range, 2, EBADF),
    ON_SEGMENT(splice, 0, EBADF),
    ON_SEGMENT(splice, 2, EBADF),
    ON_SEGMENT(getdents64, 0, EINVAL),
    ON_SEGMENT(fallocate, 0, ENODEV),
    ON_SEGMENT(statx, 0, ENOSYS),
    {"dup", SYS_dup, SEGMENT_FD, 0, 0, DUPLICATE, 0},
    ON_SEGMENT(dup3, 0, ENOSYS),
    {"fstat", SYS_fstat, SEGMENT_FD, 0, 0, FSTAT, 0},
    {"newfstatat", SYS_newfstatat, SEGMENT_FD, 0, 0, FSTATAT, 0},
    {"fcntl", SYS_fcntl, SEGMENT_FD, 0, 0, CONTROL, EINVAL},
    LOOKED_AT(openat, OPENAT),
    LOOKED_AT(renameat, TWO_PATHS),
    LOOKED_AT(renameat2, TWO_PATHS),
    LOOKED_AT(linkat, TWO_PATHS),
    REFUSED(openat2, ENOSYS),
    REFUSED(flock, ENOSYS),
    REFUSED(fallocate, ENOSYS),
    /* What Gramine has not. */
    REFUSED(memfd_create, ENOSYS),
    REFUSED(pidfd_open, ENOSYS),
    REFUSED(pidfd_send_signal, ENOSYS),
    REFUSED(pidfd_getfd, ENOSYS),
    REFUSED(prctl, ENOSYS),
    REFUSED(inotify_init1, ENOSYS),
    REFUSED(timerfd_create, ENOSYS),
    REFUSED(signalfd4, ENOSYS),
    REFUSED(membarrier, ENOSYS),
    REFUSED(getrusage, ENOSYS),
    REFUSED(shmget, ENOSYS),
    REFUSED(shmat, ENOSYS),
    REFUSED(semget, ENOSYS),
    REFUSED(msgget, ENOSYS),
    REFUSED(io_uring_setup, ENOSYS),
    REFUSED(futex_waitv, ENOSYS),
    REFUSED(process_vm_readv, ENOSYS),
    REFUSED(process_vm_writev, ENOSYS),
    REFUSED(ptrace, ENOSYS),
    REFUSED(tkill, ENOSYS),
    REFUSED(sendmmsg, ENOSYS),
    {"futex", SYS_futex, LACKS_BITS, 1, FUTEX_PRIVATE_FLAG, SHARED_FUTEX, ENOSYS},
    /* One process. */
    REFUSED(clone3, ENOSYS), /* its flags are behind a pointer; the C library then uses clone */
    {"clone", SYS_clone, LACKS_BITS, 0, CLONE_THREAD, REFUSE, EPERM},
    LOOKED_AT(execve, EXECUTE),
    REFUSED(execveat, EPERM),
    PROBES(kill),
    PROBES(tgkill),
    PROBES(rt_sigqueueinfo),
    PROBES(rt_tgsigqueueinfo),
    PROBES(prlimit64),
    PROBES(getpgid),
    PROBES(getsid),
    /* Sockets: TCP to the host; Unix ones inside only, and streams only. */
    LOOKED_AT(socket, SOCKET),
    LOOKED_AT(socketpair, SOCKET),
    LOOKED_AT(bind, BIND),
    LOOKED_AT(connect, CONNECT),
    LOOKED_AT(sendmsg, SENDMSG),
#ifdef __x86_64__
    ON_SEGMENT(dup2, 0, ENOSYS),
    ON_SEGMENT(getdents, 0, EINVAL),
    LOOKED_AT(open, OPEN),
    REFUSED(creat, ENOSYS),
    {"rename", SYS_rename, ALWAYS, 0, 0, TWO_PATHS, 0},
    {"link", SYS_link, ALWAYS, 0, 0, TWO_PATHS, 0},
    REFUSED(fork, EPERM),
    REFUSED(vfork, EPERM),
    REFUSED(inotify_init, ENOSYS),
    REFUSED(signalfd, ENOSYS),
#endif
};
const size_t rule_count = sizeof rules / sizeof rules[0];

static bool applies(const struct rule *rule, uint32_t value) {
    switch (rule->test) {
    case SEGMENT_FD:
        return value >= SEGMENT_FD_FIRST && value <= SEGMENT_FD_LAST;
    case OTHER_PID:
        return value > 1;
    case LACKS_BITS:
        return (value & rule->bits) == 0;
    default:
        return true;
    }
}

const struct rule *rule_of(const struct seccomp_data *call) {
    for (size_t i = 0; i < rule_count; i++)
        if (rules[i].nr == call->nr && applies(&rules[i], (uint32_t)call->args[rules[i].argument]))
            return &rules[i];
    return NULL;
}

/* ---- the same as instructions ---- */

#define LOAD(field) (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, field)
#define LEAVE(with) (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, with)
/* Skips `no` instructions unless the loaded word compares so. */
#define UNLESS(compare, value, no) (struct sock_filter) BPF_JUMP(BPF_JMP | compare | BPF_K, value, 0, no)
#define IF(compare, value, yes) (struct sock_filter) BPF_JUMP(BPF_JMP | compare | BPF_K, value, yes, 0)

/* Little-endian: the low half of an argument, which is all of a descriptor, a pid or flags, comes first. */
#define LOW_HALF(argument) (uint32_t)(offsetof(struct seccomp_data, args) + 8 * (argument))

static size_t add_rule(struct sock_filter *at, const struct rule *rule) {
    struct sock_filter leave =
        LEAVE(rule->answer == KILL ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_USER_NOTIF);
    struct sock_filter number = LOAD(offsetof(struct seccomp_data, nr));
    struct sock_filter word = LOAD(LOW_HALF(rule->argument));
    size_t n = 0;
    at[n++] = number;
    switch (rule->test) {
    case SEGMENT_FD:
        at[n++] = UNLESS(BPF_JEQ, (uint32_t)rule->nr, 4);
        at[n++] = word;
        at[n++] = UNLESS(BPF_JGE, SEGMENT_FD_FIRST, 2);
        at[n++] = IF(BPF_JGT, SEGMENT_FD_LAST, 1);
        break;
    case OTHER_PID:
        at[n++] = UNLESS(BPF_JEQ, (uint32_t)rule->nr, 3);
        at[n++] = word;
        at[n++] = UNLESS(BPF_JGT, 1, 1);
        break;
    case LACKS_BITS:
        at[n++] = UNLESS(BPF_JEQ, (uint32_t)rule->nr, 3);
        at[n++] = word;
        at[n++] = IF(BPF_JSET, rule->bits, 1);
        break;
    default:
        at[n++] = UNLESS(BPF_JEQ, (uint32_t)rule->nr, 1);
    }
    at[n++] = leave;
    return n;
}

int install_filter(void) {
    static struct sock_filter program[1024];
    size_t n = 0;
    program[n++] = LOAD(offsetof(struct seccomp_data, arch));
    program[n++] = IF(BPF_JEQ, ARCHITECTURE, 1);
    program[n++] = LEAVE(SECCOMP_RET_KILL_PROCESS);
#ifdef __x86_64__
    program[n++] = LOAD(offsetof(struct seccomp_data, nr));
    program[n++] = UNLESS(BPF_JGE, 0x40000000u, 1); /* the x32 names of the same system calls */
    program[n++] = LEAVE(SECCOMP_RET_KILL_PROCESS);
#endif
    for (size_t i = 0; i < rule_count; i++)
        n += add_rule(program + n, &rules[i]);
    program[n++] = LEAVE(SECCOMP_RET_ALLOW);
    struct sock_fprog filter = {.len = (unsigned short)n, .filter = program};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -1;
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &filter);
}
