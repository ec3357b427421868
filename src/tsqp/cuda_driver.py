"""The calls of the CUDA driver that torch has no face for: page-locking in place, and streams that wait for words.

A stream can wait for a word of page-locked memory and write one: a ring's own flags, so that copies enqueued ahead
run as soon as the other process publishes, with no thread of this one in between.

**Who may hold whom.** A word that a client can write is the client's to withhold: a stream that waits for it waits
as long as the client likes. So such a wait never goes on a stream that computes for others. It takes

- a stream of that client's own, and a *non-blocking* one (:meth:`Driver.stream` makes no other): the legacy default
  stream, on which torch computes, waits for all blocking streams;
- more hardware queues than such streams (CUDA_DEVICE_MAX_CONNECTIONS, 8 unless set, 32 at most): streams that share a
  queue wait for each other;
- no call meanwhile that waits for the whole device (a synchronised device, freed device memory, the start of a graph's
  capture, unregistering memory): it would wait for the client;
- a deadline of the host's, after which it writes the word itself, again until :meth:`Driver.done`, since the client
  may write it too. The waits are for "this much or more", so one large number lets them all pass.
"""

from __future__ import annotations

import ctypes
from typing import Any

from .errors import DeviceError

SUCCESS, NOT_READY = 0, 600
#: Page-locked for every context of the process, and mapped into the device's addresses.
_REGISTER_PORTABLE, _REGISTER_DEVICEMAP = 1, 2
_STREAM_NON_BLOCKING = 1
#: Wait until (int64)(word - value) >= 0; write after everything before it on the stream, with a barrier.
_WAIT_GEQ, _WRITE_DEFAULT = 0, 0
_CAN_USE_64_BIT_STREAM_MEM_OPS = 122
_NAME_BYTES = 256

_INT, _UINT, _SIZE, _HOST, _HANDLE = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
_POINTER, _U32, _U64 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64
_OUT = ctypes.c_void_p  # what byref gives

#: By the name in the library, which is the one cuda.h gives the call since CUDA 12.
_CALLS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuDriverGetVersion": (_OUT,),
    "cuGetErrorName": (_INT, _OUT),
    "cuDeviceGet": (_OUT, _INT),
    "cuDeviceGetName": (ctypes.c_char_p, _INT, _INT),
    "cuDeviceGetAttribute": (_OUT, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_OUT, _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxPushCurrent_v2": (_HANDLE,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuMemHostRegister_v2": (_HOST, _SIZE, _UINT),
    "cuMemHostUnregister": (_HOST,),
    "cuMemHostGetDevicePointer_v2": (_OUT, _HOST, _UINT),
    "cuMemAlloc_v2": (_OUT, _SIZE),
    "cuMemFree_v2": (_POINTER,),
    "cuStreamCreate": (_OUT, _UINT),
    "cuStreamDestroy_v2": (_HANDLE,),
    "cuStreamQuery": (_HANDLE,),
    "cuMemcpyHtoDAsync_v2": (_POINTER, _HOST, _SIZE, _HANDLE),
    "cuMemcpyDtoHAsync_v2": (_HOST, _POINTER, _SIZE, _HANDLE),
}
#: Since CUDA 11.7. The calls of the same names without _v2 work only where the kernel module was told to allow them.
_WORD_CALLS: dict[str, tuple[Any, ...]] = {
    "cuStreamWaitValue32_v2": (_HANDLE, _POINTER, _U32, _UINT),
    "cuStreamWriteValue32_v2": (_HANDLE, _POINTER, _U32, _UINT),
    "cuStreamWaitValue64_v2": (_HANDLE, _POINTER, _U64, _UINT),
    "cuStreamWriteValue64_v2": (_HANDLE, _POINTER, _U64, _UINT),
}


class Driver:
    """One device as the driver sees it, in the primary context, which is torch's too.

    A context is current in one thread, so every call makes it current for as long as it takes: the thread that serves
    need not be the one that loaded the model. The driver's calls return their error and keep none: an error of the
    runtime's ``cudaHostRegister`` would be raised by whatever torch does next.

    Args:
        device: its number, which is torch's; both number what CUDA_VISIBLE_DEVICES leaves.
        library: the driver's file.

    Raises :class:`~tsqp.errors.DeviceError` where there is no driver or no such device, as do all methods that do not
    return the driver's error.
    """

    def __init__(self, device: int = 0, library: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as fault:
            raise DeviceError(f"there is no CUDA driver here ({fault}); run this where an NVIDIA GPU is") from None
        for name, arguments in _CALLS.items():
            getattr(self._library, name).argtypes = arguments
        for name, arguments in _WORD_CALLS.items():
            if hasattr(self._library, name):
                getattr(self._library, name).argtypes = arguments
        self._check("cuInit", self._library.cuInit(0))
        number, context = ctypes.c_int(), ctypes.c_void_p()
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(number), device))
        self._device = number.value
        error = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device)
        self._check("cuDevicePrimaryCtxRetain", error)
        self._context = context
        self._wide: bool | None = None

    def close(self) -> None:
        """Gives the context back. What was made with this driver is to be given back before."""
        self._check("cuDevicePrimaryCtxRelease", self._library.cuDevicePrimaryCtxRelease_v2(self._device))

    def _inside(self, name: str, *arguments: Any) -> int:
        """Calls with the device's context current, and leaves the thread's context as it was; 0 or the error."""
        error = int(self._library.cuCtxPushCurrent_v2(self._context))
        if error != SUCCESS:
            return error
        try:
            return int(getattr(self._library, name)(*arguments))
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _do(self, name: str, *arguments: Any) -> None:
        self._check(name, self._inside(name, *arguments))

    def _check(self, name: str, error: int) -> None:
        if error != SUCCESS:
            raise DeviceError(f"the CUDA driver's {name.partition('_v2')[0]} failed: {self.error_name(error)}")

    def error_name(self, error: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(error, ctypes.byref(text)) == SUCCESS and text.value:
            return text.value.decode()
        return f"error {error}"

    # --- the device ----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What the device is called."""
        text = ctypes.create_string_buffer(_NAME_BYTES)
        self._do("cuDeviceGetName", text, _NAME_BYTES, self._device)
        return text.value.decode(errors="replace")

    @property
    def version(self) -> str:
        """The CUDA version the driver serves, as in "12.4"."""
        number = ctypes.c_int()
        self._do("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def attribute(self, number: int) -> int:
        """A CUdevice_attribute."""
        value = ctypes.c_int()
        self._do("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    # --- memory --------------------------------------------------------------------------------------------

    def register(self, address: int, nbytes: int) -> int:
        """Page-locks memory for the device; returns 0 or the driver's error."""
        return self._inside("cuMemHostRegister_v2", address, nbytes, _REGISTER_PORTABLE | _REGISTER_DEVICEMAP)

    def unregister(self, address: int) -> int:
        return self._inside("cuMemHostUnregister", address)

    def device_pointer(self, address: int) -> int:
        """Where the device sees an address of registered memory."""
        pointer = _POINTER()
        self._do("cuMemHostGetDevicePointer_v2", ctypes.byref(pointer), address, 0)
        return pointer.value

    def allocate(self, nbytes: int) -> int:
        """Memory of the device; to be given to :meth:`free`."""
        pointer = _POINTER()
        self._do("cuMemAlloc_v2", ctypes.byref(pointer), nbytes)
        return pointer.value

    def free(self, pointer: int) -> None:
        """Waits for the whole device."""
        self._do("cuMemFree_v2", pointer)

    # --- streams -------------------------------------------------------------------------------------------

    def stream(self) -> int:
        """A stream that no other one waits for by itself; to be given to :meth:`destroy`."""
        stream = ctypes.c_void_p()
        self._do("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        return int(stream.value or 0)

    def destroy(self, stream: int) -> None:
        """Gives a stream back; what is enqueued on it still runs."""
        self._do("cuStreamDestroy_v2", stream)

    def done(self, stream: int) -> bool:
        """True when everything enqueued on the stream has run."""
        error = self._inside("cuStreamQuery", stream)
        if error != NOT_READY:
            self._check("cuStreamQuery", error)
        return error == SUCCESS

    def copy_in(self, stream: int, pointer: int, address: int, nbytes: int) -> None:
        """Enqueues a copy from host memory, read as it is then, to the device's."""
        self._do("cuMemcpyHtoDAsync_v2", pointer, address, nbytes, stream)

    def copy_out(self, stream: int, address: int, pointer: int, nbytes: int) -> None:
        """Enqueues a copy from the device's memory to the host's."""
        self._do("cuMemcpyDtoHAsync_v2", address, pointer, nbytes, stream)

    # --- words ---------------------------------------------------------------------------------------------

    def without_words(self) -> str:
        """Why streams can't wait for words and write them here; empty where they can."""
        missing = [name for name in _WORD_CALLS if not hasattr(self._library, name)]
        if missing:
            return f"the driver (CUDA {self.version}) has no {missing[0]}; install one of CUDA 11.7 or later"
        return ""

    @property
    def wide(self) -> bool:
        """True where words of 64 bits are waited for and written whole.

        Else only their lower halves are, which suffices for numbers below 2**32 on a little-endian machine. (There is
        no attribute to ask for the 32-bit calls: the one there was tells of the calls before _v2.)
        """
        if self._wide is None:
            self._wide = bool(self.attribute(_CAN_USE_64_BIT_STREAM_MEM_OPS))
        return self._wide

    def wait_word(self, stream: int, pointer: int, value: int) -> None:
        """Enqueues a wait until the word is ``value`` or more; see the module for who may hold whom.

        ``pointer`` is a :meth:`device_pointer` of an 8-byte aligned word.
        """
        if self.wide:
            self._do("cuStreamWaitValue64_v2", stream, pointer, value, _WAIT_GEQ)
        else:
            self._do("cuStreamWaitValue32_v2", stream, pointer, _half(value), _WAIT_GEQ)

    def write_word(self, stream: int, pointer: int, value: int) -> None:
        """Enqueues a write of the word; who sees it sees what the stream copied before."""
        if self.wide:
            self._do("cuStreamWriteValue64_v2", stream, pointer, value, _WRITE_DEFAULT)
        else:
            self._do("cuStreamWriteValue32_v2", stream, pointer, _half(value), _WRITE_DEFAULT)


def _half(value: int) -> int:
    if not 0 <= value < 1 << 32:
        raise DeviceError(f"this device waits for and writes words of 32 bits; {value} needs more")
    return value
