/* fuzz_message.c: the input is a message as it lies in a slot. It is validated as a receiver does it; what is
 * accepted must lie inside the message, not overlap, and be exactly what a sender would have made. */
#include "access.h"
#include "convert.h"
#include "dlpack.h"
#include "fuzz.h"
#include "tsqp.h"

/* As the receiver: the header first, then as many descriptors as the checked header allows. */
static int parse(const uint8_t *data, size_t nbytes, struct tsqp_message *message) {
    if (nbytes < sizeof message->header)
        return TSQP_TRUNCATED;
    memcpy(&message->header, data, sizeof message->header);
    int rc = tsqp_message_check_header(&message->header, nbytes);
    if (rc != TSQP_OK)
        return rc;
    size_t descs = message->header.tensor_count * sizeof message->tensors[0];
    DEMAND(message->header.tensor_count <= TSQP_MAX_TENSORS);
    DEMAND(message->header.meta_bytes <= TSQP_MAX_META_BYTES);
    DEMAND(sizeof message->header + descs + message->header.meta_bytes <= nbytes);
    memcpy(message->tensors, data + sizeof message->header, descs);
    return tsqp_message_check_tensors(message);
}

static uint64_t elements_of(const struct tsqp_tensor_desc *desc) {
    __uint128_t count = 1;
    for (unsigned d = 0; d < desc->ndim; d++) {
        DEMAND(desc->shape[d] >= 0);
        count *= (uint64_t)desc->shape[d];
        DEMAND(count < (__uint128_t)1 << 64);
    }
    return (uint64_t)count;
}

static void check_extents(const struct tsqp_message *message) {
    uint64_t end = tsqp_message_head_bytes(&message->header);
    for (uint32_t i = 0; i < message->header.tensor_count; i++) {
        const struct tsqp_tensor_desc *desc = &message->tensors[i];
        DEMAND(desc->ndim <= TSQP_MAX_NDIM);
        DEMAND(tsqp_dtype_itemsize(desc->dtype) > 0);
        DEMAND(tsqp_tensor_nbytes(desc) == elements_of(desc) * tsqp_dtype_itemsize(desc->dtype));
        DEMAND(desc->encoding < TSQP_ENCODING_END);
        DEMAND(desc->encoding != TSQP_PLAIN || desc->nbytes == tsqp_tensor_nbytes(desc));
        DEMAND(desc->offset % TSQP_ALIGN == 0);
        DEMAND(desc->offset >= end);
        DEMAND(desc->nbytes <= message->header.total_bytes - desc->offset);
        end = desc->offset + desc->nbytes;
    }
    DEMAND(end <= message->header.total_bytes);
}

/* A tensor's elements in private memory, exactly as long as they are; `aligned` is the message in a slot. */
static void decode(const struct tsqp_tensor_desc *desc, const uint8_t *aligned, uint8_t *out) {
    uint64_t rows, cols;
    tsqp_tensor_rows(desc, &rows, &cols);
    switch (desc->encoding) {
    case TSQP_PLAIN:
        tsqp_copy_from_shared(out, aligned + desc->offset, desc->nbytes);
        break;
    case TSQP_AS_BFLOAT16:
        DEMAND(desc->dtype == TSQP_FLOAT32 && desc->nbytes == 2 * elements_of(desc));
        tsqp_decode_bfloat16(out, aligned + desc->offset, desc->nbytes / 2);
        break;
    default:
        DEMAND(rows * cols == elements_of(desc));
        DEMAND(tsqp_decode_int8_rows(out, desc->dtype, aligned + desc->offset, rows, cols) == 0);
    }
}

static void check_strides(const struct tsqp_tensor_desc *desc, const DLTensor *tensor) {
    int64_t last = 0;
    for (int d = 0; d < tensor->ndim; d++) {
        DEMAND(tensor->strides[d] >= 0);
        if (elements_of(desc) > 0)
            last += (tensor->shape[d] - 1) * tensor->strides[d];
    }
    DEMAND(elements_of(desc) == 0 || (uint64_t)last + 1 == elements_of(desc));
}

/* Its tensors, as the receiver makes them when the message is all there. */
static void read_tensors(const struct tsqp_message *message, const uint8_t *data, size_t nbytes) {
    /* A slot is readable up to the end of its last block. */
    size_t padded = (nbytes + TSQP_ALIGN - 1) / TSQP_ALIGN * TSQP_ALIGN;
    uint8_t *aligned = aligned_alloc(TSQP_ALIGN, padded);
    DEMAND(aligned != NULL);
    memset(aligned, 0, padded);
    memcpy(aligned, data, nbytes);
    for (uint32_t i = 0; i < message->header.tensor_count; i++) {
        const struct tsqp_tensor_desc *desc = &message->tensors[i];
        uint8_t *out = fuzz_malloc(tsqp_tensor_nbytes(desc));
        decode(desc, aligned, out);
        DLManagedTensor *plain = tsqp_tensor_new(desc, out, NULL, NULL);
        DLManagedTensorVersioned *versioned = tsqp_tensor_new_versioned(desc, out, NULL, NULL);
        DEMAND(plain != NULL && versioned != NULL);
        check_strides(desc, &plain->dl_tensor);
        check_strides(desc, &versioned->dl_tensor);
        plain->deleter(plain);
        versioned->deleter(versioned);
        free(out);
    }
    free(aligned);
}

/* The only accepted layout is the sender's: planned and written again, the head has the same bytes. */
static void check_replanned(const struct tsqp_message *message, const uint8_t *data) {
    struct tsqp_message again = *message;
    const struct tsqp_message_header *header = &message->header;
    size_t descs = header->tensor_count * sizeof message->tensors[0];
    size_t used = sizeof *header + descs + header->meta_bytes;
    uint8_t *head = fuzz_malloc(tsqp_message_head_bytes(header));
    DEMAND(tsqp_message_plan(&again) == TSQP_OK);
    tsqp_message_write_head(&again, data + sizeof *header + descs, head);
    DEMAND(memcmp(head, data, used) == 0);
    free(head);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes) {
    static struct tsqp_message message;
    int rc = parse(data, nbytes, &message);
    DEMAND(rc <= TSQP_OK && rc >= TSQP_BAD_ENCODING);
    if (rc != TSQP_OK)
        return 0;
    check_extents(&message);
    check_replanned(&message, data);
    if (message.header.total_bytes == nbytes)
        read_tensors(&message, data, nbytes);
    return 0;
}
