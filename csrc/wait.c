/* wait.c: spin while that pays, then yield, then block. Every wait is cut into slices by its caller, who
 * looks at signals and the peer between them. */
#include "access.h"
#include "tsqp.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
#endif

#define SPIN_MIN_NS UINT64_C(1000)
#define PURE_SPIN_NS UINT64_C(5000)
/* Between two looks at the clock a thread that runs spends far less. */
#define STALL_NS UINT64_C(20000)
#define REWAKE_SPIN_NS UINT64_C(200000)
#define PROBE_EVERY 16u
#define SPINS_PER_CLOCK_READ 32
#define YIELDS 8
#define POLL_YIELDS 200 /* measured to be right inside Gramine, where a sleep leaves the enclave */
#define SLEEP_MIN_NS UINT64_C(50000)
#define SLEEP_MAX_NS UINT64_C(1000000)
#define MAX_FUTEXES 128
/* How long an expected answer is looked for: a share of what it takes, within these bounds and spin_max. */
#define WINDOW_SHARE 8
#define WINDOW_MIN_NS UINT64_C(200000)
#define MISSES 3                   /* that halve it */
#define CROWDED_NS UINT64_C(50000) /* a core that nothing else wants comes back at once */
#define CROWDED_SKIPS 63
#define LATE_NS UINT64_C(100000) /* what a sleep is thought to be late before one was measured */

uint64_t tsqp_now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * UINT64_C(1000000000) + (uint64_t)ts.tv_nsec;
}

void tsqp_waiter_init(struct tsqp_waiter *waiter, enum tsqp_wait_mode mode, uint64_t spin_ns, bool futex) {
#ifndef __linux__
    futex = false;
#endif
    waiter->mode = mode == TSQP_WAIT_AUTO && !futex ? TSQP_WAIT_POLL : mode;
    waiter->spin_max_ns = spin_ns;
    waiter->spin_ns = spin_ns;
    waiter->misses = 0;
    waiter->sleep_ns = SLEEP_MIN_NS;
    waiter->futex = futex && waiter->mode != TSQP_WAIT_POLL;
    waiter->crowded = waiter->crowded_skips = 0;
    waiter->late = (struct tsqp_estimate){.mean_ns = LATE_NS, .deviation_ns = LATE_NS / 8, .count = 1};
}

/* SYNC: acquire pairs with tsqp_publish of the word; what the publisher wrote before it is visible after. */
static bool any_ready(const struct tsqp_watch *watches, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (tsqp_load_acquire(watches[i].word) != watches[i].idle)
            return true;
    return false;
}

static bool any_closed(const struct tsqp_watch *watches, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (watches[i].closed && tsqp_load_seq_cst(watches[i].closed) != 0)
            return true;
    return false;
}

/* How a wait went. */
struct course {
    uint64_t waited_ns;  /* in which this thread ran or slept */
    uint64_t yielded_ns; /* the longest that others had the core after a yield */
    bool slept;          /* and found the word ready when it woke */
    bool gives_way;      /* yields from the first look on: the peer computes */
};

/* The first microseconds are spent on the word alone. After them each look is followed by a yield: it costs
 * nothing where the core has no other work, and gives way where the peer computes on it. Going to sleep
 * instead would let the core halt, and waking it costs more than most answers take.
 *
 * Only time in which this thread ran counts against the budget and as waited: what others took of the core
 * says nothing about how fast the peer answers. */
static bool spin(struct tsqp_waiter *waiter, const struct tsqp_watch *watches, size_t count, uint64_t until,
                 uint64_t budget_ns, struct course *course) {
    bool yields = waiter->mode != TSQP_WAIT_SPIN;
    uint64_t ran = 0, last = tsqp_now_ns();
    do {
        for (int i = 0; i < SPINS_PER_CLOCK_READ; i++) {
            if (any_ready(watches, count)) {
                course->waited_ns += ran;
                return true;
            }
            tsqp_cpu_relax();
        }
        uint64_t now = tsqp_now_ns();
        ran += now - last < STALL_NS ? now - last : STALL_NS;
        last = now;
        if (yields && (ran > PURE_SPIN_NS || course->gives_way)) {
            sched_yield();
            last = tsqp_now_ns();
            course->yielded_ns = last - now > course->yielded_ns ? last - now : course->yielded_ns;
        }
    } while (ran < budget_ns && last < until);
    course->waited_ns += ran;
    return false;
}

/* Spinning is worth its core only while the peer answers within spin_max: a wait that ended in time restores
 * the whole budget, one that did not halves it. Where both ends block, the wake-ups alone can make every wait
 * too long and neither would find back: so every PROBE_EVERY-th one spins in full. */
static void learn(struct tsqp_waiter *waiter, uint64_t waited_ns) {
    uint64_t budget = waiter->spin_ns / 2;
    if (waited_ns <= waiter->spin_max_ns) {
        waiter->misses = 0;
        budget = waiter->spin_max_ns;
    } else if (++waiter->misses % PROBE_EVERY == 0) {
        budget = waiter->spin_max_ns;
    }
    waiter->spin_ns = budget > SPIN_MIN_NS ? budget : SPIN_MIN_NS;
}

static int sleep_ns(uint64_t ns) {
    struct timespec ts = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    return nanosleep(&ts, NULL) == 0 ? TSQP_OK : TSQP_INTERRUPTED;
}

/* Short sleeps that grow while nothing happens: an idle end uses next to no CPU. */
static int poll_once(struct tsqp_waiter *waiter, uint64_t left_ns) {
    uint64_t ns = waiter->sleep_ns < left_ns ? waiter->sleep_ns : left_ns;
    if (waiter->sleep_ns < SLEEP_MAX_NS)
        waiter->sleep_ns += waiter->sleep_ns / 16;
    return sleep_ns(ns);
}

#ifdef __linux__
/* A kernel or a sandbox without the call must not turn the wait into a busy loop. */
static int futex_result(long rc, bool *unsupported) {
    *unsupported = rc == -1 && errno != EINTR && errno != EAGAIN && errno != ETIMEDOUT;
    return rc == -1 && errno == EINTR ? TSQP_INTERRUPTED : TSQP_OK;
}

static int futex_one(const struct tsqp_watch *watch, uint64_t left_ns, bool *unsupported) {
    struct timespec ts = {.tv_sec = (time_t)(left_ns / 1000000000u),
                          .tv_nsec = (long)(left_ns % 1000000000u)};
    /* The futex is the low half of the word; little-endian puts it first. */
    long rc = syscall(SYS_futex, watch->word, FUTEX_WAIT, (uint32_t)watch->idle, &ts, NULL, 0);
    return futex_result(rc, unsupported);
}

static int futex_many(const struct tsqp_watch *watches, size_t count, uint64_t left_ns, bool *unsupported) {
    struct {
        uint64_t val, uaddr;
        uint32_t flags, reserved;
    } vec[MAX_FUTEXES];
    for (size_t i = 0; i < count; i++) {
        vec[i].val = (uint32_t)watches[i].idle;
        vec[i].uaddr = (uint64_t)(uintptr_t)watches[i].word;
        vec[i].flags = 2; /* FUTEX2_SIZE_U32, shared */
        vec[i].reserved = 0;
    }
    uint64_t until = tsqp_now_ns() + left_ns;
    struct timespec ts = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
    long rc = syscall(SYS_futex_waitv, vec, (unsigned)count, 0u, &ts, CLOCK_MONOTONIC);
    return futex_result(rc, unsupported);
}
#endif

static int block_once(struct tsqp_waiter *waiter, const struct tsqp_watch *watches, size_t count,
                      uint64_t left_ns) {
#ifdef __linux__
    if (waiter->futex && count <= MAX_FUTEXES) {
        bool unsupported = false;
        /* Counted, not set: two threads may wait for one word, and the first to leave must not hide the
         * other.
         */
        for (size_t i = 0; i < count; i++)
            tsqp_add_seq_cst(watches[i].waiting, 1);
        int rc = TSQP_OK;
        /* SYNC: the closer stores `closed`, then looks at `waiting`; we the other way round, both seq_cst:
         * either it means to wake us or we see it here. Its wake-up may still come before we sleep; a close
         * does not change the word the kernel compares, and is then seen after this slice. */
        if (any_closed(watches, count))
            ; /* the caller looks again */
        else if (count == 1)
            rc = futex_one(&watches[0], left_ns, &unsupported);
        else
            rc = futex_many(watches, count, left_ns, &unsupported);
        /* Whoever does not sleep any more saves the publisher a system call. */
        for (size_t i = 0; i < count; i++)
            tsqp_add_seq_cst(watches[i].waiting, UINT64_MAX);
        if (!unsupported)
            return rc;
        waiter->futex = false;
    }
#endif
    (void)watches;
    (void)count;
    return poll_once(waiter, left_ns);
}

static bool spin_and_yield(struct tsqp_waiter *waiter, const struct tsqp_watch *watches, size_t count,
                           uint64_t until, struct course *course) {
    uint64_t spin_ns = waiter->spin_ns;
    if (waiter->mode == TSQP_WAIT_SPIN)
        spin_ns = UINT64_MAX;
    else if (waiter->mode == TSQP_WAIT_BLOCK)
        spin_ns = 0;
    if (spin(waiter, watches, count, until, spin_ns, course))
        return true;
    if (waiter->mode == TSQP_WAIT_SPIN)
        return false;
    int yields = waiter->mode == TSQP_WAIT_POLL ? POLL_YIELDS : YIELDS;
    for (int i = 0; i < yields; i++) {
        sched_yield();
        if (any_ready(watches, count))
            return true;
    }
    return false;
}

/* Blocks until a word is ready or the slice is over. */
static int block(struct tsqp_waiter *waiter, const struct tsqp_watch *watches, size_t count, uint64_t until,
                 struct course *course) {
    int rc = TSQP_OK;
    bool ready = false;
    while (!ready) {
        uint64_t now = tsqp_now_ns();
        if (now >= until || rc != TSQP_OK || any_closed(watches, count))
            return rc != TSQP_OK ? rc : TSQP_AGAIN;
        rc = block_once(waiter, watches, count, until - now);
        ready = course->slept = any_ready(watches, count);
        course->waited_ns += tsqp_now_ns() - now;
        /* Woken, and nothing there: somebody is about to publish (tsqp_ring_rouse). */
        if (!ready && rc == TSQP_OK && waiter->futex && waiter->mode != TSQP_WAIT_BLOCK)
            ready = spin(waiter, watches, count, until, REWAKE_SPIN_NS, course);
    }
    waiter->sleep_ns = SLEEP_MIN_NS;
    return TSQP_OK;
}

/* Spins, yields and blocks. */
static int wait_until(struct tsqp_waiter *waiter, const struct tsqp_watch *watches, size_t count,
                      uint64_t until, struct course *course) {
    int rc = TSQP_OK;
    if (spin_and_yield(waiter, watches, count, until, course))
        waiter->sleep_ns = SLEEP_MIN_NS;
    else
        rc = block(waiter, watches, count, until, course);
    learn(waiter, course->waited_ns);
    return rc;
}

int tsqp_wait(struct tsqp_waiter *waiter, const struct tsqp_watch *watches, size_t count, uint64_t slice_ns) {
    struct course course = {0};
    return wait_until(waiter, watches, count, tsqp_now_ns() + slice_ns, &course);
}

/* ---- answers that are expected at a time ---- */

/* Sleeps until `target`, or until the word is ready or the slice over. */
static int sleep_until(struct tsqp_waiter *waiter, const struct tsqp_watch *watch, uint64_t target,
                       uint64_t until, struct course *course) {
    uint64_t end = target < until ? target : until;
    int rc = block(waiter, watch, 1, end, course);
    uint64_t now = tsqp_now_ns();
    if (end == target &&
        now >= target) /* also where the answer is there by now: somebody else had the core */
        tsqp_estimate_add(&waiter->late, now - target);
    return rc;
}

/* How long the answer is looked for once it is expected: ever less where that is in vain, but for every
 * PROBE_EVERY-th time. */
static uint64_t window_of(const struct tsqp_waiter *waiter, const struct tsqp_forecast *forecast) {
    uint64_t window = forecast->took.mean_ns / WINDOW_SHARE;
    window = window > WINDOW_MIN_NS ? window : WINDOW_MIN_NS;
    window = window < waiter->spin_max_ns ? window : waiter->spin_max_ns;
    if (forecast->misses % PROBE_EVERY != 0)
        window >>= forecast->misses < 16 * MISSES ? forecast->misses / MISSES : 16;
    return window;
}

/* As long before the mean as answers and wake-ups scatter, but so that the window still reaches beyond it. */
static uint64_t target_of(const struct tsqp_waiter *waiter, const struct tsqp_forecast *forecast,
                          uint64_t window_ns) {
    uint64_t scatter = 2 * forecast->took.deviation_ns + waiter->late.deviation_ns;
    uint64_t before = waiter->late.mean_ns + (scatter < window_ns / 2 ? scatter : window_ns / 2);
    uint64_t mean = forecast->took.mean_ns;
    return forecast->begin_ns + (mean > before ? mean - before : 0);
}

/* Where others want the core, be it the peer's own second thread, being awake early takes it from them: there
 * answers are waited for as if they were not expected, all but one in ever more of them. */
static void note_crowd(struct tsqp_waiter *waiter, uint64_t yielded_ns) {
    if (yielded_ns < CROWDED_NS)
        waiter->crowded = 0;
    else if (waiter->crowded < CROWDED_SKIPS)
        waiter->crowded = 2 * waiter->crowded + 1;
    waiter->crowded_skips = waiter->crowded;
}

static int wait_expecting(struct tsqp_waiter *waiter, const struct tsqp_watch *watch,
                          struct tsqp_forecast *forecast, uint64_t until, struct course *course) {
    uint64_t window = window_of(waiter, forecast), target = target_of(waiter, forecast, window);
    uint64_t now = tsqp_now_ns();
    bool due = now < target + window; /* else it was looked for in an earlier slice */
    if (any_ready(watch, 1))
        return TSQP_OK;
    if (waiter->crowded_skips > 0) {
        waiter->crowded_skips--;
        return wait_until(waiter, watch, 1, until, course);
    }
    if (now < target) {
        int rc = sleep_until(waiter, watch, target, until, course);
        if (rc != TSQP_AGAIN || tsqp_now_ns() < target)
            return rc;
    }
    if (due) {
        course->gives_way = true;
        bool ready = spin(waiter, watch, 1, until, window, course);
        note_crowd(waiter, course->yielded_ns);
        forecast->misses = ready ? 0 : forecast->misses + 1;
        if (ready)
            return TSQP_OK;
    }
    return block(waiter, watch, 1, until, course);
}

int tsqp_wait_answer(struct tsqp_waiter *waiter, const struct tsqp_watch *watch,
                     struct tsqp_forecast *forecast, uint64_t slice_ns) {
    uint64_t until = tsqp_now_ns() + slice_ns;
    bool timed = waiter->mode == TSQP_WAIT_AUTO || waiter->mode == TSQP_WAIT_POLL;
    struct course course = {0};
    int rc;
    if (timed && forecast->took.mean_ns > waiter->spin_max_ns)
        rc = wait_expecting(waiter, watch, forecast, until, &course);
    else
        rc = wait_until(waiter, watch, 1, until, &course);
    if (rc == TSQP_OK) {
        uint64_t took = tsqp_now_ns() - forecast->begin_ns;
        /* Waking took its time: the answer was there before. */
        uint64_t woke = course.slept ? waiter->late.mean_ns : 0;
        /* Answers that all come while this spins need no forecast. */
        if (forecast->took.count || took > waiter->spin_max_ns)
            tsqp_estimate_add(&forecast->took, took > woke ? took - woke : 0);
    }
    return rc;
}

/* `waiting` is a hint; a hostile peer may hold it above 0, or one that died while it slept left it so: the
 * cost is one system call a message. */
void tsqp_wake(uint64_t *word, uint64_t *waiting, bool futex) {
#ifdef __linux__
    if (futex && tsqp_load_seq_cst(waiting) != 0)
        syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
#else
    (void)word;
    (void)waiting;
    (void)futex;
#endif
}

void tsqp_doorbell_ring(struct tsqp_doorbell *bell) {
    atomic_fetch_add_explicit(tsqp_shared(&bell->count), 1, memory_order_seq_cst);
    tsqp_wake(&bell->count, &bell->waiting, true);
}
