/* pool.c: private memory for received tensors, kept for reuse.
 *
 * Above a few megabytes the page faults of freshly mapped memory cost more than the copy into it. Freed
 * buffers are kept by size class up to a limit; four classes per power of two waste at most a quarter. Where
 * the limit is met those go that were not used for longest, of whatever size: what a long prompt needed does
 * not keep out what each token needs.
 */
#include "tsqp.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#define HEADER_BYTES 64
#define SMALL_BYTES 4096
#define MAP_BYTES (UINT64_C(1) << 17)
#define HUGE_BYTES (UINT64_C(1) << 21)
#define CLASSES 160

struct tsqp_buffer {
    struct tsqp_buffer *next, *previous; /* idle ones of its class, the last freed first */
    struct tsqp_buffer *newer, *older;   /* all idle ones */
    uint64_t capacity;                   /* with header */
    int class;
};
_Static_assert(sizeof(struct tsqp_buffer) <= HEADER_BYTES, "the payload lies HEADER_BYTES behind it");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct tsqp_buffer *idle[CLASSES];
static struct tsqp_buffer *newest, *oldest;
static uint64_t idle_bytes;
static uint64_t limit_bytes = UINT64_C(256) << 20;

static int class_of(uint64_t nbytes, uint64_t *capacity) {
    unsigned bits = 63 - (unsigned)__builtin_clzll(nbytes);
    uint64_t step = UINT64_C(1) << (bits - 2);
    uint64_t steps = (nbytes + step - 1) / step; /* 4..8 */
    *capacity = steps * step;
    return (int)((bits - 12) * 4 + (steps - 4));
}

static struct tsqp_buffer *map_new(uint64_t capacity) {
    if (capacity < MAP_BYTES)
        return aligned_alloc(TSQP_ALIGN, capacity);
    void *base = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    if (capacity >= HUGE_BYTES)
        madvise(base, capacity, MADV_HUGEPAGE);
#endif
    return base;
}

static void unmap(struct tsqp_buffer *buffer) {
    if (buffer->capacity < MAP_BYTES)
        free(buffer);
    else
        munmap(buffer, buffer->capacity);
}

/* Both under the lock. */
static void keep(struct tsqp_buffer *buffer) {
    buffer->previous = NULL;
    buffer->next = idle[buffer->class];
    if (buffer->next)
        buffer->next->previous = buffer;
    idle[buffer->class] = buffer;
    buffer->newer = NULL;
    buffer->older = newest;
    *(newest ? &newest->newer : &oldest) = buffer;
    newest = buffer;
    idle_bytes += buffer->capacity;
}

static void take(struct tsqp_buffer *buffer) {
    *(buffer->previous ? &buffer->previous->next : &idle[buffer->class]) = buffer->next;
    if (buffer->next)
        buffer->next->previous = buffer->previous;
    *(buffer->newer ? &buffer->newer->older : &newest) = buffer->older;
    *(buffer->older ? &buffer->older->newer : &oldest) = buffer->newer;
    idle_bytes -= buffer->capacity;
}

/* Takes the oldest until no more than `most` is idle; returns them in a list, to be unmapped without the
 * lock. */
static struct tsqp_buffer *take_oldest(uint64_t most) {
    struct tsqp_buffer *taken = NULL;
    while (idle_bytes > most) {
        struct tsqp_buffer *buffer = oldest;
        take(buffer);
        buffer->next = taken;
        taken = buffer;
    }
    return taken;
}

static void unmap_all(struct tsqp_buffer *buffer) {
    while (buffer) {
        struct tsqp_buffer *next = buffer->next;
        unmap(buffer);
        buffer = next;
    }
}

struct tsqp_buffer *tsqp_buffer_new(uint64_t nbytes) {
    if (nbytes > UINT64_C(1) << 48)
        return NULL;
    uint64_t capacity = (nbytes + HEADER_BYTES + TSQP_ALIGN - 1) & ~(uint64_t)(TSQP_ALIGN - 1);
    int class = -1;
    struct tsqp_buffer *buffer = NULL;
    if (capacity >= SMALL_BYTES) {
        class = class_of(capacity, &capacity);
        pthread_mutex_lock(&lock);
        buffer = idle[class];
        if (buffer)
            take(buffer);
        pthread_mutex_unlock(&lock);
    }
    if (!buffer)
        buffer = map_new(capacity);
    if (buffer) {
        buffer->next = NULL;
        buffer->capacity = capacity;
        buffer->class = class;
    }
    return buffer;
}

void *tsqp_buffer_data(struct tsqp_buffer *buffer) {
    return (uint8_t *)buffer + HEADER_BYTES;
}

void tsqp_buffer_release(struct tsqp_buffer *buffer) {
    if (!buffer)
        return;
    struct tsqp_buffer *surplus = buffer;
    if (buffer->class >= 0) {
        pthread_mutex_lock(&lock);
        if (buffer->capacity <= limit_bytes) {
            surplus = take_oldest(limit_bytes - buffer->capacity);
            keep(buffer);
        }
        pthread_mutex_unlock(&lock);
    }
    unmap_all(surplus);
}

static void trim_to(uint64_t most) {
    pthread_mutex_lock(&lock);
    struct tsqp_buffer *surplus = take_oldest(most);
    pthread_mutex_unlock(&lock);
    unmap_all(surplus);
}

void tsqp_pool_limit(uint64_t nbytes) {
    pthread_mutex_lock(&lock);
    limit_bytes = nbytes;
    pthread_mutex_unlock(&lock);
    trim_to(nbytes);
}

void tsqp_pool_trim(void) {
    trim_to(0);
}

uint64_t tsqp_pool_idle_bytes(void) {
    pthread_mutex_lock(&lock);
    uint64_t nbytes = idle_bytes;
    pthread_mutex_unlock(&lock);
    return nbytes;
}
