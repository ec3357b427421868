"""What the doctor says of machines made of files, and of the parts of this one that can be changed."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from commands import environment
from doctoring import check, machine

from tsqp import _kernels, doctor_cpu, doctor_enclave, doctor_memory, doctor_software, doctor_wake
from tsqp.doctor import CHECKS, as_json, examine, healthy, summary
from tsqp.doctor_machine import NOTE, OK, PROBLEM, Finding, Machine, binary

MIB = 1 << 20
IDLE = "/sys/devices/system/cpu/cpuidle/current_driver"


# --- memory


def test_shared_memory_that_is_missing_or_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(doctor_memory.shared_memory(machine(tmp_path)), PROBLEM, "/dev/shm", "does not exist", "TSQP_SHM_DIR")
    there = machine(tmp_path, {"/dev/shm": "a file"})
    check(doctor_memory.shared_memory(there), PROBLEM, "is no directory")
    (tmp_path / "dev/shm").unlink()
    there = machine(tmp_path, {"/dev/shm/": ""})
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    check(doctor_memory.shared_memory(there), PROBLEM, "may not write", "chmod 1777")


def test_room_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = machine(tmp_path, {"/dev/shm/": "", "/proc/self/mounts": f"none {tmp_path}/dev/shm tmpfs rw 0 0\n"})
    monkeypatch.setattr(doctor_memory, "_space", lambda directory: (64 * MIB, 64 * MIB))
    found = doctor_memory.shared_memory(there)
    check(found, PROBLEM, "64 MiB of 64 MiB free", "one client takes 200 MiB", "--shm-size=1g")
    assert f"TSQP_MAX_SHM_CHUNK_BYTES to {3 * MIB} or less" in found.advice
    monkeypatch.setenv("TSQP_MAX_SHM_CHUNK_BYTES", str(3 * MIB))
    check(doctor_memory.shared_memory(there), OK, "room for 1 client of 60 MiB")
    monkeypatch.delenv("TSQP_MAX_SHM_CHUNK_BYTES")
    monkeypatch.setattr(doctor_memory, "_space", lambda directory: (1024 * MIB, 2048 * MIB))
    found = doctor_memory.shared_memory(there)
    check(found, OK, "room for 5 clients")
    assert found.figures["free_bytes"] == 1024 * MIB
    limited = {"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/memory.max": str(500 * MIB)}
    there = machine(tmp_path, {**limited, "/sys/fs/cgroup/a/memory.current": str(400 * MIB)})
    check(doctor_memory.shared_memory(there), PROBLEM, "may only take 100 MiB more memory", "memory limit")
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("max\n")
    (tmp_path / "proc/self/mounts").write_text("overlay / overlay rw 0 0\n")
    check(doctor_memory.shared_memory(there), NOTE, "lies on overlay", "tmpfs")


def test_where_segments_lie_is_the_users_choice(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert machine(tmp_path, TSQP_SHM_DIR=str(other)).shm_directory == other
    assert doctor_memory.shared_memory(machine(tmp_path, TSQP_SHM_DIR=f"{other}/no")).state == PROBLEM


def test_page_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = machine(tmp_path, {"/dev/nvidia0": "", "/proc/self/status": "CapEff:\t0000000000000000\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * MIB, 8 * MIB))
    check(doctor_memory.page_lock(gpu), NOTE, "8 MiB can be page-locked", "200 MiB", "ulimit -l")
    (tmp_path / "dev/nvidia0").unlink()
    check(doctor_memory.page_lock(gpu), OK, "only a CUDA device")
    (tmp_path / "proc/self/status").write_text("Name:\tx\nCapEff:\t0000000000004000\n")
    check(doctor_memory.page_lock(gpu), OK, "without a limit")
    monkeypatch.setattr(doctor_memory, "_try_lock", lambda: "Operation not permitted")
    check(doctor_memory.page_lock(gpu), NOTE, "can't be page-locked here (Operation not permitted)")


def test_page_locking_is_the_drivers_where_there_is_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_memory, "_cuda_lock", lambda: "")
    check(doctor_memory.page_lock(machine(tmp_path)), OK, "CUDA driver page-locks")
    monkeypatch.setattr(doctor_memory, "_cuda_lock", lambda: "cuMemHostRegister: CUDA_ERROR_NOT_PERMITTED")
    check(doctor_memory.page_lock(machine(tmp_path)), NOTE, "CUDA_ERROR_NOT_PERMITTED", "GPU")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_page_locking_by_the_driver(tmp_path: Path) -> None:
    assert doctor_memory._cuda_lock() == ""
    assert doctor_memory.page_lock(machine(tmp_path)).figures["cuda"] is True


def test_a_lock_that_is_refused_is_seen() -> None:
    code = (
        "import resource, os\nfrom tsqp.doctor_memory import _try_lock\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "print(_try_lock())"
    )
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert out.stdout.strip() in (os.strerror(1), os.strerror(11), os.strerror(12))
    assert doctor_memory._try_lock() in ("", os.strerror(1), os.strerror(12))


@pytest.mark.parametrize(
    ("text", "state", "word"),
    [("always [madvise] never", OK, "madvise"), ("always madvise [never]", NOTE, "off"), ("", OK, "nothing")],
)
def test_large_pages(tmp_path: Path, text: str, state: str, word: str) -> None:
    there = machine(tmp_path, {"/sys/kernel/mm/transparent_hugepage/enabled": text})
    check(doctor_memory.large_pages(there), state, word)


# --- processors


def test_cpu_features_are_the_kernels_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_tile amx_bf16\n"
    found = doctor_cpu.cpu(machine(tmp_path, {"/proc/cpuinfo": text}))
    assert found.figures["features"] == ["AVX2", "AVX-512", "AMX", "AMX bfloat16"]
    assert found.figures["kernels"] == _kernels.instruction_set()
    assert "Some CPU: AVX2, AVX-512, AMX, AMX bfloat16" in found.found
    monkeypatch.setattr(_kernels, "instruction_set", lambda: "portable")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    check(doctor_cpu.cpu(machine(tmp_path)), NOTE, "portable", "AVX2")


@pytest.mark.parametrize(
    ("files", "affinity", "usable"),
    [
        ({}, 8, 8.0),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 8, 1.5),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/cpu.max": "400000 100000\n"}, 8, 4.0),
        ({"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 3, 3.0),
        ({"/proc/self/cgroup": "0::/../../x\n", "/sys/fs/cgroup/x/cpu.max": "100000 100000\n"}, 3, 1.0),
        (
            {
                "/proc/self/cgroup": "4:cpu,cpuacct:/d\n1:memory:/d\n",
                "/sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "200000\n",
                "/sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000\n",
            },
            8,
            2.0,
        ),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "1 0\n"}, 1, 1.0),
    ],
)
def test_cores_by_affinity_and_control_groups(
    tmp_path: Path, files: dict[str, str], affinity: int, usable: float
) -> None:
    found = doctor_cpu.cores(machine(tmp_path, files, affinity))
    assert found.figures["usable"] == usable
    check(found, OK if usable >= 2 else NOTE, f"run on {affinity} core")


def test_threads_against_cores(tmp_path: Path) -> None:
    passive = {"OMP_WAIT_POLICY": "passive"}
    quota = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "200000 100000\n"}
    over = doctor_cpu.threads(machine(tmp_path, quota, 64, OMP_NUM_THREADS="64", TSQP_THREADS="3", **passive))
    check(over, NOTE, "64 threads (OMP_NUM_THREADS) and 3 threads (TSQP_THREADS)", "2 cores", "OMP_NUM_THREADS=2")
    check(doctor_cpu.threads(machine(tmp_path, affinity=4, OMP_NUM_THREADS="four")), PROBLEM, "'four'")
    check(doctor_cpu.threads(machine(tmp_path, affinity=2, OMP_NUM_THREADS="2", **passive)), OK)
    check(doctor_cpu.threads(machine(tmp_path, affinity=2, OMP_NUM_THREADS="2")), NOTE, "OMP_WAIT_POLICY=passive")
    check(doctor_cpu.threads(machine(tmp_path, affinity=2, OMP_NUM_THREADS="1")), OK)
    assert doctor_cpu.threads(machine(tmp_path, affinity=99)).figures["torch"] == torch.get_num_threads()


def test_futex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform.startswith("linux"):
        check(doctor_cpu.futex(machine(tmp_path)), OK, "woken at once")
        monkeypatch.setattr(doctor_cpu, "_SYS_FUTEX", dict.fromkeys(doctor_cpu._SYS_FUTEX, 99999))
        check(doctor_cpu.futex(machine(tmp_path)), PROBLEM, os.strerror(38), "seccomp")
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    check(doctor_cpu.futex(machine(tmp_path)), NOTE, "s390x", "polling")


@pytest.mark.parametrize(
    ("took", "files", "state", "words"),
    [
        (12.4, {}, OK, ("12 us", "none")),
        (80.0, {}, NOTE, ("80 us", "kvm.halt_poll_ns")),
        (80.0, {IDLE: "haltpoll\n"}, NOTE, ("haltpoll", "--device")),
        (80.0, {IDLE: "menu\n", "/dev/cpu_dma_latency": "closed"}, NOTE, ("menu", "udev")),
        (
            80.0,
            {IDLE: "intel_idle\n", "/dev/cpu_dma_latency": ""},
            NOTE,
            ("intel_idle", "tsqp serve --cpu-latency-us 0"),
        ),
    ],
)
def test_waking(
    took: float,
    files: dict[str, str],
    state: str,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_wake, "wake_us", lambda: took)
    closed = "closed" in files.values()  # root may write what others may not
    monkeypatch.setattr(doctor_wake.os, "access", lambda path, mode: Path(path).exists() and not closed)
    found = doctor_wake.waking(machine(tmp_path, files))
    check(found, state, *words)
    assert found.figures["microseconds"] == took


def test_waking_is_measured_where_somebody_else_can_be_woken(tmp_path: Path) -> None:
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    assert 0 < doctor_wake.wake_us() < 1e6
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    check(doctor_wake.waking(machine(tmp_path, affinity=1)), OK, "one core")
    check(doctor_wake.waking(machine(tmp_path, TSQP_ENCLAVE="gramine")), OK, "the host's business")


# --- enclaves


@pytest.mark.parametrize(
    ("files", "state", "words"),
    [
        ({}, NOTE, ("no trusted execution environment", "development")),
        ({"/proc/cpuinfo": "flags : fpu sgx sgx_lc\n"}, NOTE, ("has SGX, but there is no /dev/sgx_enclave", "BIOS")),
        ({"/dev/sgx_enclave": ""}, NOTE, ("not attested", "/dev/sgx_provision")),
        ({"/dev/sgx_enclave": "", "/dev/sgx_provision": ""}, NOTE, ("gramine-sgx is not installed",)),
        ({"/dev/sgx/enclave": "", "/dev/sgx/provision": "", "/bin/gramine-sgx": "x"}, OK, ("/dev/sgx/enclave",)),
        ({"/dev/tdx_guest": ""}, OK, ("a TDX guest", "/dev/tdx_guest")),
        ({"/proc/cpuinfo": "flags : fpu tdx_guest\n"}, OK, ("a TDX guest",)),
        ({"/dev/sev-guest": ""}, OK, ("an SEV-SNP guest",)),
        ({"/sys/module/kvm_intel/parameters/tdx": "Y\n"}, NOTE, ("can start TDX guests",)),
        ({"/sys/module/kvm_amd/parameters/sev_snp": "1\n"}, NOTE, ("can start SEV guests",)),
        ({"/sys/module/kvm_amd/parameters/sev_snp": "N\n"}, NOTE, ("no trusted execution environment",)),
        ({"/dev/attestation/attestation_type": "dcap"}, OK, ("SGX enclave under Gramine, with dcap",)),
        ({"/dev/attestation/attestation_type": "none"}, NOTE, ("without attestation", "protects nothing")),
        ({"/dev/attestation/": "", "/dev/sgx_enclave": ""}, NOTE, ("inside of Gramine",)),
    ],
)
def test_enclaves_by_the_files_a_kernel_shows(
    tmp_path: Path, files: dict[str, str], state: str, words: tuple[str, ...]
) -> None:
    there = machine(tmp_path, files, PATH=f"{tmp_path}/bin")
    for path in tmp_path.glob("bin/*"):
        path.chmod(0o755)
    check(doctor_enclave.enclave(there), state, *words)


def test_devices_this_user_may_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    sgx = machine(tmp_path, {"/dev/sgx_enclave": ""})
    check(doctor_enclave.enclave(sgx), NOTE, "may not open", "group sgx")
    tdx = machine(tmp_path, {"/dev/tdx_guest": ""})
    check(doctor_enclave.enclave(tdx), NOTE, "may not ask it for a report")


def test_inside_gramine_nothing_is_asked_that_ends_or_hangs_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("this must not be called inside Gramine")

    for where, name in ((subprocess, "Popen"), (os, "fork"), (os, "kill"), (socket, "socket")):
        monkeypatch.setattr(where, name, forbidden)
    for name in ("zmq.Context.socket", "tsqp._ring.process_start", "tsqp._ring.segment_owner"):
        monkeypatch.setattr(name, forbidden)
    inside = machine(tmp_path, {"/dev/attestation/": "", "/dev/shm/": ""})
    found = {finding.name: finding for finding in examine(inside)}
    assert set(found) == {*(name for name, _, _ in CHECKS), "echo"}
    assert not [finding for finding in found.values() if "failed itself" in finding.found]
    check(found["shared_memory"], NOTE, "untrusted_shm")
    check(found["unix_sockets"], NOTE, "tcp://127.0.0.1")
    check(found["futex"], OK, "polling")
    check(found["echo"], NOTE, "the host, which also makes the ring", "tsqp health --endpoint tcp://")


def test_an_enclave_that_nobody_knows(tmp_path: Path) -> None:
    check(doctor_enclave.enclave(machine(tmp_path, TSQP_ENCLAVE="sgx")), PROBLEM, "'sgx' is unknown", "gramine")
    assert "without attestation" in doctor_enclave.enclave(machine(tmp_path, TSQP_ENCLAVE="gramine")).found


# --- software


def test_packages_are_those_the_distribution_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor_software.packages(machine(tmp_path))
    check(found, OK, f"torch {importlib.metadata.version('torch')}")
    assert "pytest" not in found.figures
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["numpy>=99", "not-there>1", "rich; extra == 'x'"])
    wrong = doctor_software.packages(machine(tmp_path))
    check(wrong, PROBLEM, "does not meet >=99", "not-there is missing", "pip install 'numpy>=99' 'not-there>1'")


def test_torch_builds_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    bare, gpu = machine(tmp_path / "bare"), machine(tmp_path / "gpu", {"/dev/nvidia0": ""})
    check(doctor_software.torch_build(bare), OK, torch.__version__, "a CPU build")
    check(doctor_software.torch_build(gpu), NOTE, "/dev/nvidia0", "CUDA build")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check(doctor_software.torch_build(gpu), PROBLEM, "sees no GPU", "nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"GPU {n}")
    check(doctor_software.torch_build(gpu), OK, "GPU 0, GPU 1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    check(doctor_software.torch_build(bare), NOTE, "oneDNN")


def test_libzmq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor_software.zeromq(machine(tmp_path))
    assert found.figures["libzmq"] == zmq.zmq_version()
    assert found.figures["curve"] == zmq.has("curve")
    monkeypatch.setattr(zmq, "has", lambda name: name != "curve")
    check(doctor_software.zeromq(machine(tmp_path)), NOTE, "CURVE")
    monkeypatch.setattr(zmq, "has", lambda name: False)
    check(doctor_software.zeromq(machine(tmp_path)), PROBLEM, "ipc://")


def test_unix_sockets_and_the_default_endpoint(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_IPC_PATH", endpoint)
    path, there = endpoint.removeprefix("ipc://"), machine(tmp_path)
    check(doctor_software.unix_sockets(there), OK, f"no server is at {endpoint}")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        check(doctor_software.unix_sockets(there), NOTE, "left by a server that was killed")
        listening.listen(1)
        check(doctor_software.unix_sockets(there), OK, f"something listens at {endpoint}")
    assert os.path.exists(path)  # it is not the doctor's to remove
    os.unlink(path)
    monkeypatch.setenv("LLAMA_IPC_PATH", f"/{'x' * 120}")
    check(doctor_software.unix_sockets(there), PROBLEM, "107", "LLAMA_IPC_PATH")
    monkeypatch.setenv("LLAMA_IPC_PATH", "tcp://127.0.0.1:5")
    check(doctor_software.unix_sockets(there), OK, "tcp://127.0.0.1:5")
    # Short: below a directory of pytest's own, whose name grows with its runs, it could be too long for a socket.
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/tsqp-is/nowhere")
    check(doctor_software.unix_sockets(there), PROBLEM, "nowhere", "TMPDIR")


def test_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    check(doctor_software.descriptors(machine(tmp_path)), NOTE, "64 files", "ulimit -n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    check(doctor_software.descriptors(machine(tmp_path)), OK, "4096 files")


# --- the whole


def test_a_check_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Machine) -> Finding:
        raise ImportError("libtorch.so:\n no such file")

    monkeypatch.setattr(doctor_software, "torch_build", broken)
    checks = (("torch", "doctor_software", "torch_build"), ("odd", "doctor_nowhere", "odd"), CHECKS[-1])
    found = list(examine(machine(tmp_path), echo=False, checks=checks))
    check(found[0], PROBLEM, "This check failed itself: ImportError: libtorch.so: no such file.")
    check(found[1], PROBLEM, "ModuleNotFoundError")
    assert [finding.state for finding in found] == [PROBLEM, PROBLEM, NOTE]
    assert not healthy(found)
    assert summary(found) == "3 checks: 2 problems, 1 note"
    told = as_json(found)
    assert (told["healthy"], told["problems"], told["notes"]) == (False, 2, 1)
    assert sorted(told["findings"][0]) == ["advice", "figures", "found", "name", "state"]


def test_sizes_are_told_in_binary_units() -> None:
    assert [binary(n) for n in (0, 1023, 1024, 64 << 20, 3 << 29)] == ["0 B", "1023 B", "1 KiB", "64 MiB", "1.5 GiB"]
    assert binary(10 << 40) == "10 TiB"
