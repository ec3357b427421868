/* replay.c: runs a fuzz target over stored inputs, and over changes of them, without libFuzzer.
 *
 *   replay CHANGES FILE...     CHANGES random changes of each file, besides the file itself
 *
 * An input that ends the process is left in ./crash-input.
 */
#include "fuzz.h"

#include <sys/mman.h>
#include <unistd.h>

#define MAX_BYTES (1u << 16)

static uint64_t state = 1;
static uint8_t *kept; /* the input at hand, in a file: it survives an abort */

/* splitmix64 (Steele, Lea, Flood 2014) */
static uint64_t next_random(void) {
    uint64_t z = (state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* From a block of exactly its size, so that a byte read after it is seen. */
static void run_one(const uint8_t *data, size_t nbytes) {
    uint64_t length = nbytes;
    uint8_t *exact = fuzz_malloc(nbytes);
    memcpy(exact, data, nbytes);
    memcpy(kept, &length, sizeof length);
    memcpy(kept + sizeof length, data, nbytes);
    LLVMFuzzerTestOneInput(exact, nbytes);
    free(exact);
}

static size_t change(uint8_t *data, size_t nbytes) {
    static const uint64_t WORDS[] = {0,         1,         2, 63, 64, 4096, INT32_MAX, UINT64_C(1) << 40,
                                     INT64_MAX, UINT64_MAX};
    for (unsigned i = 1 + next_random() % 4; i > 0 && nbytes > 0; i--) {
        size_t at = next_random() % nbytes;
        uint64_t word = WORDS[next_random() % (sizeof WORDS / sizeof WORDS[0])];
        switch (next_random() % 4) {
        case 0:
            data[at] ^= (uint8_t)(1u << next_random() % 8);
            break;
        case 1:
            data[at] = (uint8_t)next_random();
            break;
        case 2:
            at &= ~(size_t)7;
            memcpy(data + at, &word, nbytes - at < 8 ? nbytes - at : 8);
            break;
        default:
            nbytes = at;
        }
    }
    return nbytes;
}

static void run_file(const char *path, unsigned long changes) {
    static uint8_t original[MAX_BYTES], changed[MAX_BYTES];
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(2);
    }
    size_t nbytes = fread(original, 1, sizeof original, file);
    fclose(file);
    run_one(original, nbytes);
    for (unsigned long i = 0; i < changes; i++) {
        memcpy(changed, original, nbytes);
        run_one(changed, change(changed, nbytes));
    }
}

int main(int argc, char **argv) {
    unsigned long changes = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
    FILE *file = fopen("crash-input", "w+b");
    if (!file || ftruncate(fileno(file), MAX_BYTES + 8) != 0) {
        perror("crash-input");
        return 2;
    }
    kept = mmap(NULL, MAX_BYTES + 8, PROT_READ | PROT_WRITE, MAP_SHARED, fileno(file), 0);
    DEMAND(kept != MAP_FAILED);
    for (int i = 2; i < argc; i++)
        run_file(argv[i], changes);
    fclose(file);
    unlink("crash-input");
    printf("PASSED %d inputs and %lu changes of each\n", argc - 2, changes);
    return argc > 2 ? 0 : 1;
}
