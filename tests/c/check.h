/* check.h: what a C test needs. A failed check is printed and ends its test; the others still run.
 *
 * Each test prints one line, "PASSED name", "FAILED name" or "SKIPPED name: reason"; run.py counts them.
 */
#ifndef TSQP_CHECK_H
#define TSQP_CHECK_H

#include <inttypes.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static jmp_buf check_exit;
static int check_failures;
static const char *check_skip_reason = "";
static const char *check_group = ""; /* printed before the names of the tests that follow */

enum { CHECK_FAILED = 1, CHECK_SKIPPED = 2 };

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition);                                  \
            longjmp(check_exit, CHECK_FAILED);                                                               \
        }                                                                                                    \
    } while (0)

/* For integers: codes, counts, lengths. */
#define CHECK_EQ(actual, expected)                                                                           \
    do {                                                                                                     \
        int64_t check_a = (int64_t)(actual), check_e = (int64_t)(expected);                                  \
        if (check_a != check_e) {                                                                            \
            printf("%s:%d: %s is %" PRId64 ", expected %s = %" PRId64 "\n", __FILE__, __LINE__, #actual,     \
                   check_a, #expected, check_e);                                                             \
            longjmp(check_exit, CHECK_FAILED);                                                               \
        }                                                                                                    \
    } while (0)

#define SKIP(reason)                                                                                         \
    do {                                                                                                     \
        check_skip_reason = (reason);                                                                        \
        longjmp(check_exit, CHECK_SKIPPED);                                                                  \
    } while (0)

static inline void check_run(const char *name, void (*test)(void)) {
    switch (setjmp(check_exit)) {
    case 0:
        test();
        printf("PASSED %s%s\n", check_group, name);
        break;
    case CHECK_SKIPPED:
        printf("SKIPPED %s%s: %s\n", check_group, name, check_skip_reason);
        break;
    default:
        check_failures++;
        printf("FAILED %s%s\n", check_group, name);
    }
    fflush(stdout);
}

#define RUN(test) check_run(#test, test)

static inline int check_result(void) {
    return check_failures ? 1 : 0;
}

/* splitmix64 (Steele, Lea, Flood 2014): the same numbers in every run and on every machine. */
static inline uint64_t check_random(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static inline void *check_malloc(size_t nbytes) {
    void *memory = malloc(nbytes ? nbytes : 1);
    if (!memory) {
        printf("no memory for %zu bytes\n", nbytes);
        exit(2);
    }
    return memory;
}

#endif
