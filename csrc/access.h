/* access.h: the only code that touches shared memory.
 *
 * Words are loaded and stored whole, 8 bytes, naturally aligned. Bulk copies go in whole 64-byte blocks on
 * the shared side (copy.c). Nothing read here may be read again to take a decision: callers keep the value.
 */
#ifndef TSQP_ACCESS_H
#define TSQP_ACCESS_H

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

static_assert(sizeof(_Atomic uint64_t) == 8, "lock-free 8-byte words");

typedef _Atomic uint64_t tsqp_shared_word;

static inline tsqp_shared_word *tsqp_shared(uint64_t *word) {
    return (tsqp_shared_word *)word;
}

/* For words whose order against others does not matter (hints, values covered by a later acquire). */
static inline uint64_t tsqp_load_relaxed(uint64_t *word) {
    return atomic_load_explicit(tsqp_shared(word), memory_order_relaxed);
}

static inline void tsqp_store_relaxed(uint64_t *word, uint64_t value) {
    atomic_store_explicit(tsqp_shared(word), value, memory_order_relaxed);
}

/* SYNC: pairs with tsqp_store_release / tsqp_publish of the same word by the peer; acquire suffices because
 * the reader only needs what the writer did before that one store. */
static inline uint64_t tsqp_load_acquire(uint64_t *word) {
    return atomic_load_explicit(tsqp_shared(word), memory_order_acquire);
}

static inline void tsqp_store_release(uint64_t *word, uint64_t value) {
    atomic_store_explicit(tsqp_shared(word), value, memory_order_release);
}

/* SYNC: the two sides of the sleep handshake (Dekker). The publisher changes `seq`, then looks at `waiting`;
 * the waiter sets `waiting`, then looks at `seq`. Release/acquire would let both look before either store is
 * seen and the waiter sleep for ever; in the single total order of seq_cst operations one of them comes
 * second. */
static inline void tsqp_publish(uint64_t *seq, uint64_t value) {
    (void)atomic_exchange_explicit(tsqp_shared(seq), value, memory_order_seq_cst);
}

static inline uint64_t tsqp_load_seq_cst(uint64_t *word) {
    return atomic_load_explicit(tsqp_shared(word), memory_order_seq_cst);
}

static inline void tsqp_store_seq_cst(uint64_t *word, uint64_t value) {
    (void)atomic_exchange_explicit(tsqp_shared(word), value, memory_order_seq_cst);
}

static inline void tsqp_add_seq_cst(uint64_t *word, uint64_t value) {
    (void)atomic_fetch_add_explicit(tsqp_shared(word), value, memory_order_seq_cst);
}

static inline void tsqp_cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Copies `nbytes` between private memory and 64-byte aligned shared memory. The shared side is read or
 * written in whole 64-byte blocks, so up to 63 bytes after the end are touched there: slots are padded for
 * it. */
void tsqp_copy_from_shared(void *dst, const void *shared_src, size_t nbytes);
void tsqp_copy_to_shared(void *shared_dst, const void *src, size_t nbytes);

/* Packs a strided tensor into aligned shared memory in one pass; strides are in bytes and may be negative. */
void tsqp_pack_to_shared(void *shared_dst, const void *src, size_t itemsize, unsigned ndim,
                         const int64_t *shape, const int64_t *strides);

#endif
