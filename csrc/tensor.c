/* tensor.c: tensors as DLPack structs over a buffer of the pool or a slot of a segment. Their deleter needs
 * no Python, so a framework may run it on any thread and at any time, interpreter shutdown included. */
#include "dlpack.h"
#include "tsqp.h"

#include <stdlib.h>

struct owned_tensor {
    union { /* first: the deleter gets its address */
        DLManagedTensor plain;
        DLManagedTensorVersioned versioned;
    };
    int64_t shape[TSQP_MAX_NDIM];
    int64_t strides[TSQP_MAX_NDIM];
    struct tsqp_buffer *buffer;
    struct tsqp_segment *segment;
};

static uint8_t dl_code(unsigned dtype) {
    switch (dtype) {
    case TSQP_FLOAT32:
    case TSQP_FLOAT16:
    case TSQP_FLOAT64:
        return DL_FLOAT;
    case TSQP_BFLOAT16:
        return DL_BFLOAT;
    case TSQP_INT8:
    case TSQP_INT16:
    case TSQP_INT32:
    case TSQP_INT64:
        return DL_INT;
    case TSQP_BOOL:
        return DL_BOOL;
    case TSQP_FLOAT8_E4M3FN:
        return DL_FLOAT8_E4M3FN;
    case TSQP_FLOAT8_E5M2:
        return DL_FLOAT8_E5M2;
    default:
        return DL_UINT;
    }
}

unsigned tsqp_dtype_of_dlpack(unsigned code, unsigned bits, unsigned lanes) {
    if (lanes != 1)
        return 0;
    for (unsigned dtype = 1; dtype < TSQP_DTYPE_END; dtype++)
        if (dl_code(dtype) == code && 8 * tsqp_dtype_itemsize(dtype) == bits)
            return dtype;
    return 0;
}

static void release_owner(struct owned_tensor *tensor) {
    tsqp_buffer_release(tensor->buffer);
    tsqp_segment_release(tensor->segment);
    free(tensor);
}

static void delete_plain(DLManagedTensor *managed) {
    release_owner((struct owned_tensor *)managed);
}

static void delete_versioned(DLManagedTensorVersioned *managed) {
    release_owner((struct owned_tensor *)managed);
}

void tsqp_tensor_delete(DLManagedTensor *managed) {
    managed->deleter(managed);
}

static DLTensor describe(struct owned_tensor *tensor, const struct tsqp_tensor_desc *desc, void *data) {
    int64_t stride = 1;
    for (int d = (int)desc->ndim - 1; d >= 0; d--) {
        tensor->shape[d] = desc->shape[d];
        tensor->strides[d] = stride;
        stride *= desc->shape[d] > 0 ? desc->shape[d] : 1;
    }
    return (DLTensor){.data = data,
                      .device = {DL_CPU, 0},
                      .ndim = desc->ndim,
                      .dtype = {dl_code(desc->dtype), (uint8_t)(8 * tsqp_dtype_itemsize(desc->dtype)), 1},
                      .shape = tensor->shape,
                      .strides = tensor->strides};
}

static struct owned_tensor *tensor_new(struct tsqp_buffer *buffer, struct tsqp_segment *segment) {
    struct owned_tensor *tensor = malloc(sizeof *tensor);
    if (!tensor) {
        tsqp_buffer_release(buffer);
        tsqp_segment_release(segment);
        return NULL;
    }
    tensor->buffer = buffer;
    tensor->segment = segment;
    return tensor;
}

DLManagedTensor *tsqp_tensor_new(const struct tsqp_tensor_desc *desc, void *data, struct tsqp_buffer *buffer,
                                 struct tsqp_segment *segment) {
    struct owned_tensor *tensor = tensor_new(buffer, segment);
    if (!tensor)
        return NULL;
    tensor->plain = (DLManagedTensor){.dl_tensor = describe(tensor, desc, data), .deleter = delete_plain};
    if (desc->dtype >= TSQP_FLOAT8_E4M3FN) /* frameworks of that time know no such code: as bytes */
        tensor->plain.dl_tensor.dtype.code = DL_UINT;
    return &tensor->plain;
}

DLManagedTensorVersioned *tsqp_tensor_new_versioned(const struct tsqp_tensor_desc *desc, void *data,
                                                    struct tsqp_buffer *buffer,
                                                    struct tsqp_segment *segment) {
    struct owned_tensor *tensor = tensor_new(buffer, segment);
    if (!tensor)
        return NULL;
    tensor->versioned = (DLManagedTensorVersioned){
        .version = {DL_MAJOR, 0}, .deleter = delete_versioned, .dl_tensor = describe(tensor, desc, data)};
    return &tensor->versioned;
}
