/* codec.c: the message header. Works on private memory only; a decoded field was copied in before. */
#include "convert.h"
#include "tsqp.h"

#include <string.h>

static const uint8_t ITEMSIZE[TSQP_DTYPE_END] = {
    [TSQP_FLOAT32] = 4,       [TSQP_FLOAT16] = 2,     [TSQP_BFLOAT16] = 2, [TSQP_FLOAT64] = 8,
    [TSQP_INT8] = 1,          [TSQP_INT16] = 2,       [TSQP_INT32] = 4,    [TSQP_INT64] = 8,
    [TSQP_UINT8] = 1,         [TSQP_UINT16] = 2,      [TSQP_UINT32] = 4,   [TSQP_BOOL] = 1,
    [TSQP_FLOAT8_E4M3FN] = 1, [TSQP_FLOAT8_E5M2] = 1,
};

/* No message reaches this; keeps every sum of 64 tensors and their padding far from overflow. */
#define MAX_TENSOR_BYTES (UINT64_C(1) << 48)

static uint64_t align_up(uint64_t value) {
    return (value + TSQP_ALIGN - 1) & ~(uint64_t)(TSQP_ALIGN - 1);
}

uint32_t tsqp_dtype_itemsize(unsigned dtype) {
    return dtype < TSQP_DTYPE_END ? ITEMSIZE[dtype] : 0;
}

/* The checked multiply: bytes of a shape's elements in memory, or the code of what is wrong with it. */
static int shape_nbytes(const struct tsqp_tensor_desc *tensor, uint64_t *out) {
    uint64_t itemsize = tsqp_dtype_itemsize(tensor->dtype);
    if (itemsize == 0)
        return TSQP_BAD_DTYPE;
    if (tensor->ndim > TSQP_MAX_NDIM)
        return TSQP_BAD_RANK;
    uint64_t nbytes = itemsize;
    bool empty = false;
    for (unsigned i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] < 0)
            return TSQP_BAD_SHAPE;
        uint64_t dim = (uint64_t)tensor->shape[i];
        if (dim == 0)
            empty = true; /* the other dimensions must still be sane: strides are computed from them */
        else if (nbytes > MAX_TENSOR_BYTES / dim)
            return TSQP_BAD_SHAPE;
        else
            nbytes *= dim;
    }
    *out = empty ? 0 : nbytes;
    return TSQP_OK;
}

uint64_t tsqp_tensor_nbytes(const struct tsqp_tensor_desc *tensor) {
    uint64_t nbytes;
    return shape_nbytes(tensor, &nbytes) == TSQP_OK ? nbytes : 0;
}

void tsqp_tensor_rows(const struct tsqp_tensor_desc *tensor, uint64_t *rows, uint64_t *cols) {
    *cols = tensor->ndim ? (uint64_t)tensor->shape[tensor->ndim - 1] : 1;
    uint64_t count = tsqp_tensor_nbytes(tensor) / tsqp_dtype_itemsize(tensor->dtype);
    *rows = *cols ? count / *cols : 0;
}

/* Bytes of a tensor on the wire. */
static int wire_nbytes(const struct tsqp_tensor_desc *tensor, uint64_t *out) {
    uint64_t rows, cols;
    int rc = shape_nbytes(tensor, out);
    if (rc || tensor->encoding == TSQP_PLAIN)
        return rc;
    tsqp_tensor_rows(tensor, &rows, &cols);
    return tsqp_encoded_bytes(tensor->encoding, tensor->dtype, rows, cols, out);
}

uint64_t tsqp_message_head_bytes(const struct tsqp_message_header *header) {
    return align_up(sizeof *header + header->tensor_count * sizeof(struct tsqp_tensor_desc) +
                    header->meta_bytes);
}

int tsqp_message_plan(struct tsqp_message *message) {
    struct tsqp_message_header *header = &message->header;
    if (header->tensor_count > TSQP_MAX_TENSORS)
        return TSQP_TOO_MANY_TENSORS;
    if (header->meta_bytes > TSQP_MAX_META_BYTES)
        return TSQP_BAD_META;
    header->magic = TSQP_MESSAGE_MAGIC;
    header->version = TSQP_MESSAGE_VERSION;
    header->header_bytes = sizeof *header;
    memset(header->reserved, 0, sizeof header->reserved);
    uint64_t offset = tsqp_message_head_bytes(header);
    for (uint32_t i = 0; i < header->tensor_count; i++) {
        struct tsqp_tensor_desc *tensor = &message->tensors[i];
        int rc = wire_nbytes(tensor, &tensor->nbytes);
        if (rc)
            return rc;
        for (unsigned d = tensor->ndim; d < TSQP_MAX_NDIM; d++)
            tensor->shape[d] = 0;
        tensor->reserved0 = 0;
        tensor->reserved1 = 0;
        tensor->reserved2 = 0;
        tensor->offset = offset;
        offset += align_up(tensor->nbytes);
    }
    header->total_bytes = offset;
    return TSQP_OK;
}

void tsqp_message_write_head(const struct tsqp_message *message, const void *meta, void *dst) {
    const struct tsqp_message_header *header = &message->header;
    uint8_t *at = dst;
    uint64_t descs = header->tensor_count * sizeof(struct tsqp_tensor_desc);
    uint64_t used = sizeof *header + descs + header->meta_bytes;
    memcpy(at, header, sizeof *header);
    memcpy(at + sizeof *header, message->tensors, descs);
    if (header->meta_bytes)
        memcpy(at + sizeof *header + descs, meta, header->meta_bytes);
    memset(at + used, 0, tsqp_message_head_bytes(header) - used);
}

int tsqp_message_check_header(const struct tsqp_message_header *header, uint64_t available_bytes) {
    if (available_bytes < sizeof *header)
        return TSQP_TRUNCATED;
    if (header->magic != TSQP_MESSAGE_MAGIC)
        return TSQP_BAD_MAGIC;
    if (header->version != TSQP_MESSAGE_VERSION || header->header_bytes != sizeof *header)
        return TSQP_BAD_VERSION;
    if (header->tensor_count > TSQP_MAX_TENSORS)
        return TSQP_TOO_MANY_TENSORS;
    if (header->meta_bytes > TSQP_MAX_META_BYTES)
        return TSQP_BAD_META;
    for (size_t i = 0; i < sizeof header->reserved / sizeof header->reserved[0]; i++)
        if (header->reserved[i] != 0)
            return TSQP_BAD_RESERVED;
    if (tsqp_message_head_bytes(header) > header->total_bytes)
        return TSQP_BAD_TOTAL;
    if (tsqp_message_head_bytes(header) > available_bytes)
        return TSQP_TRUNCATED;
    return TSQP_OK;
}

static int check_desc(const struct tsqp_tensor_desc *tensor, uint64_t offset) {
    uint64_t nbytes;
    int rc = wire_nbytes(tensor, &nbytes);
    if (rc)
        return rc;
    if (tensor->nbytes != nbytes)
        return TSQP_BAD_NBYTES;
    if (tensor->offset != offset)
        return TSQP_BAD_OFFSET;
    for (unsigned d = tensor->ndim; d < TSQP_MAX_NDIM; d++)
        if (tensor->shape[d] != 0)
            return TSQP_BAD_SHAPE;
    return tensor->reserved0 || tensor->reserved1 || tensor->reserved2 ? TSQP_BAD_RESERVED : TSQP_OK;
}

int tsqp_message_check_tensors(const struct tsqp_message *message) {
    const struct tsqp_message_header *header = &message->header;
    uint64_t offset = tsqp_message_head_bytes(header);
    for (uint32_t i = 0; i < header->tensor_count; i++) {
        int rc = check_desc(&message->tensors[i], offset);
        if (rc)
            return rc;
        offset += align_up(message->tensors[i].nbytes);
    }
    return offset == header->total_bytes ? TSQP_OK : TSQP_BAD_TOTAL;
}
