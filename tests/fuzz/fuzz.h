/* fuzz.h: what a fuzz target needs: a demand that ends the process, and input taken piece by piece. */
#ifndef TSQP_FUZZ_H
#define TSQP_FUZZ_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

/* Both libFuzzer and replay.c keep the input that ended the process. */
#define DEMAND(condition)                                                                                    \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition);                         \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

static inline void *fuzz_malloc(size_t nbytes) {
    void *memory = malloc(nbytes ? nbytes : 1);
    DEMAND(memory != NULL);
    return memory;
}

struct fuzz_input {
    const uint8_t *at;
    size_t left;
};

/* `nbytes` of the input; zeros once it is used up. */
static inline void fuzz_take(struct fuzz_input *input, void *out, size_t nbytes) {
    size_t there = nbytes < input->left ? nbytes : input->left;
    memset(out, 0, nbytes);
    if (there)
        memcpy(out, input->at, there);
    input->at += there;
    input->left -= there;
}

static inline uint8_t fuzz_u8(struct fuzz_input *input) {
    uint8_t value;
    fuzz_take(input, &value, sizeof value);
    return value;
}

static inline uint16_t fuzz_u16(struct fuzz_input *input) {
    uint16_t value;
    fuzz_take(input, &value, sizeof value);
    return value;
}

static inline uint64_t fuzz_u64(struct fuzz_input *input) {
    uint64_t value;
    fuzz_take(input, &value, sizeof value);
    return value;
}

#endif
