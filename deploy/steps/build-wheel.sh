#!/bin/sh
# Builds the wheel of this tree by way of its sdist, so that nothing else in the tree counts, or is changed.
# Needs Python with venv, gcc and make.
#   build-wheel.sh SOURCE OUT
set -eu
[ $# -eq 2 ] || { echo "usage: $0 SOURCE OUT" >&2; exit 2; }
source=$1 out=$2
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/pip" install -q --disable-pip-version-check build
"$tools/bin/python" -m build --outdir "$out" "$source"
rm -f "$out"/tsqp-*.tar.gz
