/* Waits: what ends them, in each mode. No check on how long anything took; run.py has the watchdog. */
#include "access.h"
#include "check.h"
#include "tsqp.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#define MS UINT64_C(1000000)
#define LONG_NS (UINT64_C(100000) * MS) /* never reached: the watchdog is shorter */

static const enum tsqp_wait_mode MODES[] = {TSQP_WAIT_AUTO, TSQP_WAIT_SPIN, TSQP_WAIT_BLOCK, TSQP_WAIT_POLL};

struct words {
    _Alignas(64) uint64_t word, waiting, closed;
};

static struct tsqp_watch watch_of(struct words *words) {
    return (struct tsqp_watch){&words->word, words->word, &words->waiting, &words->closed};
}

static struct tsqp_waiter waiter_of(enum tsqp_wait_mode mode, bool futex) {
    struct tsqp_waiter waiter;
    memset(&waiter, 0, sizeof waiter);
    tsqp_waiter_init(&waiter, mode, 20000, futex);
    return waiter;
}

/* Runs `check` with each mode, with and without a futex. */
static void in_each_mode(void (*check)(struct tsqp_waiter *waiter)) {
    for (size_t i = 0; i < sizeof MODES / sizeof MODES[0]; i++)
        for (int futex = 0; futex < 2; futex++) {
            struct tsqp_waiter waiter = waiter_of(MODES[i], futex);
            check(&waiter);
        }
}

static void sleep_ms(long ms) {
    struct timespec ts = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&ts, NULL);
}

/* ---- one thread ---- */

static void check_ready(struct tsqp_waiter *waiter) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    tsqp_publish(&words.word, 1);
    CHECK_EQ(tsqp_wait(waiter, &watch, 1, LONG_NS), TSQP_OK);
    CHECK_EQ(tsqp_wait(waiter, &watch, 1, 0), TSQP_OK); /* even without time */
}

static void ready_word_ends_the_wait(void) {
    in_each_mode(check_ready);
}

static void check_slice(struct tsqp_waiter *waiter) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    uint64_t start = tsqp_now_ns();
    CHECK_EQ(tsqp_wait(waiter, &watch, 1, 3 * MS), TSQP_AGAIN);
    CHECK(tsqp_now_ns() - start >= 3 * MS);
    CHECK_EQ(tsqp_load_relaxed(&words.waiting), 0); /* no wake-up is asked for any more */
    CHECK_EQ(tsqp_wait(waiter, &watch, 1, 0), TSQP_AGAIN);
}

static void slice_ends_the_wait_and_not_before(void) {
    in_each_mode(check_slice);
}

static void check_closed(struct tsqp_waiter *waiter) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    words.closed = 1;
    uint64_t slice = waiter->mode == TSQP_WAIT_SPIN ? MS : LONG_NS;
    CHECK_EQ(tsqp_wait(waiter, &watch, 1, slice), TSQP_AGAIN);
    tsqp_publish(&words.word, 1);
    CHECK_EQ(tsqp_wait(waiter, &watch, 1, LONG_NS), TSQP_OK); /* what it published first still counts */
}

static void closed_word_ends_the_wait(void) {
    in_each_mode(check_closed);
}

static void without_futex_auto_polls(void) {
    CHECK_EQ(waiter_of(TSQP_WAIT_AUTO, false).mode, TSQP_WAIT_POLL);
    CHECK_EQ(waiter_of(TSQP_WAIT_POLL, true).futex, false);
}

/* On a busy machine a waiter is often kept from running, and a wait that did not run teaches nothing. */
#define ENOUGH 200

static void spin_budget_follows_what_waits_took(void) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    struct tsqp_waiter waiter = waiter_of(TSQP_WAIT_AUTO, true);
    uint64_t full = waiter.spin_ns;
    int disturbed = 0;
    CHECK_EQ(full, 20000);
    for (int i = 0; i < ENOUGH && waiter.spin_ns >= full / 4; i++) {
        uint64_t begin = tsqp_now_ns();
        CHECK_EQ(tsqp_wait(&waiter, &watch, 1, MS), TSQP_AGAIN);
        disturbed += tsqp_now_ns() - begin > 2 * MS;
    }
    if (waiter.spin_ns >= full / 4 && disturbed > ENOUGH / 2)
        SKIP("the machine is too busy for a waiter to run");
    CHECK(waiter.spin_ns < full / 4); /* an idle end hardly spins */
    tsqp_publish(&words.word, 1);
    for (int i = 0; i < ENOUGH && waiter.spin_ns < full; i++)
        CHECK_EQ(tsqp_wait(&waiter, &watch, 1, MS), TSQP_OK);
    CHECK_EQ(waiter.spin_ns, full);
}

/* ---- ended by another thread ---- */

struct later {
    struct words *words;
    bool close;
    struct tsqp_doorbell *bell;
};

static void *act_later(void *argument) {
    struct later *later = argument;
    sleep_ms(5);
    if (later->bell) {
        tsqp_doorbell_ring(later->bell);
        return NULL;
    }
    if (later->close)
        tsqp_store_seq_cst(&later->words->closed, 1);
    else
        tsqp_publish(&later->words->word, 1);
    tsqp_wake(&later->words->word, &later->words->waiting, true);
    return NULL;
}

static void check_woken(struct tsqp_waiter *waiter) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    struct later later = {.words = &words};
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, act_later, &later), 0);
    int rc = tsqp_wait(waiter, &watch, 1, LONG_NS);
    pthread_join(thread, NULL);
    CHECK_EQ(rc, TSQP_OK);
}

static void publisher_wakes_the_waiter(void) {
    in_each_mode(check_woken);
}

static void closer_wakes_the_waiter(void) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    struct tsqp_waiter waiter = waiter_of(TSQP_WAIT_BLOCK, true);
    struct later later = {.words = &words, .close = true};
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, act_later, &later), 0);
    int rc = tsqp_wait(&waiter, &watch, 1, LONG_NS);
    pthread_join(thread, NULL);
    CHECK_EQ(rc, TSQP_AGAIN);
}

static void wait_many(struct tsqp_waiter *waiter, unsigned count, bool ring_bell) {
    static struct words all[200];
    struct tsqp_watch watches[200];
    struct tsqp_doorbell bell = {0};
    memset(all, 0, sizeof all);
    for (unsigned i = 0; i < count; i++)
        watches[i] = watch_of(&all[i]);
    watches[0] = (struct tsqp_watch){&bell.count, 0, &bell.waiting, NULL};
    struct later later = {.words = &all[count - 1], .bell = ring_bell ? &bell : NULL};
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, act_later, &later), 0);
    int rc = tsqp_wait(waiter, watches, count, LONG_NS);
    pthread_join(thread, NULL);
    CHECK_EQ(rc, TSQP_OK);
    CHECK_EQ(tsqp_load_relaxed(&bell.count), ring_bell);
}

static void check_many(struct tsqp_waiter *waiter) {
    static const unsigned counts[] = {2, 5, 128, 129, 200}; /* around the most one system call watches */
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        wait_many(waiter, counts[i], false);
        wait_many(waiter, counts[i], true);
    }
}

static void any_of_many_words_or_the_bell_ends_the_wait(void) {
    in_each_mode(check_many);
}

/* ---- answers that are expected at a time ---- */

static struct tsqp_forecast forecast_of(uint64_t mean_ns) {
    struct tsqp_forecast forecast = {.kind = 1, .begin_ns = tsqp_now_ns()};
    if (mean_ns)
        tsqp_estimate_add(&forecast.took, mean_ns);
    return forecast;
}

/* Runs `check` in each mode with forecasts that know nothing, and are too early, about right, and far too
 * late. */
static void with_each_forecast(void (*check)(struct tsqp_waiter *waiter, struct tsqp_forecast *forecast)) {
    static const uint64_t means[] = {0, 1, 500000, 5 * MS, 6 * MS, LONG_NS, UINT64_MAX};
    for (size_t i = 0; i < sizeof MODES / sizeof MODES[0]; i++)
        for (int futex = 0; futex < 2; futex++)
            for (size_t k = 0; k < sizeof means / sizeof means[0]; k++) {
                struct tsqp_waiter waiter = waiter_of(MODES[i], futex);
                struct tsqp_forecast forecast = forecast_of(means[k]);
                check(&waiter, &forecast);
            }
}

static void check_answer_there(struct tsqp_waiter *waiter, struct tsqp_forecast *forecast) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    tsqp_publish(&words.word, 1);
    CHECK_EQ(tsqp_wait_answer(waiter, &watch, forecast, LONG_NS), TSQP_OK);
    CHECK_EQ(tsqp_wait_answer(waiter, &watch, forecast, 0), TSQP_OK);
}

static void an_answer_that_is_there_ends_the_wait(void) {
    with_each_forecast(check_answer_there);
}

static void check_answer_later(struct tsqp_waiter *waiter, struct tsqp_forecast *forecast) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    struct later later = {.words = &words};
    uint32_t known = forecast->took.count;
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, act_later, &later), 0);
    int rc = tsqp_wait_answer(waiter, &watch, forecast, LONG_NS);
    pthread_join(thread, NULL);
    CHECK_EQ(rc, TSQP_OK);
    CHECK(forecast->took.count - known <= 1);
    CHECK_EQ(tsqp_load_relaxed(&words.waiting), 0);
}

static void an_answer_earlier_or_later_than_expected_is_not_slept_over(void) {
    with_each_forecast(check_answer_later);
}

static void check_answer_slice(struct tsqp_waiter *waiter, struct tsqp_forecast *forecast) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    uint32_t known = forecast->took.count;
    for (int slice = 0; slice < 3; slice++) {
        uint64_t start = tsqp_now_ns();
        CHECK_EQ(tsqp_wait_answer(waiter, &watch, forecast, 3 * MS), TSQP_AGAIN);
        CHECK(tsqp_now_ns() - start >= 3 * MS);
    }
    CHECK_EQ(tsqp_wait_answer(waiter, &watch, forecast, 0), TSQP_AGAIN);
    CHECK_EQ(tsqp_load_relaxed(&words.waiting), 0);
    CHECK_EQ(forecast->took.count, known); /* nothing is learnt of an answer that did not come */
}

static void slices_hold_whatever_is_expected(void) {
    with_each_forecast(check_answer_slice);
}

static void check_answer_closed(struct tsqp_waiter *waiter, struct tsqp_forecast *forecast) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    words.closed = 1;
    uint64_t slice = waiter->mode == TSQP_WAIT_SPIN ? MS : LONG_NS;
    CHECK_EQ(tsqp_wait_answer(waiter, &watch, forecast, slice), TSQP_AGAIN);
}

static void a_closed_word_ends_the_wait_for_an_answer(void) {
    with_each_forecast(check_answer_closed);
}

static void a_closer_wakes_who_sleeps_until_an_answer_is_expected(void) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    struct tsqp_waiter waiter = waiter_of(TSQP_WAIT_AUTO, true);
    struct tsqp_forecast forecast = forecast_of(LONG_NS);
    struct later later = {.words = &words, .close = true};
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, act_later, &later), 0);
    int rc = tsqp_wait_answer(&waiter, &watch, &forecast, LONG_NS);
    pthread_join(thread, NULL);
    CHECK_EQ(rc, TSQP_AGAIN);
}

/* Whether a sleep that was to end before the slice did: on a busy machine it may outlast that. */
static bool sleeps_and_looks_once(struct tsqp_waiter *waiter) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    struct tsqp_forecast forecast = forecast_of(100 * MS);
    CHECK_EQ(tsqp_wait_answer(waiter, &watch, &forecast, 120 * MS), TSQP_AGAIN);
    if (forecast.misses == 0)
        return false;
    CHECK_EQ(forecast.misses, 1); /* looked for in vain, once */
    CHECK_EQ(tsqp_wait_answer(waiter, &watch, &forecast, MS), TSQP_AGAIN);
    CHECK_EQ(forecast.misses, 1); /* and in a later slice not again */
    return true;
}

static void answers_that_are_slept_for_leave_the_spin_budget_alone(void) {
    bool looked = false, left_alone = false;
    for (int i = 0; i < 20 && !left_alone; i++) {
        struct tsqp_waiter waiter = waiter_of(TSQP_WAIT_AUTO, true);
        uint64_t full = waiter.spin_ns;
        bool now = sleeps_and_looks_once(&waiter);
        looked |= now;
        left_alone = now && waiter.spin_ns == full;
    }
    if (!looked)
        SKIP("the machine is too busy for a sleeper to wake in time");
    CHECK(left_alone);
}

static void who_sleeps_learns_how_late_it_wakes(void) {
    struct words words = {0};
    struct tsqp_watch watch = watch_of(&words);
    struct tsqp_waiter waiter = waiter_of(TSQP_WAIT_AUTO, true);
    uint32_t before = waiter.late.count;
    struct tsqp_forecast forecast = forecast_of(100 * MS);
    CHECK_EQ(tsqp_wait_answer(&waiter, &watch, &forecast, 120 * MS), TSQP_AGAIN);
    CHECK_EQ(waiter.late.count, before + 1);
    forecast = forecast_of(LONG_NS);
    CHECK_EQ(tsqp_wait_answer(&waiter, &watch, &forecast, MS), TSQP_AGAIN);
    CHECK_EQ(waiter.late.count, before + 1); /* the slice ended the sleep */
}

/* ---- signals ---- */

static pthread_t signalled_thread;

static void on_signal(int number) {
    (void)number;
}

static void *signal_later(void *stop) {
    while (!tsqp_load_acquire(stop)) { /* again and again: the first may come before the wait sleeps */
        sleep_ms(3);
        pthread_kill(signalled_thread, SIGUSR1);
    }
    return NULL;
}

static void signal_interrupts(enum tsqp_wait_mode mode, unsigned count) {
    struct words words[3] = {{0}};
    struct tsqp_watch watches[3] = {watch_of(&words[0]), watch_of(&words[1]), watch_of(&words[2])};
    struct tsqp_waiter waiter = waiter_of(mode, true);
    uint64_t stop = 0;
    pthread_t thread;
    signalled_thread = pthread_self();
    CHECK_EQ(pthread_create(&thread, NULL, signal_later, &stop), 0);
    int rc = tsqp_wait(&waiter, watches, count, LONG_NS);
    tsqp_store_release(&stop, 1);
    pthread_join(thread, NULL);
    CHECK_EQ(rc, TSQP_INTERRUPTED);
}

static void signal_ends_the_wait(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
    signal_interrupts(TSQP_WAIT_AUTO, 1);
    signal_interrupts(TSQP_WAIT_AUTO, 3);
    signal_interrupts(TSQP_WAIT_BLOCK, 1);
    signal_interrupts(TSQP_WAIT_BLOCK, 3);
    signal_interrupts(TSQP_WAIT_POLL, 1);
}

static void signal_ends_the_sleep_until_an_answer_is_expected(void) {
    static const enum tsqp_wait_mode modes[] = {TSQP_WAIT_AUTO, TSQP_WAIT_POLL};
    for (size_t i = 0; i < 2; i++) {
        struct words words = {0};
        struct tsqp_watch watch = watch_of(&words);
        struct tsqp_waiter waiter = waiter_of(modes[i], true);
        struct tsqp_forecast forecast = forecast_of(LONG_NS);
        uint64_t stop = 0;
        pthread_t thread;
        signalled_thread = pthread_self();
        CHECK_EQ(pthread_create(&thread, NULL, signal_later, &stop), 0);
        int rc = tsqp_wait_answer(&waiter, &watch, &forecast, LONG_NS);
        tsqp_store_release(&stop, 1);
        pthread_join(thread, NULL);
        CHECK_EQ(rc, TSQP_INTERRUPTED);
    }
}

int main(void) {
    RUN(ready_word_ends_the_wait);
    RUN(slice_ends_the_wait_and_not_before);
    RUN(closed_word_ends_the_wait);
    RUN(without_futex_auto_polls);
    RUN(spin_budget_follows_what_waits_took);
    RUN(publisher_wakes_the_waiter);
    RUN(closer_wakes_the_waiter);
    RUN(any_of_many_words_or_the_bell_ends_the_wait);
    RUN(an_answer_that_is_there_ends_the_wait);
    RUN(an_answer_earlier_or_later_than_expected_is_not_slept_over);
    RUN(slices_hold_whatever_is_expected);
    RUN(a_closed_word_ends_the_wait_for_an_answer);
    RUN(a_closer_wakes_who_sleeps_until_an_answer_is_expected);
    RUN(answers_that_are_slept_for_leave_the_spin_budget_alone);
    RUN(who_sleeps_learns_how_late_it_wakes);
    RUN(signal_ends_the_wait);
    RUN(signal_ends_the_sleep_until_an_answer_is_expected);
    return check_result();
}
