/* tensor.c: tensors as DLPack structs over a buffer of the pool or a slot of a segment. Their deleter needs
 * no Python, so a framework may run it on any thread and at any time, interpreter shutdown included. */
#include "dlpack.h"
#include "tsqp.h"

#include <stdlib.h>

struct owned_tensor {
    DLManagedTensor managed; /* first: the deleter gets its address */
    int64_t shape[TSQP_MAX_NDIM];
    int64_t strides[TSQP_MAX_NDIM];
    struct tsqp_buffer *buffer;
    struct tsqp_segment *segment;
};

/* float8 has no code in this version of DLPack: it travels as bytes and the caller views it. */
static DLDataType dl_dtype(unsigned dtype) {
    uint8_t bits = (uint8_t)(8 * tsqp_dtype_itemsize(dtype));
    switch (dtype) {
    case TSQP_FLOAT32:
    case TSQP_FLOAT16:
    case TSQP_FLOAT64:
        return (DLDataType){DL_FLOAT, bits, 1};
    case TSQP_BFLOAT16:
        return (DLDataType){DL_BFLOAT, bits, 1};
    case TSQP_INT8:
    case TSQP_INT16:
    case TSQP_INT32:
    case TSQP_INT64:
        return (DLDataType){DL_INT, bits, 1};
    case TSQP_BOOL:
        return (DLDataType){DL_BOOL, bits, 1};
    default:
        return (DLDataType){DL_UINT, bits, 1};
    }
}

static void release_owner(struct tsqp_buffer *buffer, struct tsqp_segment *segment) {
    tsqp_buffer_release(buffer);
    tsqp_segment_release(segment);
}

void tsqp_tensor_delete(DLManagedTensor *managed) {
    struct owned_tensor *tensor = (struct owned_tensor *)managed;
    release_owner(tensor->buffer, tensor->segment);
    free(tensor);
}

DLManagedTensor *tsqp_tensor_new(const struct tsqp_tensor_desc *desc, void *data, struct tsqp_buffer *buffer,
                                 struct tsqp_segment *segment) {
    struct owned_tensor *tensor = malloc(sizeof *tensor);
    if (!tensor) {
        release_owner(buffer, segment);
        return NULL;
    }
    int64_t stride = 1;
    for (int d = (int)desc->ndim - 1; d >= 0; d--) {
        tensor->shape[d] = desc->shape[d];
        tensor->strides[d] = stride;
        stride *= desc->shape[d] > 0 ? desc->shape[d] : 1;
    }
    tensor->buffer = buffer;
    tensor->segment = segment;
    tensor->managed = (DLManagedTensor){
        .dl_tensor = {.data = data,
                      .device = {DL_CPU, 0},
                      .ndim = desc->ndim,
                      .dtype = dl_dtype(desc->dtype),
                      .shape = tensor->shape,
                      .strides = tensor->strides},
        .deleter = tsqp_tensor_delete,
    };
    return &tensor->managed;
}
