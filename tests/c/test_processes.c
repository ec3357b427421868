/* Segments between processes: who owns and locks them, how a death is seen, what fork changes. */
#include "scratch.h"

#include <signal.h>
#include <sys/wait.h>

static const struct tsqp_geometry GEOMETRY = {1000, 3, 2};

static struct tsqp_segment *created(void) {
    struct tsqp_segment *segment;
    CHECK_EQ(tsqp_segment_create(&GEOMETRY, NULL, &segment), TSQP_OK);
    return segment;
}

static int attach(const struct tsqp_segment *segment, struct tsqp_segment **out) {
    uint64_t session[2];
    tsqp_segment_session(segment, session);
    return tsqp_segment_attach(&GEOMETRY, tsqp_segment_name(segment), session, out);
}

static void owner_is_this_process(void) {
    struct tsqp_segment *segment = created();
    struct tsqp_owner owner;
    uint64_t start;
    CHECK_EQ(tsqp_segment_owner(tsqp_segment_name(segment), &owner), TSQP_OK);
    CHECK_EQ(owner.pid, getpid());
    CHECK_EQ(tsqp_process_start((uint64_t)getpid(), &start), TSQP_OK);
    CHECK_EQ(owner.start, start);
    CHECK_EQ(owner.pidns, tsqp_pid_namespace());
    CHECK_EQ(owner.segment_bytes, tsqp_segment_length(segment));
    CHECK_EQ(owner.locked, true);
    CHECK_EQ(tsqp_segment_owner("tsqp-missing", &owner), TSQP_NOT_FOUND);
    segment->base[0] ^= 1;
    CHECK_EQ(tsqp_segment_owner(tsqp_segment_name(segment), &owner), TSQP_BAD_MAGIC);
    tsqp_segment_release(segment);
}

static void peer_lock_follows_the_attacher(void) {
    struct tsqp_segment *creator = created(), *attacher;
    CHECK_EQ(tsqp_segment_peer_locked(creator), -1); /* nobody attached yet */
    CHECK_EQ(attach(creator, &attacher), TSQP_OK);
    CHECK_EQ(tsqp_segment_peer_locked(creator), 1);
    CHECK_EQ(tsqp_segment_peer_locked(attacher), 1);
    tsqp_segment_release(attacher);
    CHECK_EQ(tsqp_segment_peer_locked(creator), 0);
    tsqp_segment_release(creator);
}

/* ---- other processes ---- */

static void read_exactly(int fd, void *out, size_t nbytes) {
    CHECK_EQ(read(fd, out, nbytes), nbytes);
}

/* In a child: lives until it is killed, or until its parent is gone. */
static void live(const int life[2]) {
    char byte;
    close(life[1]);
    while (read(life[0], &byte, 1) > 0)
        ;
    _exit(0);
}

static void kill_and_reap(pid_t pid) {
    int status;
    CHECK_EQ(kill(pid, SIGKILL), 0);
    CHECK_EQ(waitpid(pid, &status, 0), pid);
}

static void killed_attacher_loses_its_lock(void) {
    struct tsqp_segment *creator = created();
    int ready[2], life[2];
    char byte = 0;
    CHECK_EQ(pipe(ready), 0);
    CHECK_EQ(pipe(life), 0);
    pid_t child = fork();
    if (child == 0) {
        struct tsqp_segment *attacher;
        byte = attach(creator, &attacher) == TSQP_OK ? 'y' : 'n';
        if (write(ready[1], &byte, 1) != 1)
            _exit(1);
        live(life);
    }
    read_exactly(ready[0], &byte, 1);
    CHECK_EQ(byte, 'y');
    CHECK_EQ(tsqp_segment_peer_locked(creator), 1);
    kill_and_reap(child);
    CHECK_EQ(tsqp_segment_peer_locked(creator), 0);
    CHECK_EQ(tsqp_segment_peer_closed(creator), false);
    close(ready[0]), close(ready[1]), close(life[0]), close(life[1]);
    tsqp_segment_release(creator);
}

static void killed_creator_is_recognised(void) {
    struct tsqp_owner owner;
    uint64_t start;
    int ready[2], life[2];
    char byte;
    CHECK_EQ(pipe(ready), 0);
    CHECK_EQ(pipe(life), 0);
    pid_t child = fork();
    if (child == 0) {
        struct tsqp_segment *segment;
        if (tsqp_segment_create(&GEOMETRY, "tsqp-orphan", &segment) != TSQP_OK ||
            write(ready[1], "y", 1) != 1)
            _exit(1);
        live(life);
    }
    close(ready[1]);
    read_exactly(ready[0], &byte, 1);
    CHECK_EQ(tsqp_segment_owner("tsqp-orphan", &owner), TSQP_OK);
    CHECK_EQ(owner.locked, true);
    kill_and_reap(child);
    CHECK_EQ(tsqp_segment_owner("tsqp-orphan", &owner), TSQP_OK);
    CHECK_EQ(owner.locked, false);
    CHECK_EQ(owner.pid, child);
    CHECK_EQ(tsqp_process_start(owner.pid, &start), TSQP_NOT_FOUND);
    close(ready[0]), close(life[0]), close(life[1]);
    char path[512];
    scratch_path(path, sizeof path, "tsqp-orphan");
    CHECK_EQ(unlink(path), 0);
}

static void forked_child_neither_unlinks_nor_keeps_the_lock(void) {
    struct tsqp_segment *creator = created(), *attacher;
    int to_child[2], to_parent[2], status;
    char byte;
    CHECK_EQ(attach(creator, &attacher), TSQP_OK);
    CHECK_EQ(pipe(to_child), 0);
    CHECK_EQ(pipe(to_parent), 0);
    pid_t child = fork();
    if (child == 0) {
        tsqp_segment_unlink(creator); /* not its file */
        tsqp_segment_forget_after_fork(creator);
        tsqp_segment_forget_after_fork(attacher);
        close(to_child[1]); /* so that its end is seen below, should the parent die */
        if (write(to_parent[1], "y", 1) != 1 || read(to_child[0], &byte, 1) != 1)
            _exit(1);
        _exit(0);
    }
    read_exactly(to_parent[0], &byte, 1);
    CHECK_EQ(scratch_files(), 1);
    CHECK_EQ(tsqp_segment_peer_locked(creator), 1);
    tsqp_segment_release(attacher);
    CHECK_EQ(tsqp_segment_peer_locked(creator), 0); /* although the child still lives */
    CHECK_EQ(write(to_child[1], "q", 1), 1);
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    for (int i = 0; i < 2; i++)
        close(to_child[i]), close(to_parent[i]);
    tsqp_segment_release(creator);
}

/* Every test before this one released what it created. */
static void no_file_is_left(void) {
    CHECK_EQ(scratch_files(), 0);
}

int main(void) {
    scratch_make();
    RUN(owner_is_this_process);
    RUN(peer_lock_follows_the_attacher);
    RUN(killed_attacher_loses_its_lock);
    RUN(killed_creator_is_recognised);
    RUN(forked_child_neither_unlinks_nor_keeps_the_lock);
    RUN(no_file_is_left);
    scratch_remove();
    return check_result();
}
