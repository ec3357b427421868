/* view.c: the file system as the process inside sees it. */
#define _GNU_SOURCE
#include "profile.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define MOST_KEEPS 16
#define DEV "/tmp/dev"

static int failed(const char *what) {
    fprintf(stderr, "profile: %s: %s\n", what, strerror(errno));
    return -1;
}

static int make_directories(const char *path) {
    char part[4096];
    snprintf(part, sizeof part, "%s", path);
    for (char *slash = part + 1; *slash; slash++)
        if (*slash == '/') {
            *slash = 0;
            if (mkdir(part, 0755) != 0 && errno != EEXIST)
                return -1;
            *slash = '/';
        }
    return mkdir(part, 0755) != 0 && errno != EEXIST ? -1 : 0;
}

static int write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return failed(path);
    ssize_t wrote = write(fd, text, strlen(text));
    close(fd);
    return wrote == (ssize_t)strlen(text) ? 0 : failed(path);
}

/* Puts what `fd` was opened on at `target`: its own path may be covered by now. */
static int bind_fd(int fd, const char *target) {
    char source[64];
    snprintf(source, sizeof source, "/proc/self/fd/%d", fd);
    if (fd < 0 || mount(source, target, NULL, MS_BIND | MS_REC, NULL) != 0)
        return failed(target);
    close(fd);
    return 0;
}

static int make_devices(int shm) {
    static const char *const nodes[] = {"null", "zero", "full", "random", "urandom", "tty"};
    char here[64], there[64];
    if (mkdir(DEV, 0755) != 0 || mount("tmpfs", DEV, "tmpfs", MS_NOSUID, "mode=755") != 0)
        return failed(DEV);
    for (size_t i = 0; i < sizeof nodes / sizeof nodes[0]; i++) {
        snprintf(here, sizeof here, "/dev/%s", nodes[i]);
        snprintf(there, sizeof there, DEV "/%s", nodes[i]);
        if (write_file(there, "") != 0 || mount(here, there, NULL, MS_BIND, NULL) != 0)
            return failed(there);
    }
    if (mkdir(DEV "/shm", 0755) != 0 || bind_fd(shm, DEV "/shm") != 0)
        return -1;
    /* gramine-direct has the directory, too, and no attestation in it. */
    if (mkdir(DEV "/attestation", 0755) != 0 || write_file(DEV "/attestation/attestation_type", "none") != 0)
        return failed(DEV "/attestation");
    if (symlink("/proc/self/fd", DEV "/fd") != 0 || mount(DEV, "/dev", NULL, MS_MOVE, NULL) != 0)
        return failed("/dev");
    return rmdir(DEV);
}

/* No name resolves: nothing to look it up in, nobody to ask. */
static int forget_names(void) {
    static const char *const files[][2] = {
        {"/etc/hosts", "\n"}, {"/etc/resolv.conf", "\n"}, {"/etc/nsswitch.conf", "hosts: files\n"}};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        if (access(files[i][0], F_OK) != 0)
            continue;
        if (write_file("/tmp/names", files[i][1]) != 0)
            return -1;
        int fd = open("/tmp/names", O_PATH | O_CLOEXEC);
        if (bind_fd(fd, files[i][0]) != 0 || unlink("/tmp/names") != 0)
            return failed(files[i][0]);
    }
    return 0;
}

int enter_view(const struct view *view) {
    int keeps[MOST_KEEPS];
    if (view->keep_count > MOST_KEEPS)
        return failed("too many directories to keep");
    if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return failed("a mount namespace");
    int shm = open(view->shm, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (shm < 0)
        return failed(view->shm);
    for (size_t i = 0; i < view->keep_count; i++)
        if ((keeps[i] = open(view->keeps[i], O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
            return failed(view->keeps[i]);
    if (mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777") != 0)
        return failed("/tmp");
    if (make_devices(shm) != 0 || forget_names() != 0)
        return -1;
    for (size_t i = 0; i < view->keep_count; i++)
        if (make_directories(view->keeps[i]) != 0 || bind_fd(keeps[i], view->keeps[i]) != 0)
            return failed(view->keeps[i]);
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0)
        return failed("/proc");
    return 0;
}
