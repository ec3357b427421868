/* The pool: every element is done once, whoever calls at the same time; it comes and goes, and survives a
 * fork. */
#include "check.h"
#include "kernels.h"
#include "tsqp.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define COUNT 5000
#define CALLERS 4

struct marks {
    unsigned char done[COUNT];
    unsigned char workers[TSQP_MAX_THREADS]; /* each its own byte */
    atomic_bool bad;
};

static void mark(void *context, unsigned worker, size_t begin, size_t end) {
    struct marks *marks = context;
    marks->workers[worker] = 1;
    for (size_t i = begin; i < end; i++)
        marks->done[i]++;
}

static bool all_done_once(const struct marks *marks) {
    for (size_t i = 0; i < COUNT; i++)
        if (marks->done[i] != 1)
            return false;
    return true;
}

static void each_element_is_done_once(void) {
    static const size_t grains[] = {1, 7, COUNT - 1, COUNT, COUNT + 1};
    for (unsigned threads = 1; threads <= 5; threads += 2) {
        tsqp_threads_set(threads);
        CHECK_EQ(tsqp_threads(), threads);
        for (size_t g = 0; g < sizeof grains / sizeof grains[0]; g++)
            for (unsigned participants = 1; participants <= 6; participants++) {
                struct marks marks = {0};
                tsqp_parallel(mark, &marks, COUNT, grains[g], participants);
                CHECK(all_done_once(&marks));
                unsigned most = participants < threads ? participants : threads;
                for (unsigned w = most; w < TSQP_MAX_THREADS; w++)
                    CHECK(!marks.workers[w]);
            }
        CHECK(tsqp_threads_running() <= threads - 1);
    }
}

static void no_work_starts_no_thread(void) {
    tsqp_threads_stop();
    tsqp_threads_set(3);
    struct marks marks = {0};
    tsqp_parallel(mark, &marks, 0, 1, 3);
    tsqp_parallel(mark, &marks, 10, 10, 3);
    CHECK_EQ(tsqp_threads_running(), 0);
    tsqp_parallel(mark, &marks, 10, 1, 2); /* only as many as may take part */
    CHECK_EQ(tsqp_threads_running(), 1);
    tsqp_parallel(mark, &marks, 10, 1, 3);
    CHECK_EQ(tsqp_threads_running(), 2);
    tsqp_threads_set(2);
    CHECK_EQ(tsqp_threads_running(), 0);
}

static void setting_is_bounded(void) {
    tsqp_threads_set(0);
    CHECK_EQ(tsqp_threads(), 1);
    tsqp_threads_set(100000);
    CHECK_EQ(tsqp_threads(), TSQP_MAX_THREADS);
    tsqp_threads_set(3);
}

static void *call_often(void *context) {
    struct marks *marks = context;
    for (int i = 0; i < 200; i++) {
        memset(marks->done, 0, sizeof marks->done);
        tsqp_parallel(mark, marks, COUNT, 100, 3);
        if (!all_done_once(marks))
            marks->bad = true;
    }
    return NULL;
}

static void callers_do_not_disturb_each_other(void) {
    pthread_t threads[CALLERS];
    struct marks *marks = calloc(CALLERS, sizeof *marks);
    CHECK(marks != NULL);
    tsqp_threads_set(3);
    for (int i = 0; i < CALLERS; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, call_often, &marks[i]), 0);
    for (int i = 0; i < 20; i++) { /* and while the setting changes */
        tsqp_threads_set(2 + (unsigned)i % 3);
        usleep(500);
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(!marks[i].bad);
    }
    free(marks);
}

static void nested(void *context, unsigned worker, size_t begin, size_t end) {
    (void)worker;
    struct marks *marks = context;
    for (size_t i = begin; i < end; i++)
        tsqp_parallel(mark, &marks[i], COUNT, 10, 4);
}

static void work_within_work_is_done_alone(void) {
    struct marks *marks = calloc(8, sizeof *marks);
    CHECK(marks != NULL);
    tsqp_threads_set(3);
    tsqp_parallel(nested, marks, 8, 1, 3);
    for (int i = 0; i < 8; i++)
        CHECK(all_done_once(&marks[i]));
    free(marks);
}

__attribute__((unused)) static void a_child_starts_its_own(void) {
    tsqp_threads_set(3);
    struct marks marks = {0};
    tsqp_parallel(mark, &marks, COUNT, 10, 3);
    CHECK_EQ(tsqp_threads_running(), 2);
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        if (tsqp_threads_running() != 0)
            _exit(2);
        struct marks own = {0};
        tsqp_parallel(mark, &own, COUNT, 10, 3);
        int code = all_done_once(&own) && tsqp_threads_running() == 2 ? 0 : 3;
        tsqp_threads_stop();
        _exit(code);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
    memset(marks.done, 0, sizeof marks.done);
    tsqp_parallel(mark, &marks, COUNT, 10, 3); /* the parent's still work */
    CHECK(all_done_once(&marks));
}

int main(void) {
    RUN(each_element_is_done_once);
    RUN(no_work_starts_no_thread);
    RUN(setting_is_bounded);
    RUN(callers_do_not_disturb_each_other);
    RUN(work_within_work_is_done_alone);
#ifndef __SANITIZE_THREAD__ /* which loses count of threads that a forked child starts */
    RUN(a_child_starts_its_own);
#endif
    tsqp_threads_stop();
    return check_result();
}
