#!/usr/bin/env bash
# apt.sh PACKAGE…: installs Debian/Ubuntu packages, printing the command line first.
# Fails with the reason, and the line to run by hand, where it may not or cannot: IMAGEKIT_NO_APT=1, not root, no apt-get.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

reason=
case ${IMAGEKIT_NO_APT:-0} in 0) ;; *) reason="IMAGEKIT_NO_APT is set" ;; esac
[ "$(id -u)" = 0 ] || reason="not root"
command -v apt-get >/dev/null || reason="no apt-get on this system"
if [ -n "$reason" ]; then
    printf 'Not installed (%s): %s\n' "$reason" "$*"
    exit 1
fi

printf 'apt-get update && apt-get install -y --no-install-recommends %s\n' "$*"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
wait_for_lock=(-o DPkg::Lock::Timeout=300)
# A failed update is not fatal: the lists that are there may do.
apt-get "${wait_for_lock[@]}" -qq update </dev/null >"$log" 2>&1 || true
if ! apt-get "${wait_for_lock[@]}" -qq -y --no-install-recommends install "$@" </dev/null >>"$log" 2>&1; then
    tail -n 20 "$log"
    printf 'apt-get failed: not installed: %s\n' "$*"
    exit 1
fi
