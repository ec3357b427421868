"""The calls of the CUDA driver, against one of our own that refuses what the real one would."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import time
from collections.abc import Iterator

import fake_cuda
import pytest
import torch

from tsqp.cuda_driver import Driver
from tsqp.errors import DeviceError

PAGE = mmap.PAGESIZE
PATIENCE_S = 20.0


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> str:
    return fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def driver(library) -> Iterator[Driver]:
    fake_cuda.calls(library)
    driver = Driver(library=library)
    yield driver
    driver.close()


@contextlib.contextmanager
def registered(driver, nbytes=2 * PAGE):
    """Page-aligned memory, as a mapping of shared memory is: its address."""
    with mmap.mmap(-1, nbytes) as memory:
        held = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(held)
        assert driver.register(address, nbytes) == 0
        try:
            yield address
        finally:
            assert driver.unregister(address) == 0
            del held


def word(address):
    return ctypes.c_uint64.from_address(address)


def wait_until_done(driver, stream):
    end = time.monotonic() + PATIENCE_S
    while not driver.done(stream):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_memory_is_registered_for_all_contexts_and_mapped(driver, library):
    with registered(driver):
        pass
    assert fake_cuda.calls(library) == [f"register {2 * PAGE} 3", "unregister"]


def test_a_thread_without_a_context_may_register(driver, library):
    # The one that serves is not the one that loaded the model. The driver itself refuses such a thread:
    bare = ctypes.CDLL(library).cuMemHostRegister_v2
    bare.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    found = []

    def register():
        with mmap.mmap(-1, PAGE) as memory:
            held = ctypes.c_char.from_buffer(memory)
            address = ctypes.addressof(held)
            found.append(bare(address, PAGE, 1))
            found.append(driver.register(address, PAGE))
            found.append(driver.unregister(address))
            found.append(bare(address, PAGE, 1))  # and no context is left behind
            del held

    thread = threading.Thread(target=register)
    thread.start()
    thread.join()
    assert [driver.error_name(error) for error in found] == [
        "CUDA_ERROR_INVALID_CONTEXT",
        "CUDA_SUCCESS",
        "CUDA_SUCCESS",
        "CUDA_ERROR_INVALID_CONTEXT",
    ]


def test_a_refused_registration_is_told_and_raises_nothing(driver):
    with registered(driver) as address:
        assert driver.error_name(driver.register(address, PAGE)) == "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
    assert driver.error_name(driver.unregister(address)) == "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"
    assert driver.error_name(12345) == "error 12345"


def test_a_stream_waits_copies_and_writes_in_order(driver, library):
    with registered(driver) as address:
        request, reply, slot, answer = address, address + 64, address + 128, address + PAGE
        memory, stream = driver.allocate(PAGE), driver.stream()
        ctypes.memmove(answer, b"before", 6)
        fake_cuda.calls(library)
        driver.wait_word(stream, driver.device_pointer(request), 3)
        driver.copy_in(stream, memory, slot, 6)
        driver.copy_out(stream, answer, memory, 6)
        driver.write_word(stream, driver.device_pointer(reply), 5)
        assert fake_cuda.calls(library) == ["wait64 3 0", "copy in 6", "copy out 6", "write64 5 0"]
        for too_little in (0, 2):
            word(request).value = too_little
            time.sleep(0.01)
            assert not driver.done(stream)
            assert (word(reply).value, ctypes.string_at(answer, 6)) == (0, b"before")
        ctypes.memmove(slot, b"behind", 6)
        word(request).value = 4  # more will do as well
        wait_until_done(driver, stream)
        assert (word(reply).value, ctypes.string_at(answer, 6)) == (5, b"behind")
        driver.destroy(stream)
        driver.free(memory)


def test_streams_wait_for_no_other_stream(driver, library):
    driver.destroy(driver.stream())
    assert fake_cuda.calls(library) == ["stream 1", "destroy"]  # CU_STREAM_NON_BLOCKING


def test_a_device_of_32_bit_words_gets_their_halves(driver, library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_NARROW", "1")
    with registered(driver) as address:
        stream, pointer = driver.stream(), driver.device_pointer(address)
        fake_cuda.calls(library)
        word(address).value = 7
        driver.wait_word(stream, pointer, 7)
        driver.write_word(stream, pointer, 8)
        assert fake_cuda.calls(library) == ["wait32 7 0", "write32 8 0"]
        wait_until_done(driver, stream)
        assert word(address).value == 8
        with pytest.raises(DeviceError, match=r"words of 32 bits; 4294967296 needs more"):
            driver.write_word(stream, pointer, 1 << 32)
        driver.destroy(stream)


def test_what_the_driver_refuses_is_said_with_the_calls_name(driver):
    stream = driver.stream()
    with registered(driver) as address, pytest.raises(DeviceError, match=r"cuStreamWaitValue64 failed: CUDA_ERROR_INV"):
        driver.wait_word(stream, driver.device_pointer(address + 4), 1)  # not aligned
    with pytest.raises(
        DeviceError, match=r"the CUDA driver's cuMemHostGetDevicePointer failed: CUDA_ERROR_INVALID_VAL"
    ):
        driver.device_pointer(address)
    with pytest.raises(DeviceError, match=r"the CUDA driver's cuMemFree failed: CUDA_ERROR_INVALID_VALUE"):
        driver.free(64)
    driver.destroy(stream)


def test_an_unknown_device_is_refused(library):
    with pytest.raises(DeviceError, match=r"the CUDA driver's cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        Driver(1, library)


def test_without_a_driver_one_sentence_says_so(tmp_path):
    with pytest.raises(
        DeviceError, match=r"there is no CUDA driver here \(.*no\.so.*\); run this where an NVIDIA GPU is"
    ):
        Driver(0, str(tmp_path / "no.so"))


def test_the_driver_is_described(driver):
    assert (driver.name, driver.version, driver.wide, driver.without_words()) == ("a fake", "12.4", True, "")


def test_an_old_drivers_streams_can_not_wait(tmp_path):
    driver = Driver(library=fake_cuda.build(tmp_path, "-DWITHOUT_WORDS"))
    assert driver.without_words() == (
        "the driver (CUDA 12.4) has no cuStreamWaitValue32_v2; install one of CUDA 11.7 or later"
    )
    driver.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_real_stream_waits_copies_and_writes():
    driver = Driver()
    if reason := driver.without_words():
        pytest.skip(reason)
    with registered(driver) as address:
        memory, stream = driver.allocate(PAGE), driver.stream()
        ctypes.memmove(address + 128, b"behind", 6)
        driver.wait_word(stream, driver.device_pointer(address), 1)
        driver.copy_in(stream, memory, address + 128, 6)
        driver.copy_out(stream, address + PAGE, memory, 6)
        driver.write_word(stream, driver.device_pointer(address + 64), 1)
        time.sleep(0.05)
        assert not driver.done(stream)
        word(address).value = 1
        wait_until_done(driver, stream)
        assert (word(address + 64).value, ctypes.string_at(address + PAGE, 6)) == (1, b"behind")
        driver.destroy(stream)
        driver.free(memory)
    driver.close()
