/* Message headers: what is planned is accepted, every deviation from it has its own code. */
#include "check.h"
#include "tsqp.h"

#include <string.h>

static const char META[] = "\x81\xa5layer\x03";
#define META_BYTES (sizeof META - 1)

static struct tsqp_tensor_desc desc(unsigned dtype, unsigned ndim, const int64_t *shape) {
    struct tsqp_tensor_desc out = {.dtype = (uint8_t)dtype, .ndim = (uint8_t)ndim};
    memcpy(out.shape, shape, ndim * sizeof *shape);
    return out;
}

/* float32 [2, 3], bfloat16 0-d, int64 [0, 5] and some meta. */
static struct tsqp_message planned(void) {
    struct tsqp_message message;
    memset(&message, 0, sizeof message);
    message.header.tag = 7;
    message.header.request_id = 42;
    message.header.tensor_count = 3;
    message.header.meta_bytes = META_BYTES;
    message.tensors[0] = desc(TSQP_FLOAT32, 2, (int64_t[]){2, 3});
    message.tensors[1] = desc(TSQP_BFLOAT16, 0, (int64_t[]){0});
    message.tensors[2] = desc(TSQP_INT64, 2, (int64_t[]){0, 5});
    CHECK_EQ(tsqp_message_plan(&message), TSQP_OK);
    return message;
}

static int check_message(const struct tsqp_message *message, uint64_t available) {
    int rc = tsqp_message_check_header(&message->header, available);
    return rc ? rc : tsqp_message_check_tensors(message);
}

static int check_all(const struct tsqp_message *message) {
    return check_message(message, message->header.total_bytes);
}

static void plan_lays_out_aligned_tensors(void) {
    struct tsqp_message message = planned();
    uint64_t head = tsqp_message_head_bytes(&message.header);
    CHECK_EQ(head, (128 + 3 * 96 + META_BYTES + 63) / 64 * 64);
    CHECK_EQ(message.tensors[0].nbytes, 24);
    CHECK_EQ(message.tensors[0].offset, head);
    CHECK_EQ(message.tensors[1].nbytes, 2);
    CHECK_EQ(message.tensors[1].offset, head + 64);
    CHECK_EQ(message.tensors[2].nbytes, 0);
    CHECK_EQ(message.tensors[2].offset, head + 128);
    CHECK_EQ(message.header.total_bytes, head + 128);
    CHECK_EQ(check_all(&message), TSQP_OK);
}

static void written_head_reads_back(void) {
    struct tsqp_message message = planned(), copy;
    uint64_t head = tsqp_message_head_bytes(&message.header);
    uint8_t *bytes = check_malloc(head); /* exactly: a sanitizer sees one byte too many */
    memset(bytes, 0xee, head);
    tsqp_message_write_head(&message, META, bytes);
    memset(&copy, 0, sizeof copy);
    memcpy(&copy.header, bytes, sizeof copy.header);
    memcpy(copy.tensors, bytes + sizeof copy.header, 3 * sizeof copy.tensors[0]);
    CHECK(memcmp(&copy.header, &message.header, sizeof copy.header) == 0);
    CHECK(memcmp(copy.tensors, message.tensors, 3 * sizeof copy.tensors[0]) == 0);
    CHECK(memcmp(bytes + 128 + 3 * 96, META, META_BYTES) == 0);
    for (uint64_t i = 128 + 3 * 96 + META_BYTES; i < head; i++)
        CHECK_EQ(bytes[i], 0);
    CHECK_EQ(check_all(&copy), TSQP_OK);
    free(bytes);
}

static void empty_message_is_one_header(void) {
    struct tsqp_message message;
    memset(&message, 0, sizeof message);
    CHECK_EQ(tsqp_message_plan(&message), TSQP_OK);
    CHECK_EQ(message.header.total_bytes, 128);
    CHECK_EQ(check_all(&message), TSQP_OK);
    uint8_t bytes[128];
    tsqp_message_write_head(&message, NULL, bytes);
    CHECK(memcmp(bytes, &message.header, 128) == 0);
}

static void largest_counts_are_accepted(void) {
    struct tsqp_message message;
    memset(&message, 0, sizeof message);
    message.header.tensor_count = TSQP_MAX_TENSORS;
    message.header.meta_bytes = TSQP_MAX_META_BYTES;
    for (unsigned i = 0; i < TSQP_MAX_TENSORS; i++)
        message.tensors[i] = desc(TSQP_UINT8, 8, (int64_t[]){1, 2, 1, 3, 1, 1, 2, 1});
    CHECK_EQ(tsqp_message_plan(&message), TSQP_OK);
    CHECK_EQ(message.tensors[63].nbytes, 12);
    CHECK_EQ(check_all(&message), TSQP_OK);
}

static void dtypes_have_their_sizes(void) {
    static const uint32_t sizes[] = {0, 4, 2, 2, 8, 1, 2, 4, 8, 1, 2, 4, 1, 1, 1};
    CHECK_EQ(sizeof sizes / sizeof sizes[0], TSQP_DTYPE_END);
    for (unsigned dtype = 0; dtype < TSQP_DTYPE_END; dtype++)
        CHECK_EQ(tsqp_dtype_itemsize(dtype), sizes[dtype]);
    CHECK_EQ(tsqp_dtype_itemsize(TSQP_DTYPE_END), 0);
    CHECK_EQ(tsqp_dtype_itemsize(255), 0);
    CHECK_EQ(tsqp_dtype_itemsize(UINT32_MAX), 0);
}

/* ---- rejections, one by one ---- */

/* Changes one field of an accepted message, on the receiving side. */
#define REJECTS(name, code, change)                                                                          \
    static void rejects_##name(void) {                                                                       \
        struct tsqp_message message = planned();                                                             \
        struct tsqp_message_header *header = &message.header;                                                \
        struct tsqp_tensor_desc *tensor = &message.tensors[0];                                               \
        (void)header, (void)tensor;                                                                          \
        CHECK_EQ(check_all(&message), TSQP_OK);                                                              \
        change;                                                                                              \
        CHECK_EQ(check_all(&message), code);                                                                 \
    }

REJECTS(magic, TSQP_BAD_MAGIC, header->magic ^= 1)
REJECTS(version, TSQP_BAD_VERSION, header->version++)
REJECTS(header_bytes, TSQP_BAD_VERSION, header->header_bytes = 64)
REJECTS(too_many_tensors, TSQP_TOO_MANY_TENSORS, header->tensor_count = TSQP_MAX_TENSORS + 1)
REJECTS(huge_tensor_count, TSQP_TOO_MANY_TENSORS, header->tensor_count = UINT32_MAX)
REJECTS(meta, TSQP_BAD_META, header->meta_bytes = TSQP_MAX_META_BYTES + 1)
REJECTS(huge_meta, TSQP_BAD_META, header->meta_bytes = UINT32_MAX)
REJECTS(header_reserved_first, TSQP_BAD_RESERVED, header->reserved[0] = 1)
REJECTS(header_reserved_last, TSQP_BAD_RESERVED, header->reserved[6] = UINT64_C(1) << 63)
REJECTS(total_below_head, TSQP_BAD_TOTAL, header->total_bytes = 128)
REJECTS(total_too_small, TSQP_BAD_TOTAL, header->total_bytes -= 64)
REJECTS(total_too_large, TSQP_BAD_TOTAL, header->total_bytes += 64)
REJECTS(dtype_zero, TSQP_BAD_DTYPE, tensor->dtype = 0)
REJECTS(dtype_after_last, TSQP_BAD_DTYPE, tensor->dtype = TSQP_DTYPE_END)
REJECTS(rank_9, TSQP_BAD_RANK, tensor->ndim = 9)
REJECTS(rank_255, TSQP_BAD_RANK, tensor->ndim = 255)
REJECTS(negative_shape, TSQP_BAD_SHAPE, tensor->shape[1] = -3)
REJECTS(two_negative_shapes, TSQP_BAD_SHAPE, (tensor->shape[0] = -2, tensor->shape[1] = -3))
REJECTS(overflowing_shape, TSQP_BAD_SHAPE, tensor->shape[0] = INT64_MAX)
REJECTS(shape_that_wraps, TSQP_BAD_SHAPE, (tensor->shape[0] = INT64_C(1) << 62, tensor->shape[1] = 16))
REJECTS(overflow_beside_zero, TSQP_BAD_SHAPE,
        (tensor[2].ndim = 3, tensor[2].shape[1] = INT64_C(1) << 40, tensor[2].shape[2] = INT64_C(1) << 40))
REJECTS(shape_after_rank, TSQP_BAD_SHAPE, tensor->shape[2] = 1)
REJECTS(nbytes_too_small, TSQP_BAD_NBYTES, tensor->nbytes--)
REJECTS(nbytes_too_large, TSQP_BAD_NBYTES, tensor->nbytes++)
REJECTS(nbytes_of_empty, TSQP_BAD_NBYTES, tensor[2].nbytes = 8)
REJECTS(shape_not_matching_nbytes, TSQP_BAD_NBYTES, tensor->shape[0] = 3)
REJECTS(misaligned_offset, TSQP_BAD_OFFSET, tensor->offset++)
REJECTS(offset_into_head, TSQP_BAD_OFFSET, tensor->offset = 0)
REJECTS(offset_past_end, TSQP_BAD_OFFSET, tensor[1].offset = UINT64_MAX - 63)
REJECTS(overlapping_tensors, TSQP_BAD_OFFSET, tensor[1].offset = tensor[0].offset)
REJECTS(tensor_reserved0, TSQP_BAD_RESERVED, tensor->reserved0 = 1)
REJECTS(tensor_reserved1, TSQP_BAD_RESERVED, tensor->reserved1 = 1)
REJECTS(tensor_reserved2, TSQP_BAD_RESERVED, tensor->reserved2 = 1)

static void rejects_truncated(void) {
    struct tsqp_message message = planned();
    CHECK_EQ(check_message(&message, 0), TSQP_TRUNCATED);
    CHECK_EQ(check_message(&message, 127), TSQP_TRUNCATED);
    CHECK_EQ(check_message(&message, tsqp_message_head_bytes(&message.header) - 1), TSQP_TRUNCATED);
    CHECK_EQ(check_message(&message, tsqp_message_head_bytes(&message.header)), TSQP_OK);
}

/* ---- rejections of the sender's own input ---- */

static int plan_one(unsigned dtype, unsigned ndim, const int64_t *shape) {
    struct tsqp_message message;
    memset(&message, 0, sizeof message);
    message.header.tensor_count = 1;
    message.tensors[0] = desc(dtype, ndim > 8 ? 8 : ndim, shape);
    message.tensors[0].ndim = (uint8_t)ndim;
    return tsqp_message_plan(&message);
}

static void plan_rejects_bad_tensors(void) {
    int64_t ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    CHECK_EQ(plan_one(TSQP_FLOAT32, 8, ones), TSQP_OK);
    CHECK_EQ(plan_one(TSQP_FLOAT32, 9, ones), TSQP_BAD_RANK);
    CHECK_EQ(plan_one(0, 1, ones), TSQP_BAD_DTYPE);
    CHECK_EQ(plan_one(TSQP_DTYPE_END, 1, ones), TSQP_BAD_DTYPE);
    CHECK_EQ(plan_one(TSQP_FLOAT32, 1, (int64_t[]){-1}), TSQP_BAD_SHAPE);
    CHECK_EQ(plan_one(TSQP_FLOAT32, 2, (int64_t[]){INT64_MAX, 2}), TSQP_BAD_SHAPE);
    CHECK_EQ(plan_one(TSQP_FLOAT64, 1, (int64_t[]){INT64_C(1) << 45}), TSQP_OK);
    CHECK_EQ(plan_one(TSQP_FLOAT64, 1, (int64_t[]){(INT64_C(1) << 45) + 1}), TSQP_BAD_SHAPE);
}

static void plan_rejects_bad_counts(void) {
    struct tsqp_message message = planned();
    message.header.tensor_count = TSQP_MAX_TENSORS + 1;
    CHECK_EQ(tsqp_message_plan(&message), TSQP_TOO_MANY_TENSORS);
    message = planned();
    message.header.meta_bytes = TSQP_MAX_META_BYTES + 1;
    CHECK_EQ(tsqp_message_plan(&message), TSQP_BAD_META);
}

static void plan_clears_what_the_caller_left(void) {
    struct tsqp_message message = planned(), again = message;
    again.header.reserved[3] = 9;
    again.header.magic = 0;
    again.tensors[0].reserved2 = 9;
    again.tensors[0].shape[7] = -1;
    again.tensors[1].offset = 1;
    CHECK_EQ(tsqp_message_plan(&again), TSQP_OK);
    CHECK(memcmp(&again, &message, sizeof message) == 0);
}

/* ---- whatever arrives ---- */

static void flip(uint64_t *state, struct tsqp_message *message) {
    static const uint64_t interesting[] = {0, 1, 8, 9, 64, 127, 128, 255, UINT32_MAX, UINT64_MAX, INT64_MAX};
    uint64_t span = sizeof message->header + 3 * sizeof message->tensors[0];
    uint64_t at = check_random(state) % span;
    uint64_t value = check_random(state);
    if (value & 1) {
        ((uint8_t *)message)[at] ^= (uint8_t)(1u << (value >> 8 & 7));
        return;
    }
    static const uint64_t widths[] = {1, 2, 4, 8};
    uint64_t width = widths[value >> 1 & 3];
    memcpy((uint8_t *)message + at / width * width, &interesting[(value >> 8) % 11], width);
}

/* Only what tsqp_message_plan makes is accepted: an accepted message is its own plan. */
static void mutated_messages_are_rejected_or_canonical(void) {
    uint64_t state = 1, accepted = 0;
    for (int i = 0; i < 300000; i++) {
        struct tsqp_message message = planned();
        for (uint64_t n = check_random(&state) % 3 + 1; n > 0; n--)
            flip(&state, &message);
        if (check_message(&message, 4096) != TSQP_OK)
            continue;
        struct tsqp_message replanned = message;
        accepted++;
        CHECK_EQ(tsqp_message_plan(&replanned), TSQP_OK);
        CHECK(memcmp(&replanned, &message, sizeof message) == 0);
    }
    CHECK(accepted > 1000); /* flips of the tag and other free fields */
}

int main(void) {
    RUN(plan_lays_out_aligned_tensors);
    RUN(written_head_reads_back);
    RUN(empty_message_is_one_header);
    RUN(largest_counts_are_accepted);
    RUN(dtypes_have_their_sizes);
    RUN(rejects_magic);
    RUN(rejects_version);
    RUN(rejects_header_bytes);
    RUN(rejects_too_many_tensors);
    RUN(rejects_huge_tensor_count);
    RUN(rejects_meta);
    RUN(rejects_huge_meta);
    RUN(rejects_header_reserved_first);
    RUN(rejects_header_reserved_last);
    RUN(rejects_total_below_head);
    RUN(rejects_total_too_small);
    RUN(rejects_total_too_large);
    RUN(rejects_dtype_zero);
    RUN(rejects_dtype_after_last);
    RUN(rejects_rank_9);
    RUN(rejects_rank_255);
    RUN(rejects_negative_shape);
    RUN(rejects_two_negative_shapes);
    RUN(rejects_overflowing_shape);
    RUN(rejects_shape_that_wraps);
    RUN(rejects_overflow_beside_zero);
    RUN(rejects_shape_after_rank);
    RUN(rejects_nbytes_too_small);
    RUN(rejects_nbytes_too_large);
    RUN(rejects_nbytes_of_empty);
    RUN(rejects_shape_not_matching_nbytes);
    RUN(rejects_misaligned_offset);
    RUN(rejects_offset_into_head);
    RUN(rejects_offset_past_end);
    RUN(rejects_overlapping_tensors);
    RUN(rejects_tensor_reserved0);
    RUN(rejects_tensor_reserved1);
    RUN(rejects_tensor_reserved2);
    RUN(rejects_truncated);
    RUN(plan_rejects_bad_tensors);
    RUN(plan_rejects_bad_counts);
    RUN(plan_clears_what_the_caller_left);
    RUN(mutated_messages_are_rejected_or_canonical);
    return check_result();
}
