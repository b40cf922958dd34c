#!/bin/sh
# Installs the Debian packages that are listed in FILE and not there yet, with a word about it.
# usage: install-packages.sh FILE
set -eu

missing=''
for package in $(sed 's/#.*//' "$1"); do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
[ "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "pyvmm's set-up needs apt-get (Debian or a relative) to install:$missing" >&2
    exit 1
fi
as_root=''
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "pyvmm needs these packages; as root run: apt-get install --no-install-recommends$missing" >&2
        exit 1
    fi
    as_root=sudo
fi
echo "Installing Debian packages (once, with apt-get):$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
if ! { $as_root apt-get update && $as_root apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
    echo "apt-get failed; the end of what it said:" >&2
    tail -n 15 "$log" >&2
    exit 1
fi
