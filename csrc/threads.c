/* threads.c: a fixed pool of threads that share the operators' work with their caller.
 *
 * One piece of work occupies the pool at a time; whoever finds it occupied works alone, so nobody ever waits
 * for another caller. Pieces are handed out one by one: a thread that wakes late, or whose core is busy with
 * the other process, just takes fewer. A worker that joins after the last piece was taken goes back to sleep
 * and is not waited for.
 */
#include "access.h"
#include "kernels.h"
#include "tsqp.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

/* Worth about as much as falling asleep and being woken; an idle pool burns no core. */
#define SPIN_NS UINT64_C(10000)
#define SPINS_PER_CLOCK_READ 32

struct work {
    tsqp_task task;
    void *context;
    size_t count, grain;
};

static struct {
    pthread_mutex_t occupied; /* held by the caller whose work it is */
    pthread_mutex_t lock;     /* everything below but the atomics */
    pthread_cond_t posted, finished;
    struct work work;
    bool open, stop;
    unsigned wanted; /* workers that may still join */
    unsigned joined; /* numbers the participants of this work */
    unsigned active; /* workers that joined and have not finished */
    unsigned running;
    pthread_t threads[TSQP_MAX_THREADS];
    _Atomic size_t next;      /* the first element nobody has taken */
    _Atomic unsigned posts;   /* changes with each work; what an idle worker spins on */
    _Atomic unsigned working; /* `active`, for the caller's short spin */
    _Atomic unsigned limit;   /* the user's setting, callers included */
} pool = {.occupied = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .posted = PTHREAD_COND_INITIALIZER,
          .finished = PTHREAD_COND_INITIALIZER,
          .limit = 1};

/* A task that starts work of its own does it alone: its thread is one of those it would wait for. */
static _Thread_local bool inside;

/* SYNC: relaxed. A piece is owned by whoever's fetch_add returned it; the work itself was read under the
 * lock, and the results are published by the lock that ends the participation. */
static void take_pieces(const struct work *work, unsigned worker) {
    for (;;) {
        size_t begin = atomic_fetch_add_explicit(&pool.next, work->grain, memory_order_relaxed);
        if (begin >= work->count)
            return;
        size_t left = work->count - begin;
        work->task(work->context, worker, begin, begin + (left < work->grain ? left : work->grain));
    }
}

/* SYNC: relaxed loads are hints to stop spinning; what they announce is read under the lock. */
static void spin_while(_Atomic unsigned *word, unsigned value) {
    uint64_t begin = tsqp_now_ns();
    do
        for (int i = 0; i < SPINS_PER_CLOCK_READ; i++) {
            if (atomic_load_explicit(word, memory_order_relaxed) != value)
                return;
            tsqp_cpu_relax();
        }
    while (tsqp_now_ns() - begin < SPIN_NS);
}

static void *work_for_ever(void *unused) {
    (void)unused;
    inside = true;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.stop && !(pool.open && pool.wanted > 0))
            pthread_cond_wait(&pool.posted, &pool.lock);
        if (pool.stop)
            break;
        struct work work = pool.work;
        unsigned worker = ++pool.joined;
        pool.wanted--;
        atomic_store_explicit(&pool.working, ++pool.active, memory_order_relaxed);
        pthread_mutex_unlock(&pool.lock);
        take_pieces(&work, worker);
        pthread_mutex_lock(&pool.lock);
        unsigned posts = atomic_load_explicit(&pool.posts, memory_order_relaxed);
        atomic_store_explicit(&pool.working, --pool.active, memory_order_relaxed);
        if (pool.active == 0)
            pthread_cond_signal(&pool.finished);
        pthread_mutex_unlock(&pool.lock);
        spin_while(&pool.posts, posts);
        pthread_mutex_lock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

/* ---- the pool's life; under `occupied` ---- */

/* Only the thread that forked lives in the child: it starts with no workers and new locks. */
static void forget_after_fork(void) {
    pthread_mutex_init(&pool.occupied, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.posted, NULL);
    pthread_cond_init(&pool.finished, NULL);
    pool.open = pool.stop = false;
    pool.active = pool.running = pool.wanted = 0;
    inside = false;
}

/* As early as this library is loaded: any lock may be held by another thread at the moment of a fork. */
__attribute__((constructor)) static void prepare_for_forks(void) {
    pthread_atfork(NULL, NULL, forget_after_fork);
}

static void start(unsigned workers) {
    if (pool.running >= workers)
        return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads that know Python */
    while (pool.running < workers &&
           pthread_create(&pool.threads[pool.running], NULL, work_for_ever, NULL) == 0)
        pool.running++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void stop(void) {
    pthread_mutex_lock(&pool.lock);
    pool.stop = true;
    pthread_cond_broadcast(&pool.posted);
    pthread_mutex_unlock(&pool.lock);
    for (unsigned i = 0; i < pool.running; i++)
        pthread_join(pool.threads[i], NULL);
    pool.running = 0;
    pool.stop = false;
}

void tsqp_threads_stop(void) {
    pthread_mutex_lock(&pool.occupied);
    stop();
    pthread_mutex_unlock(&pool.occupied);
}

void tsqp_threads_set(unsigned count) {
    count = count < 1 ? 1 : count > TSQP_MAX_THREADS ? TSQP_MAX_THREADS : count;
    pthread_mutex_lock(&pool.occupied);
    if (pool.running != 0 && pool.running != count - 1)
        stop();
    atomic_store_explicit(&pool.limit, count, memory_order_relaxed);
    pthread_mutex_unlock(&pool.occupied);
}

/* SYNC: relaxed; a number by itself. */
unsigned tsqp_threads(void) {
    return atomic_load_explicit(&pool.limit, memory_order_relaxed);
}

unsigned tsqp_threads_running(void) {
    pthread_mutex_lock(&pool.occupied);
    unsigned running = pool.running;
    pthread_mutex_unlock(&pool.occupied);
    return running;
}

/* ---- work ---- */

static void post(const struct work *work, unsigned workers) {
    pthread_mutex_lock(&pool.lock);
    pool.work = *work;
    pool.open = true;
    pool.wanted = workers;
    pool.joined = 0;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&pool.posts, 1, memory_order_relaxed);
    for (unsigned i = 0; i < workers; i++)
        pthread_cond_signal(&pool.posted);
    pthread_mutex_unlock(&pool.lock);
}

static void finish(void) {
    unsigned active = atomic_load_explicit(&pool.working, memory_order_relaxed);
    if (active != 0)
        spin_while(&pool.working, active);
    pthread_mutex_lock(&pool.lock);
    pool.open = false; /* from here on nobody joins */
    while (pool.active > 0)
        pthread_cond_wait(&pool.finished, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

void tsqp_parallel(tsqp_task task, void *context, size_t count, size_t grain, unsigned participants) {
    if (count == 0)
        return;
    if (count <= grain || participants < 2 || inside || pthread_mutex_trylock(&pool.occupied) != 0) {
        task(context, 0, 0, count);
        return;
    }
    unsigned limit = tsqp_threads();
    participants = participants < limit ? participants : limit;
    start(participants - 1);
    struct work work = {task, context, count, grain};
    unsigned workers = participants - 1 < pool.running ? participants - 1 : pool.running;
    if (workers > 0) {
        inside = true;
        post(&work, workers);
        take_pieces(&work, 0);
        finish();
        inside = false;
    } else {
        task(context, 0, 0, count);
    }
    pthread_mutex_unlock(&pool.occupied);
}
