"""Which trusted execution environment this is, or could start one: by the files its kernel shows."""

from __future__ import annotations

import os
import shutil
from typing import Any

from .doctor_machine import NOTE, OK, PROBLEM, Finding, Machine

_SGX = ("/dev/sgx_enclave", "/dev/sgx/enclave", "/dev/isgx")
_SGX_PROVISION = ("/dev/sgx_provision", "/dev/sgx/provision")
_TDX_GUEST = ("/dev/tdx_guest", "/dev/tdx-guest", "/dev/tdx-attest")
_SEV_GUEST = ("/dev/sev-guest",)
_YES = ("Y", "1")


def enclave(machine: Machine) -> Finding:
    """Where the runner is protected, or could be."""
    told = machine.environment.get("TSQP_ENCLAVE", "")
    if told not in ("", "gramine"):
        found = f"TSQP_ENCLAVE={told!r} is unknown: nothing connects or listens with it."
        return Finding("enclave", PROBLEM, found, "Set it to gramine, or unset it.")
    signs = _signs(machine)
    if signs["gramine"]:
        return _in_gramine(signs)
    for key, name in (("tdx_guest", "a TDX guest"), ("sev_guest", "an SEV-SNP guest")):
        if signs[key]:
            told = f"This is {name}: a runner in it is protected from the host ({signs[key]})."
            if key == "tdx_guest" and signs[key].startswith("/") and not os.access(machine.path(signs[key]), os.R_OK):
                advice = f"Let this user open {signs[key]} (a udev rule or a group), or attestation fails."
                return Finding("enclave", NOTE, told + " This user may not ask it for a report.", advice, signs)
            return Finding("enclave", OK, told, figures=signs)
    if signs["sgx"]:
        return _sgx(machine, signs)
    hosts = [name for key, name in (("tdx_host", "TDX"), ("sev_host", "SEV")) if signs[key]]
    if hosts:
        told = f"This host can start {' and '.join(hosts)} guests; a process on the host itself is not protected."
        return Finding("enclave", NOTE, told, "Run the runner in such a guest, the server here.", signs)
    if signs["sgx_cpu"]:
        told = "The processor has SGX, but there is no /dev/sgx_enclave."
        advice = "Enable SGX in the BIOS, and use Linux 5.11 or newer with CONFIG_X86_SGX."
        return Finding("enclave", NOTE, told, advice, signs)
    told = "There is no trusted execution environment here (SGX, TDX, SEV): a runner is a plain process, not protected."
    return Finding("enclave", NOTE, told, "Good for development; deploy the runner on a machine that has one.", signs)


def _signs(machine: Machine) -> dict[str, Any]:
    flags = machine.cpu_flags()
    return {
        "gramine": machine.in_gramine,
        "attestation": machine.read("/dev/attestation/attestation_type").strip() or None,
        "sgx_cpu": "sgx" in flags,
        "sgx": machine.first(*_SGX) or None,
        "sgx_provision": machine.first(*_SGX_PROVISION) or None,
        "gramine_sgx": shutil.which("gramine-sgx", path=machine.environment.get("PATH")),
        "tdx_guest": machine.first(*_TDX_GUEST) or ("cpu flag tdx_guest" if "tdx_guest" in flags else None),
        "sev_guest": machine.first(*_SEV_GUEST) or None,
        "tdx_host": machine.read("/sys/module/kvm_intel/parameters/tdx").strip() in _YES,
        "sev_host": any(
            machine.read(f"/sys/module/kvm_amd/parameters/{name}").strip() in _YES
            for name in ("sev", "sev_es", "sev_snp")
        ),
    }


def _in_gramine(signs: dict[str, Any]) -> Finding:
    kind = signs["attestation"]
    if kind in (None, "none"):
        return Finding(
            "enclave",
            NOTE,
            "This is the inside of Gramine, without attestation: gramine-direct, or a manifest without it.",
            'Under gramine-sgx set sgx.remote_attestation = "dcap"; gramine-direct protects nothing.',
            signs,
        )
    told = f"This is an SGX enclave under Gramine, with {kind} attestation."
    return Finding("enclave", OK, told, figures=signs)


def _sgx(machine: Machine, signs: dict[str, Any]) -> Finding:
    device = signs["sgx"]
    told = f"SGX enclaves can be started here ({device})"
    if not os.access(machine.path(device), os.R_OK | os.W_OK):
        advice = f"Let this user read and write {device} (group sgx), or docker --device {device}."
        return Finding("enclave", NOTE, f"There is {device}, which this user may not open.", advice, signs)
    if not signs["sgx_provision"]:
        advice = "Install Intel's SGX driver rules and the AESM service, or docker --device /dev/sgx_provision."
        return Finding("enclave", NOTE, f"{told}, but not attested: there is no /dev/sgx_provision.", advice, signs)
    if signs["gramine_sgx"] is None:
        return Finding("enclave", NOTE, f"{told}, but gramine-sgx is not installed.", "Install Gramine.", signs)
    return Finding("enclave", OK, f"{told}; gramine-sgx is installed.", figures=signs)
