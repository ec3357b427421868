/* fake_cuda.c: a CUDA driver for tests where there is no GPU.
 *
 * As much of it as tsqp calls, with the real signatures. A stream is a thread that works off what is enqueued
 * on it; device memory is host memory, and a device address of registered memory is its own plus SHIFT, so
 * that a mistaken host address is refused. What a real driver would refuse is refused: calls without a
 * current context, addresses nobody registered or allocated, words that are not aligned, copies out of
 * bounds. fake_calls() tells the calls since the last time, one a line; FAKE_CUDA_NARROW=1 makes it a device
 * without 64-bit words, and built with WITHOUT_WORDS it is a driver too old for any. */
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201 };
enum { INVALID_HANDLE = 400, NOT_READY = 600, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713 };
enum { MAX_RANGES = 64, MAX_OPS = 1 << 16, LOG_BYTES = 1 << 20, CONTEXT = 0xc0, DEPTH = 8 };
#define SHIFT (UINT64_C(1) << 48)

typedef unsigned long long CUdeviceptr;

struct range {
    uint64_t begin, nbytes;
};
struct op {
    enum { COPY, WAIT, WRITE } kind;
    unsigned bytes; /* of a word */
    uint64_t to, from, value;
};
struct stream {
    pthread_t thread;
    pthread_mutex_t lock;
    uint64_t enqueued, done;
    bool ending;
    struct op ops[MAX_OPS];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct range registered[MAX_RANGES], allocated[MAX_RANGES];
static char calls[LOG_BYTES];
static size_t calls_end;
static _Thread_local int depth;
static _Thread_local void *contexts[DEPTH];

static void tell(const char *format, ...) {
    pthread_mutex_lock(&lock);
    va_list arguments;
    va_start(arguments, format);
    int wanted = vsnprintf(calls + calls_end, LOG_BYTES - calls_end, format, arguments);
    va_end(arguments);
    if (wanted > 0 && (size_t)wanted < LOG_BYTES - calls_end)
        calls_end += (size_t)wanted;
    pthread_mutex_unlock(&lock);
}

void fake_calls(char *text, size_t nbytes) {
    pthread_mutex_lock(&lock);
    snprintf(text, nbytes, "%.*s", (int)calls_end, calls);
    calls_end = 0;
    pthread_mutex_unlock(&lock);
}

static int add(struct range *ranges, uint64_t begin, uint64_t nbytes) {
    for (int i = 0; i < MAX_RANGES; i++)
        if (ranges[i].nbytes && begin < ranges[i].begin + ranges[i].nbytes &&
            ranges[i].begin < begin + nbytes)
            return ALREADY_REGISTERED;
    for (int i = 0; i < MAX_RANGES; i++)
        if (!ranges[i].nbytes) {
            ranges[i] = (struct range){begin, nbytes};
            return SUCCESS;
        }
    return OUT_OF_MEMORY;
}

static bool drop(struct range *ranges, uint64_t begin) {
    for (int i = 0; i < MAX_RANGES; i++)
        if (ranges[i].nbytes && ranges[i].begin == begin) {
            ranges[i].nbytes = 0;
            return true;
        }
    return false;
}

static bool holds(const struct range *ranges, uint64_t begin, uint64_t nbytes) {
    for (int i = 0; i < MAX_RANGES; i++)
        if (ranges[i].nbytes && begin >= ranges[i].begin &&
            begin + nbytes <= ranges[i].begin + ranges[i].nbytes)
            return true;
    return false;
}

/* ---- the device ---- */

int cuInit(unsigned flags) {
    return flags ? INVALID_VALUE : SUCCESS;
}

int cuDriverGetVersion(int *version) {
    *version = 12040;
    return SUCCESS;
}

int cuGetErrorName(int error, const char **name) {
    switch (error) {
    case SUCCESS:
        *name = "CUDA_SUCCESS";
        return SUCCESS;
    case INVALID_VALUE:
        *name = "CUDA_ERROR_INVALID_VALUE";
        return SUCCESS;
    case OUT_OF_MEMORY:
        *name = "CUDA_ERROR_OUT_OF_MEMORY";
        return SUCCESS;
    case INVALID_DEVICE:
        *name = "CUDA_ERROR_INVALID_DEVICE";
        return SUCCESS;
    case INVALID_CONTEXT:
        *name = "CUDA_ERROR_INVALID_CONTEXT";
        return SUCCESS;
    case ALREADY_REGISTERED:
        *name = "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED";
        return SUCCESS;
    case NOT_REGISTERED:
        *name = "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED";
        return SUCCESS;
    default:
        *name = NULL;
        return INVALID_VALUE;
    }
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

int cuDeviceGetName(char *name, int nbytes, int device) {
    snprintf(name, (size_t)nbytes, "a fake");
    return device ? INVALID_DEVICE : SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 122 && !getenv("FAKE_CUDA_NARROW");
    return device ? INVALID_DEVICE : SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)(uintptr_t)CONTEXT;
    return device ? INVALID_DEVICE : SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    return device ? INVALID_DEVICE : SUCCESS;
}

int cuCtxPushCurrent_v2(void *context) {
    if (context != (void *)(uintptr_t)CONTEXT || depth == DEPTH)
        return INVALID_CONTEXT;
    contexts[depth++] = context;
    return SUCCESS;
}

int cuCtxPopCurrent_v2(void **context) {
    if (!depth)
        return INVALID_CONTEXT;
    *context = contexts[--depth];
    return SUCCESS;
}

/* ---- memory ---- */

int cuMemHostRegister_v2(void *address, size_t nbytes, unsigned flags) {
    tell("register %zu %u\n", nbytes, flags);
    if (!depth)
        return INVALID_CONTEXT;
    return nbytes ? add(registered, (uintptr_t)address, nbytes) : INVALID_VALUE;
}

int cuMemHostUnregister(void *address) {
    tell("unregister\n");
    if (!depth)
        return INVALID_CONTEXT;
    return drop(registered, (uintptr_t)address) ? SUCCESS : NOT_REGISTERED;
}

int cuMemHostGetDevicePointer_v2(CUdeviceptr *pointer, void *address, unsigned flags) {
    *pointer = (uintptr_t)address + SHIFT;
    if (!depth)
        return INVALID_CONTEXT;
    return !flags && holds(registered, (uintptr_t)address, 1) ? SUCCESS : INVALID_VALUE;
}

int cuMemAlloc_v2(CUdeviceptr *pointer, size_t nbytes) {
    if (!depth)
        return INVALID_CONTEXT;
    void *memory = nbytes ? calloc(1, nbytes) : NULL;
    if (!memory)
        return INVALID_VALUE;
    *pointer = (uintptr_t)memory;
    return add(allocated, *pointer, nbytes);
}

int cuMemFree_v2(CUdeviceptr pointer) {
    if (!depth)
        return INVALID_CONTEXT;
    if (!drop(allocated, pointer))
        return INVALID_VALUE;
    free((void *)(uintptr_t)pointer);
    return SUCCESS;
}

/* ---- streams ---- */

static uint64_t word(const struct op *op) {
    return op->bytes == 8 ? __atomic_load_n((uint64_t *)op->to, __ATOMIC_ACQUIRE)
                          : __atomic_load_n((uint32_t *)op->to, __ATOMIC_ACQUIRE);
}

static bool reached(const struct op *op) {
    uint64_t ahead = word(op) - op->value;
    return op->bytes == 8 ? (int64_t)ahead >= 0 : (int32_t)ahead >= 0;
}

static void work(const struct op *op) {
    if (op->kind == COPY)
        memcpy((void *)op->to, (void *)op->from, op->value);
    else if (op->bytes == 8)
        __atomic_store_n((uint64_t *)op->to, op->value, __ATOMIC_RELEASE);
    else
        __atomic_store_n((uint32_t *)op->to, (uint32_t)op->value, __ATOMIC_RELEASE);
}

static void *run(void *argument) {
    struct stream *stream = argument;
    for (;;) {
        pthread_mutex_lock(&stream->lock);
        bool ending = stream->ending, idle = stream->done == stream->enqueued;
        struct op op = stream->ops[stream->done % MAX_OPS];
        pthread_mutex_unlock(&stream->lock);
        if (ending)
            return NULL;
        if (idle || (op.kind == WAIT && !reached(&op))) {
            sched_yield();
            continue;
        }
        if (op.kind != WAIT)
            work(&op);
        pthread_mutex_lock(&stream->lock);
        stream->done++;
        pthread_mutex_unlock(&stream->lock);
    }
}

static int enqueue(struct stream *stream, struct op op) {
    if (!stream)
        return INVALID_HANDLE; /* the legacy default stream, which must not wait */
    pthread_mutex_lock(&stream->lock);
    bool room = stream->enqueued - stream->done < MAX_OPS;
    if (room)
        stream->ops[stream->enqueued++ % MAX_OPS] = op;
    pthread_mutex_unlock(&stream->lock);
    return room ? SUCCESS : OUT_OF_MEMORY;
}

int cuStreamCreate(void **out, unsigned flags) {
    tell("stream %u\n", flags);
    if (!depth)
        return INVALID_CONTEXT;
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream)
        return OUT_OF_MEMORY;
    pthread_mutex_init(&stream->lock, NULL);
    if (pthread_create(&stream->thread, NULL, run, stream)) {
        free(stream);
        return OUT_OF_MEMORY;
    }
    *out = stream;
    return SUCCESS;
}

int cuStreamDestroy_v2(void *handle) {
    tell("destroy\n");
    struct stream *stream = handle;
    pthread_mutex_lock(&stream->lock);
    stream->ending = true;
    pthread_mutex_unlock(&stream->lock);
    pthread_join(stream->thread, NULL);
    free(stream);
    return SUCCESS;
}

int cuStreamQuery(void *handle) {
    struct stream *stream = handle;
    pthread_mutex_lock(&stream->lock);
    bool done = stream->done == stream->enqueued;
    pthread_mutex_unlock(&stream->lock);
    return done ? SUCCESS : NOT_READY;
}

static int enqueue_copy(const char *way, uint64_t to, uint64_t from, uint64_t host, uint64_t device,
                        size_t nbytes, void *stream) {
    tell("copy %s %zu\n", way, nbytes);
    if (!depth)
        return INVALID_CONTEXT;
    if (!holds(registered, host, nbytes) || !holds(allocated, device, nbytes))
        return INVALID_VALUE;
    return enqueue(stream, (struct op){.kind = COPY, .to = to, .from = from, .value = nbytes});
}

int cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t nbytes, void *stream) {
    return enqueue_copy("in", to, (uintptr_t)from, (uintptr_t)from, to, nbytes, stream);
}

int cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t nbytes, void *stream) {
    return enqueue_copy("out", (uintptr_t)to, from, (uintptr_t)to, from, nbytes, stream);
}

#ifndef WITHOUT_WORDS
static int enqueue_word(const char *what, int kind, void *stream, CUdeviceptr pointer, uint64_t value,
                        unsigned bytes, unsigned flags) {
    tell("%s%u %llu %u\n", what, 8 * bytes, (unsigned long long)value, flags);
    if (!depth)
        return INVALID_CONTEXT;
    uint64_t address = pointer - SHIFT;
    if (flags || address % bytes || !holds(registered, address, bytes))
        return INVALID_VALUE;
    return enqueue(stream, (struct op){.kind = kind, .bytes = bytes, .to = address, .value = value});
}

int cuStreamWaitValue32_v2(void *stream, CUdeviceptr pointer, uint32_t value, unsigned flags) {
    return enqueue_word("wait", WAIT, stream, pointer, value, 4, flags);
}

int cuStreamWriteValue32_v2(void *stream, CUdeviceptr pointer, uint32_t value, unsigned flags) {
    return enqueue_word("write", WRITE, stream, pointer, value, 4, flags);
}

int cuStreamWaitValue64_v2(void *stream, CUdeviceptr pointer, uint64_t value, unsigned flags) {
    return enqueue_word("wait", WAIT, stream, pointer, value, 8, flags);
}

int cuStreamWriteValue64_v2(void *stream, CUdeviceptr pointer, uint64_t value, unsigned flags) {
    return enqueue_word("write", WRITE, stream, pointer, value, 8, flags);
}
#endif
