#!/bin/sh
# Makes a virtual environment with torch and the wheel in it: all that an image holds beside the base.
#   install.sh WHEELS PREFIX [EXTRA]
# TORCH says which torch (torch==2.13.0, torch), PIP_INDEX_URL and pip's other variables where from.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 WHEELS PREFIX [EXTRA]" >&2; exit 2; }
wheels=$1 prefix=$2 extra=${3:-}
set -- "$wheels"/tsqp-*.whl
if [ $# -ne 1 ] || [ ! -f "$1" ]; then
    echo "there has to be one wheel of tsqp in $wheels; build it with build-wheel.sh" >&2
    exit 1
fi
"${PYTHON:-python3}" -m venv "$prefix"
"$prefix/bin/pip" install -q --disable-pip-version-check --no-cache-dir "${TORCH:-torch}"
"$prefix/bin/pip" install -q --disable-pip-version-check --no-cache-dir "$1${extra:+[$extra]}"
"$prefix/bin/tsqp" --version
