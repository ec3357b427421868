#!/bin/sh
# The directory of the socket, for the one user both ends run as.
#   directories.sh UID DIRECTORY
set -eu
[ $# -eq 2 ] || { echo "usage: $0 UID DIRECTORY" >&2; exit 2; }
install -d -m 0700 -o "$1" -g "$1" "$2"
