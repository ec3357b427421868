/* Segments: how they are made, what attaching rejects, by name, and how long they live. */
#include "scratch.h"

#include <errno.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

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

/* ---- create and attach ---- */

static void both_ends_see_one_memory(void) {
    struct tsqp_segment *creator = created(), *attacher;
    CHECK_EQ(attach(creator, &attacher), TSQP_OK);
    CHECK_EQ(tsqp_segment_length(creator), tsqp_segment_bytes(&GEOMETRY));
    CHECK_EQ(tsqp_segment_length(attacher), tsqp_segment_bytes(&GEOMETRY));
    CHECK(memcmp(creator->session, attacher->session, sizeof creator->session) == 0);
    creator->base[creator->length - 1] = 77;
    CHECK_EQ(attacher->base[creator->length - 1], 77);
    CHECK_EQ(tsqp_segment_peer_closed(creator), false);
    tsqp_segment_close_end(attacher);
    CHECK_EQ(tsqp_segment_peer_closed(creator), true);
    CHECK_EQ(tsqp_segment_peer_closed(attacher), false);
    tsqp_segment_release(attacher);
    tsqp_segment_release(creator);
    CHECK_EQ(scratch_files(), 0);
}

static void file_has_its_size_and_mode(void) {
    struct tsqp_segment *segment = created();
    char path[512];
    struct stat st;
    scratch_path(path, sizeof path, tsqp_segment_name(segment));
    CHECK_EQ(stat(path, &st), 0);
    CHECK_EQ(st.st_mode & 0777, 0600);
    CHECK_EQ(st.st_size, tsqp_segment_bytes(&GEOMETRY));
    CHECK(st.st_blocks * 512 >= st.st_size); /* reserved, not sparse */
    tsqp_segment_release(segment);
}

static void sessions_and_names_are_random(void) {
    struct tsqp_segment *a = created(), *b = created();
    CHECK(memcmp(a->session, b->session, sizeof a->session) != 0);
    CHECK(strcmp(tsqp_segment_name(a), tsqp_segment_name(b)) != 0);
    CHECK(strncmp(tsqp_segment_name(a), "tsqp", 4) == 0);
    tsqp_segment_release(a);
    tsqp_segment_release(b);
}

static void geometry_is_bounded(void) {
    static const struct tsqp_geometry bad[] = {{63, 3, 2}, {0, 3, 2},     {TSQP_MAX_CHUNK_BYTES + 1, 3, 2},
                                               {64, 0, 2}, {64, 1025, 2}, {64, UINT64_MAX, 2},
                                               {64, 3, 0}, {64, 3, 3},    {UINT64_MAX, 3, 2}};
    struct tsqp_segment *segment;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_EQ(tsqp_segment_bytes(&bad[i]), 0);
        CHECK_EQ(tsqp_segment_create(&bad[i], NULL, &segment), TSQP_BAD_GEOMETRY);
        CHECK_EQ(tsqp_segment_attach(&bad[i], "tsqp-x", NULL, &segment), TSQP_BAD_GEOMETRY);
    }
    struct tsqp_geometry largest = {TSQP_MAX_CHUNK_BYTES, TSQP_MAX_CHUNKS, TSQP_MAX_RINGS};
    CHECK(tsqp_segment_bytes(&largest) > UINT64_C(1) << 51);
    CHECK_EQ(scratch_files(), 0);
}

static void rejects_bad_names(void) {
    static const char *const bad[] = {"", "tsq", "other", "tsqp/x", "../tsqp", "tsqp x", "tsqp\n"};
    struct tsqp_segment *segment;
    char too_long[TSQP_NAME_BYTES + 1] = "tsqp";
    memset(too_long + 4, 'a', TSQP_NAME_BYTES - 4);
    too_long[TSQP_NAME_BYTES] = 0;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_EQ(tsqp_segment_create(&GEOMETRY, bad[i], &segment), TSQP_BAD_NAME);
        CHECK_EQ(tsqp_segment_attach(&GEOMETRY, bad[i], NULL, &segment), TSQP_BAD_NAME);
    }
    CHECK_EQ(tsqp_segment_create(&GEOMETRY, too_long, &segment), TSQP_BAD_NAME);
    too_long[TSQP_NAME_BYTES - 1] = 0;
    CHECK_EQ(tsqp_segment_create(&GEOMETRY, too_long, &segment), TSQP_OK);
    tsqp_segment_release(segment);
}

static void rejects_what_is_not_there_or_already_there(void) {
    struct tsqp_segment *first, *second;
    CHECK_EQ(tsqp_segment_attach(&GEOMETRY, "tsqp-missing", NULL, &second), TSQP_NOT_FOUND);
    CHECK_EQ(tsqp_segment_create(&GEOMETRY, "tsqp-fixed", &first), TSQP_OK);
    CHECK_EQ(tsqp_segment_create(&GEOMETRY, "tsqp-fixed", &second), TSQP_EXISTS);
    tsqp_segment_release(first);
    CHECK_EQ(tsqp_segment_create(&GEOMETRY, "tsqp-fixed", &second), TSQP_OK);
    tsqp_segment_release(second);
}

static void rejects_missing_directory(void) {
    struct tsqp_segment *segment;
    setenv("TSQP_SHM_DIR", "/nonexistent-directory", 1);
    errno = 0;
    int rc = tsqp_segment_create(&GEOMETRY, NULL, &segment), error = errno;
    setenv("TSQP_SHM_DIR", scratch, 1);
    CHECK_EQ(rc, TSQP_ERRNO);
    CHECK_EQ(error, ENOENT);
}

static void rejects_symbolic_link(void) {
    struct tsqp_segment *segment = created(), *other;
    char target[512], path[512];
    scratch_path(target, sizeof target, tsqp_segment_name(segment));
    scratch_path(path, sizeof path, "tsqp-link");
    CHECK_EQ(symlink(target, path), 0);
    int rc = tsqp_segment_attach(&GEOMETRY, "tsqp-link", NULL, &other);
    unlink(path);
    CHECK_EQ(rc, TSQP_ERRNO);
    tsqp_segment_release(segment);
}

static void rejects_other_users_file(void) {
    struct tsqp_segment *segment = created(), *other;
    char path[512];
    scratch_path(path, sizeof path, tsqp_segment_name(segment));
    if (geteuid() != 0) {
        CHECK_EQ(chmod(path, 0), 0);
        CHECK_EQ(attach(segment, &other), TSQP_PERMISSION);
    } else if (chmod(scratch, 0755) == 0 &&
               seteuid(65534) == 0) { /* root may open everything: be somebody else */
        int rc = attach(segment, &other);
        CHECK_EQ(seteuid(0), 0);
        CHECK_EQ(rc, TSQP_PERMISSION);
    } else {
        tsqp_segment_release(segment);
        SKIP("root can't become another user here");
    }
    tsqp_segment_release(segment);
}

static void rejects_full_file_system(void) {
    struct statvfs fs;
    struct tsqp_segment *segment;
    FILE *mounts = fopen("/proc/mounts", "re");
    char line[1024];
    bool is_tmpfs = false;
    while (mounts && fgets(line, sizeof line, mounts))
        is_tmpfs |= strstr(line, " /dev/shm tmpfs ") != NULL;
    if (mounts)
        fclose(mounts);
    if (!is_tmpfs || statvfs("/dev/shm", &fs) != 0 || fs.f_blocks == 0)
        SKIP("/dev/shm is not a tmpfs of limited size, the one that refuses at once");
    /* Twice the whole file system: refused before anything is taken from anybody. */
    uint64_t nbytes = 2 * (uint64_t)fs.f_blocks * fs.f_frsize;
    struct tsqp_geometry geometry = {nbytes / 64 + 64, 64, 1};
    char name[TSQP_NAME_BYTES];
    snprintf(name, sizeof name, "tsqp-full-%ld", (long)getpid());
    setenv("TSQP_SHM_DIR", "/dev/shm", 1);
    int rc = tsqp_segment_create(&geometry, name, &segment), again;
    again = tsqp_segment_attach(&geometry, name, NULL, &segment);
    setenv("TSQP_SHM_DIR", scratch, 1);
    CHECK_EQ(rc, TSQP_FULL);
    CHECK_EQ(again, TSQP_NOT_FOUND);
}

/* ---- a header that is not the one expected ---- */

static void rejects_header_word(size_t offset, uint64_t value, int code) {
    struct tsqp_segment *segment = created(), *other;
    memcpy(segment->base + offset, &value, sizeof value);
    CHECK_EQ(attach(segment, &other), code);
    tsqp_segment_release(segment);
}

#define HEADER(field) offsetof(struct tsqp_segment_header, field)

static void rejects_bad_magic(void) {
    rejects_header_word(HEADER(tag), 0, TSQP_BAD_MAGIC); /* still being created */
    rejects_header_word(HEADER(tag), TSQP_SEGMENT_TAG ^ 1, TSQP_BAD_MAGIC);
}

static void rejects_bad_version(void) {
    rejects_header_word(HEADER(tag), TSQP_SEGMENT_MAGIC | UINT64_C(2) << 56, TSQP_BAD_VERSION);
    rejects_header_word(HEADER(tag), TSQP_SEGMENT_MAGIC, TSQP_BAD_VERSION);
}

static void rejects_bad_geometry(void) {
    rejects_header_word(HEADER(max_chunk_bytes), 1001, TSQP_BAD_GEOMETRY);
    rejects_header_word(HEADER(max_chunks), 2, TSQP_BAD_GEOMETRY);
    rejects_header_word(HEADER(ring_count), 1, TSQP_BAD_GEOMETRY);
    rejects_header_word(HEADER(segment_bytes), UINT64_MAX, TSQP_BAD_GEOMETRY);
}

static void rejects_other_session(void) {
    rejects_header_word(HEADER(session), 1, TSQP_BAD_SESSION);
    rejects_header_word(HEADER(session) + 8, 1, TSQP_BAD_SESSION);
}

static void rejects_attachers_other_geometry(void) {
    struct tsqp_segment *segment = created(), *other;
    struct tsqp_geometry smaller = {1000, 2, 2}, larger = {1000, 9, 2};
    CHECK_EQ(tsqp_segment_attach(&smaller, tsqp_segment_name(segment), NULL, &other), TSQP_BAD_GEOMETRY);
    CHECK_EQ(tsqp_segment_attach(&larger, tsqp_segment_name(segment), NULL, &other), TSQP_TRUNCATED);
    tsqp_segment_release(segment);
}

static void rejects_truncated_file(void) {
    struct tsqp_segment *segment = created(), *other;
    char path[512];
    scratch_path(path, sizeof path, tsqp_segment_name(segment));
    CHECK_EQ(truncate(path, (off_t)segment->length - 1), 0);
    CHECK_EQ(attach(segment, &other), TSQP_TRUNCATED);
    CHECK_EQ(truncate(path, 0), 0);
    CHECK_EQ(attach(segment, &other), TSQP_TRUNCATED);
    tsqp_segment_release(segment);
}

static void rejects_second_attacher(void) {
    struct tsqp_segment *segment = created(), *second, *third;
    CHECK_EQ(attach(segment, &second), TSQP_OK);
    CHECK_EQ(attach(segment, &third), TSQP_ATTACHED);
    tsqp_segment_release(second);
    tsqp_segment_release(segment);
}

/* ---- life ---- */

static void only_the_creator_unlinks_and_once(void) {
    struct tsqp_segment *creator = created(), *attacher;
    CHECK_EQ(attach(creator, &attacher), TSQP_OK);
    CHECK_EQ(tsqp_segment_unlink(attacher), TSQP_OK);
    CHECK_EQ(scratch_files(), 1);
    CHECK_EQ(tsqp_segment_unlink(creator), TSQP_OK);
    CHECK_EQ(scratch_files(), 0);
    CHECK_EQ(tsqp_segment_unlink(creator), TSQP_OK);
    attacher->base[5000] = 1; /* the memory lives on */
    tsqp_segment_release(creator);
    attacher->base[5000] = 2;
    tsqp_segment_release(attacher);
}

static void ring_keeps_the_mapping(void) {
    struct tsqp_segment *segment = created();
    struct tsqp_ring *ring;
    struct tsqp_slot slot;
    CHECK_EQ(tsqp_ring_open(segment, 1, TSQP_PRODUCER, &ring), TSQP_OK);
    tsqp_segment_release(segment);
    CHECK_EQ(tsqp_ring_try_write(ring, &slot), TSQP_OK);
    memset(slot.data, 1, slot.nbytes);
    CHECK_EQ(scratch_files(), 1);
    tsqp_ring_close(ring);
    CHECK_EQ(scratch_files(), 0);
}

static void heartbeat_is_seen_by_the_peer(void) {
    struct pair pair = pair_open(64, 1);
    uint64_t before = tsqp_segment_peer_heartbeat(pair.attacher);
    tsqp_segment_beat(pair.creator);
    CHECK_EQ(tsqp_segment_peer_heartbeat(pair.attacher), before + 1);
    CHECK_EQ(tsqp_segment_peer_heartbeat(pair.creator), 0);
    pair_close(&pair);
}

/* Every test before this one released what it created. */
static void no_file_is_left(void) {
    CHECK_EQ(scratch_files(), 0);
}

int main(void) {
    scratch_make();
    RUN(both_ends_see_one_memory);
    RUN(file_has_its_size_and_mode);
    RUN(sessions_and_names_are_random);
    RUN(geometry_is_bounded);
    RUN(rejects_bad_names);
    RUN(rejects_what_is_not_there_or_already_there);
    RUN(rejects_missing_directory);
    RUN(rejects_symbolic_link);
    RUN(rejects_other_users_file);
    RUN(rejects_full_file_system);
    RUN(rejects_bad_magic);
    RUN(rejects_bad_version);
    RUN(rejects_bad_geometry);
    RUN(rejects_other_session);
    RUN(rejects_attachers_other_geometry);
    RUN(rejects_truncated_file);
    RUN(rejects_second_attacher);
    RUN(only_the_creator_unlinks_and_once);
    RUN(ring_keeps_the_mapping);
    RUN(heartbeat_is_seen_by_the_peer);
    RUN(no_file_is_left);
    scratch_remove();
    return check_result();
}
