#!/bin/sh
# Installs the Debian packages that are listed in FILE and not there yet, with a word about it.
# usage: install-packages.sh FILE
set -eu

missing=''
for package in $(sed 's/#.*//' "$1"); do
    # A line for each architecture it is installed for.
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
        missing="$missing $package"
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
apt() { # sudo does not pass the environment on
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get "$@" >>"$log" 2>&1 </dev/null
}
# Where one of the machine's sources is broken, the others may still have all that is needed.
apt update || echo "apt-get update failed; trying to install all the same"
if ! apt install -y --no-install-recommends $missing; then
    echo "apt-get failed; the end of what it said:" >&2
    tail -n 15 "$log" >&2
    exit 1
fi
