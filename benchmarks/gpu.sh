#!/usr/bin/env bash
# Builds tsqp, runs the tests that need a CUDA device, measures hand-offs between ring and device and the split model on
# it; short tables come last.
#
#   benchmarks/gpu.sh [option of benchmarks.inference ...]
#
# PYTHON (python3) makes the environment in VENV (.venv-gpu). If that Python's torch sees the GPU it is used as it is,
# else torch is installed. DEVICE (cuda:0) is the GPU; results are kept in RESULTS (results). pip's own settings hold:
# PIP_NO_INDEX and PIP_FIND_LINKS serve a machine without a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv-gpu}
DEVICE=${DEVICE:-cuda:0}
RESULTS=${RESULTS:-results}
# Workers that spin after each parallel region starve the other process.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! command -v nvidia-smi >/dev/null; then
    echo "gpu.sh: no NVIDIA GPU here (there is no nvidia-smi); run it on a machine that has one" >&2
    exit 1
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "gpu.sh: nvidia-smi finds no GPU that works; look at what it says: $(nvidia-smi -L 2>&1 | head -n 1)" >&2
    exit 1
fi

# Directory of the packages beside which PYTHON's torch lies, if that torch sees a GPU.
torch_place() {
    "$PYTHON" - <<'END'
import pathlib, sys
try:
    import torch
except ImportError:
    sys.exit(1)
if not torch.cuda.is_available():
    sys.exit(1)
print(pathlib.Path(torch.__file__).parent.parent)
END
}

build() {
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    local packages place
    packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    if place=$(torch_place 2>/dev/null); then
        # At the end of the path: what is installed in the environment comes first.
        echo "$place" >"$packages/torch-of-this-machine.pth"
    else
        "$VENV/bin/python" -m pip install -q torch
    fi
    "$VENV/bin/python" -m pip install -q 'scikit-build-core>=0.10' 'cython>=3.0' cmake ninja
    "$VENV/bin/python" -m pip install -q --no-build-isolation -e '.[test]'
    "$VENV/bin/python" -m pip install -q 'matplotlib>=3.7' || echo "gpu.sh: no matplotlib, so no plots"
    "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu.sh: nvidia-smi finds a GPU, but torch does not; install a torch that fits the driver" >&2
        exit 1
    }
}

build
mkdir -p "$RESULTS"

tests=passed
"$VENV/bin/python" -m pytest -q tests/test_cuda*.py tests/test_gpu_handoff.py || tests=FAILED

# A stream that never gets what it waits for, or a driver that hangs, must not keep what comes after.
handed=yes
timeout -k 10 600 "$VENV/bin/python" -m benchmarks.gpu_handoff --device "$DEVICE" --out "$RESULTS/gpu_handoff.json" \
    | tee "$RESULTS/gpu_handoff.txt" || handed=no

measured=yes
"$VENV/bin/python" -m benchmarks.inference --device "$DEVICE" --json "$RESULTS/gpu.json" "$@" || measured=no

echo
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
echo "CUDA tests: $tests"
cat "$RESULTS/gpu_handoff.txt"
[ "$handed" = yes ] || echo "hand-off benchmark: not measured, or only in part; see above"
if [ "$measured" = yes ]; then
    "$VENV/bin/python" -m benchmarks.inference_summary "$RESULTS/gpu.json"
else
    echo "inference benchmark: FAILED, see above"
fi
[ "$tests" = passed ] && [ "$handed" = yes ] && [ "$measured" = yes ]
