/* fuzz_message.c: the input is a message as it lies in a slot. It is validated as a receiver does it; what is
 * accepted must lie inside the message, not overlap, and be exactly what a sender would have made. */
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
        DEMAND(desc->nbytes == elements_of(desc) * tsqp_dtype_itemsize(desc->dtype));
        DEMAND(desc->offset % TSQP_ALIGN == 0);
        DEMAND(desc->offset >= end);
        DEMAND(desc->nbytes <= message->header.total_bytes - desc->offset);
        end = desc->offset + desc->nbytes;
    }
    DEMAND(end <= message->header.total_bytes);
}

/* Its tensors, as the receiver makes them when the message is all there. */
static void read_tensors(const struct tsqp_message *message, const uint8_t *data) {
    for (uint32_t i = 0; i < message->header.tensor_count; i++) {
        const struct tsqp_tensor_desc *desc = &message->tensors[i];
        uint8_t *copy = fuzz_malloc(desc->nbytes);
        memcpy(copy, data + desc->offset, desc->nbytes);
        DLManagedTensor *tensor = tsqp_tensor_new(desc, copy, NULL, NULL);
        DEMAND(tensor != NULL);
        int64_t last = 0;
        for (int d = 0; d < tensor->dl_tensor.ndim; d++) {
            DEMAND(tensor->dl_tensor.strides[d] >= 0);
            if (desc->nbytes > 0)
                last += (tensor->dl_tensor.shape[d] - 1) * tensor->dl_tensor.strides[d];
        }
        uint64_t itemsize = tsqp_dtype_itemsize(desc->dtype);
        DEMAND(desc->nbytes == 0 || ((uint64_t)last + 1) * itemsize == desc->nbytes);
        tsqp_tensor_delete(tensor);
        free(copy);
    }
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
    DEMAND(rc <= TSQP_OK && rc >= TSQP_BAD_TOTAL);
    if (rc != TSQP_OK)
        return 0;
    check_extents(&message);
    check_replanned(&message, data);
    if (message.header.total_bytes == nbytes)
        read_tensors(&message, data);
    return 0;
}
