# cython: language_level=3, binding=True, auto_pickle=False, autotestdict=False
"""The trusted operators in C, on torch tensors.

Each function takes what the C kernels compute (CPU tensors of float32 or bfloat16 that need no gradient, whole
rows in one piece) and returns None for everything else, unfit arguments included: :mod:`tsqp.ops` then computes it
with torch, or says what is wrong.
"""

import os

import torch

from libc.stdint cimport int64_t, uint8_t, uint64_t
from . cimport _core as c
from ._message cimport Source, _describe, _new_tensor

from . import config
from .errors import TsqpError

#: How many threads can share an operator's work at most.
MAX_THREADS = TSQP_MAX_THREADS

# Fewer elements are done before another thread could have made use of the GIL.
cdef int64_t NOGIL_ELEMENTS = 1 << 14
cdef enum:
    MAX_SOFTMAX_NDIM = 7

cdef object Tensor = torch.Tensor
cdef object Parameter = torch.nn.Parameter
cdef object is_grad_enabled = torch.is_grad_enabled
cdef object FLOAT32 = torch.float32
cdef object BFLOAT16 = torch.bfloat16
cdef bint threads_chosen = False


include "_views.pxi"


cdef int check(int rc) except -1:
    if rc == c.TSQP_NO_MEMORY:
        raise MemoryError("no memory for the scratch row of an operator")
    if rc != 0:
        raise SystemError(f"an operator was called against its contract ({rc})")
    return 0


# ---- RMSNorm ---------------------------------------------------------------------------------------------

def rms_norm(x, weight, double eps, residual, out, total):
    """`out`, or with a residual `(out, total)`; both made where they are None. None: not taken."""
    cdef View vx, vweight, vresidual, vout, vtotal
    cdef tsqp_rms_norm job
    cdef bint grad = is_grad_enabled()
    cdef int rc
    if not (take(x, &vx, grad) and take(weight, &vweight, grad) and is_ours(&vx)):
        return None
    if (not vx.contiguous or vx.desc.ndim == 0 or vweight.desc.ndim != 1 or not vweight.contiguous
            or vweight.desc.dtype != vx.desc.dtype or vweight.count != vx.desc.shape[vx.desc.ndim - 1]):
        return None
    job.residual = job.total = NULL
    if residual is not None:
        if not (take(residual, &vresidual, grad) and alike(&vresidual, &vx) and vresidual.contiguous):
            return None
        if not _place_total(total, &vx, &vweight, &vresidual, &vtotal, grad):
            return None
        if total is None:
            total = new_like(&vx, vx.desc.dtype, False, &vtotal)
        job.residual, job.total = vresidual.data, vtotal.data
    elif total is not None:
        return None
    if out is None:
        out = new_like(&vx, vx.desc.dtype, False, &vout)
    elif not (take(out, &vout, grad) and alike(&vout, &vx) and vout.contiguous and may_write(&vout, &vx)
              and apart(&vout, &vweight) and (residual is None or may_write(&vout, &vresidual)
                                              and apart(&vout, &vtotal))):
        return None
    job.x, job.weight, job.out, job.dtype = vx.data, vweight.data, vout.data, vx.desc.dtype
    job.cols = <size_t>vweight.count
    job.rows = <size_t>(vx.count // vweight.count)
    job.eps = <float>eps
    if vx.count < NOGIL_ELEMENTS:
        rc = c_rms_norm(&job)
    else:
        _choose_threads()
        with nogil:
            rc = c_rms_norm(&job)
    check(rc)
    return out if residual is None else (out, total)


cdef bint _place_total(object total, View *x, View *weight, View *residual, View *view, bint grad) except -1:
    if total is None:
        return True
    return (take(total, view, grad) and alike(view, x) and view.contiguous and apart(view, weight)
            and may_write(view, x) and may_write(view, residual))


# ---- SiLU times gate -------------------------------------------------------------------------------------

def silu_mul(gate, up, out):
    """`out`, made where it is None. None: not taken."""
    cdef View vgate, vup, vout
    cdef tsqp_silu_mul job
    cdef bint grad = is_grad_enabled()
    cdef int rc
    if not (take(gate, &vgate, grad) and take(up, &vup, grad) and is_ours(&vgate)):
        return None
    if not (vgate.contiguous and vup.contiguous and alike(&vgate, &vup)):
        return None
    if out is None:
        out = new_like(&vgate, vgate.desc.dtype, False, &vout)
    elif not (take(out, &vout, grad) and alike(&vout, &vgate) and vout.contiguous and may_write(&vout, &vgate)
              and may_write(&vout, &vup)):
        return None
    job.gate, job.up, job.out, job.dtype = vgate.data, vup.data, vout.data, vgate.desc.dtype
    job.count = <size_t>vgate.count
    if vgate.count < NOGIL_ELEMENTS:
        rc = c_silu_mul(&job)
    else:
        _choose_threads()
        with nogil:
            rc = c_silu_mul(&job)
    check(rc)
    return out


# ---- rotary embedding ------------------------------------------------------------------------------------

cdef bint _no_overlap_within(const View *view) noexcept:
    """Whether the lines of a tensor of 4 dimensions are apart, the batch being the slowest dimension."""
    cdef int slow = 2 if view.strides[2] > view.strides[1] else 1
    cdef int fast = 3 - slow
    cdef int64_t line = view.desc.shape[3]
    cdef int64_t plane = (view.desc.shape[fast] - 1) * view.strides[fast] + line
    cdef int64_t item = (view.desc.shape[slow] - 1) * view.strides[slow] + plane
    return ((view.desc.shape[fast] == 1 or view.strides[fast] >= line)
            and (view.desc.shape[slow] == 1 or view.strides[slow] >= plane)
            and (view.desc.shape[0] == 1 or view.strides[0] >= item))


cdef bint _table_fits(const View *table, const View *x, int heads) noexcept:
    cdef int64_t positions = x.desc.shape[3 - heads]
    return (table.desc.ndim == 3 and table.desc.dtype == x.desc.dtype and rows_whole(table)
            and table.desc.shape[2] == x.desc.shape[3] and table.desc.shape[1] == positions
            and (table.desc.shape[0] == 1 or table.desc.shape[0] == x.desc.shape[0]))


cdef void _plan_rotary(tsqp_rotary *job, const View *x, const View *out, const View *cos, const View *sin,
                       int heads) noexcept:
    cdef int order[3]
    cdef int d, i
    cdef int positions = 3 - heads
    order[0] = 0  # in the order of memory
    order[1] = 2 if x.strides[2] > x.strides[1] else 1
    order[2] = 3 - order[1]
    job.x, job.out, job.cos, job.sin = x.data, out.data, cos.data, sin.data
    job.dtype = x.desc.dtype
    job.dim = <size_t>x.desc.shape[3]
    for i in range(3):
        d = order[i]
        job.shape[i] = <size_t>x.desc.shape[d]
        job.x_strides[i], job.out_strides[i] = x.strides[d], out.strides[d]
        job.cos_strides[i] = job.sin_strides[i] = 0
        if d == positions:
            job.cos_strides[i], job.sin_strides[i] = cos.strides[1], sin.strides[1]
        elif d == 0:
            job.cos_strides[i] = cos.strides[0] if cos.desc.shape[0] > 1 else 0
            job.sin_strides[i] = sin.strides[0] if sin.desc.shape[0] > 1 else 0


cdef bint _take_rotary(object tensor, View *view, const View *cos, const View *sin, int heads, bint grad) except -1:
    return (take(tensor, view, grad) and is_ours(view) and view.desc.ndim == 4 and view.desc.shape[3] % 2 == 0
            and rows_whole(view) and _table_fits(cos, view, heads) and _table_fits(sin, view, heads))


cdef object _place_rotated(object out, View *vout, View *x, View *other, View *cos, View *sin, bint grad):
    """`out` if it may take what `x` becomes, a new tensor where it is None; None: it may not."""
    if out is None:
        return new_like(x, x.desc.dtype, x.strides[1] < x.strides[2] and x.desc.shape[1] > 1, vout)
    if (take(out, vout, grad) and alike(vout, x) and rows_whole(vout) and _no_overlap_within(vout)
            and may_write(vout, x) and apart(vout, other) and apart(vout, cos) and apart(vout, sin)):
        return out
    return None


def apply_rotary(q, k, cos, sin, int heads, out_q, out_k):
    """`(out_q, out_k)`, made where they are None. None: not taken."""
    cdef View vq, vk, vcos, vsin, vout_q, vout_k
    cdef tsqp_rotary jobs[2]
    cdef bint grad = is_grad_enabled()
    cdef int rc
    if heads != 1 and heads != 2 or not (take(cos, &vcos, grad) and take(sin, &vsin, grad)):
        return None
    if not (_take_rotary(q, &vq, &vcos, &vsin, heads, grad) and _take_rotary(k, &vk, &vcos, &vsin, heads, grad)):
        return None
    out_q = _place_rotated(out_q, &vout_q, &vq, &vk, &vcos, &vsin, grad)
    out_k = _place_rotated(out_k, &vout_k, &vk, &vq, &vcos, &vsin, grad)
    if out_q is None or out_k is None or not apart(&vout_q, &vout_k):
        return None
    _plan_rotary(&jobs[0], &vq, &vout_q, &vcos, &vsin, heads)
    _plan_rotary(&jobs[1], &vk, &vout_k, &vcos, &vsin, heads)
    if vq.count + vk.count < NOGIL_ELEMENTS:
        rc = c_rotary(jobs, 2)
    else:
        _choose_threads()
        with nogil:
            rc = c_rotary(jobs, 2)
    check(rc)
    return out_q, out_k


# ---- softmax ---------------------------------------------------------------------------------------------

cdef bint _plan_mask(tsqp_softmax *job, const View *mask, const View *scores) noexcept:
    """The mask's strides over the dimensions of the scores; False where it does not fit or needs torch."""
    cdef int missing = <int>scores.desc.ndim - <int>mask.desc.ndim
    cdef int i
    cdef int64_t size
    if mask.desc.dtype == TSQP_BOOL:
        job.mask_kind = TSQP_MASK_BOOL
    elif mask.desc.dtype == TSQP_FLOAT32:
        job.mask_kind = TSQP_MASK_FLOAT32
    elif mask.desc.dtype == TSQP_BFLOAT16:
        job.mask_kind = TSQP_MASK_BFLOAT16
    else:
        return False
    if missing < 0 or not rows_whole(mask) or mask.desc.shape[mask.desc.ndim - 1] != <int64_t>job.keys:
        return False
    for i in range(<int>job.ndim):
        job.mask_strides[i] = 0
        if i < missing:
            continue
        size = mask.desc.shape[i - missing]
        if size == scores.desc.shape[i]:
            job.mask_strides[i] = mask.strides[i - missing]
        elif size != 1:
            return False
    job.mask = mask.data
    return True


cdef bint _plan_positions(tsqp_softmax *job, bint causal, object first, object window) except -1:
    cdef size_t queries = job.shape[job.ndim - 1]
    job.causal = causal and job.mask == NULL
    job.first = job.window = 0
    if not job.causal and window is None:
        return first is None or 0 <= first
    if window is not None:
        if not 0 < window < 1 << 62:
            return False
        job.window = window
    if first is None:
        if queries > job.keys:
            return False
        job.first = job.keys - queries
    else:
        if not 0 <= first < 1 << 62:
            return False
        job.first = first
    return job.first + queries <= job.keys


def causal_softmax(scores, mask, double scale, bint causal, dtype, first, window, out):
    """`out`, made where it is None; `dtype`: of the result or None. None: not taken."""
    cdef View vscores, vmask, vout
    cdef tsqp_softmax job
    cdef bint grad = is_grad_enabled()
    cdef unsigned result
    cdef int i, rc
    if not (take(scores, &vscores, grad) and is_ours(&vscores) and 2 <= vscores.desc.ndim <= MAX_SOFTMAX_NDIM + 1
            and rows_whole(&vscores)):
        return None
    result = vscores.desc.dtype
    if dtype is not None:
        result = TSQP_FLOAT32 if dtype is FLOAT32 else TSQP_BFLOAT16 if dtype is BFLOAT16 else 0
    if result == 0:
        return None
    job.ndim = vscores.desc.ndim - 1
    job.keys = <size_t>vscores.desc.shape[job.ndim]
    job.mask, job.mask_kind = NULL, TSQP_MASK_NONE
    for i in range(<int>job.ndim):
        job.shape[i], job.strides[i] = <size_t>vscores.desc.shape[i], vscores.strides[i]
        job.mask_strides[i] = 0
    if mask is not None and not (take(mask, &vmask, grad) and _plan_mask(&job, &vmask, &vscores)):
        return None
    if not _plan_positions(&job, causal, first, window):
        return None
    if out is None:
        out = new_like(&vscores, result, False, &vout)
    elif not (take(out, &vout, grad) and vout.desc.dtype == result and same_shape(&vout, &vscores) and vout.contiguous
              and may_write(&vout, &vscores) and (mask is None or apart(&vout, &vmask))):
        return None
    for i in range(<int>job.ndim):
        job.out_strides[i] = vout.strides[i]
    job.scores, job.out, job.dtype, job.out_dtype = vscores.data, vout.data, vscores.desc.dtype, result
    job.scale = <float>scale
    if vscores.count < NOGIL_ELEMENTS:
        rc = c_softmax(&job)
    else:
        _choose_threads()
        with nogil:
            rc = c_softmax(&job)
    check(rc)
    return out


# ---- threads and machine ---------------------------------------------------------------------------------

cdef int _choose_threads() except -1:
    """The first work that may be shared settles how many threads share it, unless :func:`set_threads` did."""
    if not threads_chosen:
        set_threads(config.threads() or min(torch.get_num_threads(), available_cores()))
    return 0


def available_cores():
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(unsigned count):
    global threads_chosen
    with nogil:
        tsqp_threads_set(count)
    threads_chosen = True


def threads():
    _choose_threads()
    return tsqp_threads()


def threads_running():
    """How many threads of the pool live now, callers not counted."""
    cdef unsigned running
    with nogil:
        running = tsqp_threads_running()
    return running


def stop_threads():
    """Ends the pool's threads; the next work that is shared starts new ones."""
    with nogil:
        tsqp_threads_stop()


def instruction_set():
    """What the kernels were chosen for on this machine: ``AVX-512 with bfloat16``, ``AVX-512``, ``AVX2`` or ``portable``."""
    return tsqp_kernels_name().decode()


def move(sources, target, bint stream):
    """Copies one float32 tensor, or the sum of two, to `target`: what memory allows (benchmarks). `stream`: past the
    caches. All contiguous, of one size, a multiple of 64 bytes at addresses that are.
    """
    cdef View views[3]
    cdef tsqp_move job
    cdef int i
    tensors = [*sources, target]
    if not 2 <= len(tensors) <= 3:
        raise ValueError(f"move takes one or two sources, not {len(tensors) - 1}")
    for i in range(<int>len(tensors)):
        if not (take(tensors[i], &views[i], False) and views[i].contiguous and views[i].desc.dtype == TSQP_FLOAT32
                and views[i].count == views[0].count and views[i].count % 16 == 0 and <size_t>views[i].data % 64 == 0):
            raise ValueError("move takes contiguous float32 tensors of one size, in whole blocks of 64 aligned bytes")
    job.sources = len(sources)
    for i in range(<int>len(sources)):
        job.source[i] = views[i].data
    job.target = views[<int>len(sources)].data
    job.nbytes = <size_t>(views[0].count * 4)
    job.stream = stream
    _choose_threads()
    with nogil:
        c_move(&job)
