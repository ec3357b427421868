/* profile.c: runs a command as Gramine would let it run.
 *
 *     profile REPORT SHM [KEEP...] -- COMMAND...
 *
 * SHM is the directory seen as /dev/shm; each KEEP stays visible below /tmp. REPORT gets `pid N`, then for
 * each rule that refused something `refused NAME COUNT`, then `exit CODE` or `signal NUMBER`. Leaves with the
 * command's status, 128 + N after a signal, 125 where the profile can't be set up. SIGTERM and SIGINT are
 * ignored, as inside. */
#define _GNU_SOURCE
#include "profile.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CAN_NOT 125

static int failed(const char *what) {
    fprintf(stderr, "profile: %s: %s\n", what, strerror(errno));
    return CAN_NOT;
}

static int write_map(const char *name, unsigned id) {
    char path[64], text[64];
    snprintf(path, sizeof path, "/proc/self/%s", name);
    int n = snprintf(text, sizeof text, "%u %u 1", id, id);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    ssize_t wrote = fd < 0 ? -1 : write(fd, text, (size_t)n);
    if (fd >= 0)
        close(fd);
    return wrote == n ? 0 : -1;
}

/* Without root: a user namespace, in which this user may mount. */
static int become_able(void) {
    uid_t uid = geteuid();
    gid_t gid = getegid();
    if (uid == 0)
        return 0;
    if (unshare(CLONE_NEWUSER) != 0)
        return -1;
    int fd = open("/proc/self/setgroups", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (write(fd, "deny", 4) != 4)
            errno = EPERM;
        close(fd);
    }
    return write_map("uid_map", uid) == 0 && write_map("gid_map", gid) == 0 ? 0 : -1;
}

/* In the child: everything up to the command itself. */
static int become_inside(const struct view *view, int tell, int go, char **command) {
    char cwd[4096] = "/", byte;
    sigset_t outside;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setsid();
    if (!getcwd(cwd, sizeof cwd))
        return failed("the working directory");
    if (enter_view(view) != 0)
        return CAN_NOT;
    if (chdir(cwd) != 0 && chdir("/") != 0)
        return failed(cwd);
    sigemptyset(&outside);
    sigaddset(&outside, SIGTERM);
    sigaddset(&outside, SIGINT);
    sigprocmask(SIG_BLOCK, &outside, NULL);
    int listener = install_filter();
    if (listener < 0)
        return failed("a seccomp filter with a supervisor");
    if (write(tell, &listener, sizeof listener) != (ssize_t)sizeof listener || read(go, &byte, 1) != 1)
        return CAN_NOT;
    close(listener);
    execvp(command[0], command);
    return failed(command[0]);
}

/* The listener of the child's filter: a descriptor of the child's, taken from there. */
static int take_listener(int pidfd, int told) {
    int number;
    if (read(told, &number, sizeof number) != (ssize_t)sizeof number)
        return -1; /* the child has said why */
    return (int)syscall(SYS_pidfd_getfd, pidfd, number, 0);
}

static void supervise(struct supervisor *s) {
    struct pollfd ends[] = {{.fd = s->listener, .events = POLLIN}, {.fd = s->pidfd, .events = POLLIN}};
    while (!(ends[1].revents & POLLIN)) {
        if (poll(ends, 2, -1) < 0 && errno != EINTR)
            return;
        if (ends[0].revents & POLLIN)
            answer_one(s);
        if (ends[0].revents & POLLHUP)
            ends[0].fd = -1;
    }
}

static int write_report(FILE *report, const struct supervisor *s, int status) {
    for (size_t i = 0; i < rule_count; i++)
        if (s->refusals[i])
            fprintf(report, "refused %s %llu\n", rules[i].name, (unsigned long long)s->refusals[i]);
    if (WIFSIGNALED(status))
        fprintf(report, "signal %d\n", WTERMSIG(status));
    else
        fprintf(report, "exit %d\n", WEXITSTATUS(status));
    fclose(report);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static int run(const char *report_path, const struct view *view, char **command) {
    int told[2], go[2], status = 0;
    FILE *report = fopen(report_path, "we");
    struct supervisor s = {.bound = calloc(64, 108), .refusals = calloc(rule_count, sizeof(uint64_t))};
    if (!report || !s.bound || !s.refusals || pipe2(told, O_CLOEXEC) != 0 || pipe2(go, O_CLOEXEC) != 0)
        return failed(report_path);
    if (become_able() != 0 || unshare(CLONE_NEWPID) != 0)
        return failed("a pid namespace (this needs root, or user namespaces for everybody)");
    s.pid = fork();
    if (s.pid == 0)
        _exit(become_inside(view, told[1], go[0], command));
    close(told[1]);
    s.pidfd = s.pid < 0 ? -1 : (int)syscall(SYS_pidfd_open, s.pid, 0);
    s.listener = s.pidfd < 0 ? -1 : take_listener(s.pidfd, told[0]);
    if (s.listener < 0) {
        int error = errno;
        if (s.pid > 0)
            kill(s.pid, SIGKILL);
        waitpid(s.pid, &status, 0);
        errno = error;
        return failed("the process inside could not be prepared");
    }
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    fprintf(report, "pid %d\n", s.pid);
    fflush(report);
    if (write(go[1], "g", 1) == 1)
        supervise(&s);
    if (waitpid(s.pid, &status, 0) < 0)
        return failed("waiting");
    return write_report(report, &s, status);
}

int main(int argc, char **argv) {
    int split = 1;
    while (split < argc && strcmp(argv[split], "--") != 0)
        split++;
    if (split < 3 || split + 1 >= argc) {
        fprintf(stderr, "usage: profile REPORT SHM [KEEP...] -- COMMAND...\n");
        return CAN_NOT;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* no test, no program */
    struct view view = {
        .shm = argv[2], .keeps = (const char *const *)argv + 3, .keep_count = (size_t)split - 3};
    return run(argv[1], &view, argv + split + 1);
}
