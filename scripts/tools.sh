#!/usr/bin/env bash
# tools.sh demo|test|all|bench: sees to the outside programs that the demo, tests, slow tests or benchmarks run.
# As root on Debian/Ubuntu the missing ones are installed; otherwise they are named, and what needs them is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# What to look for (a program, or a path that may hold a *) and the package that brings it.
demo="
qemu-img                                qemu-utils
qemu-system-x86_64                      qemu-system-x86
"
test="$demo
/usr/share/OVMF                         ovmf
objdump                                 binutils
xorriso                                 xorriso
isoinfo                                 genisoimage
7z                                      p7zip-full
bsdtar                                  libarchive-tools
mdir                                    mtools
mkfs.vfat                               dosfstools
blkid                                   util-linux
openssl                                 openssl
gpg                                     gpg
gpgv                                    gpgv
ssh-keygen                              openssh-client
sfdisk                                  fdisk
debugfs                                 e2fsprogs
file                                    file
zip                                     zip
xz                                      xz-utils
bzip2                                   bzip2
zstd                                    zstd
/usr/lib/python3/dist-packages/pyvhdi*  python3-libvhdi
"
all="$test
mmdebstrap                              mmdebstrap
mkfs.ext4                               e2fsprogs
mkfs.xfs                                xfsprogs
losetup                                 mount
strace                                  strace
chromium                                chromium
ip                                      iproute2
cc                                      gcc
"
bench="$demo
mkfs.ext4                               e2fsprogs
mkfs.xfs                                xfsprogs
mkfs.btrfs                              btrfs-progs
mount                                   mount
nbdcopy                                 libnbd-bin
"

case ${1:-} in
    demo) wanted=$demo ;;
    test) wanted=$test ;;
    all) wanted=$all ;;
    bench) wanted=$bench ;;
    *) echo "usage: tools.sh demo|test|all|bench" >&2; exit 2 ;;
esac

there() {
    case $1 in
        /*) compgen -G "$1" >/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

missing=()
packages=()
while read -r what package; do
    if [ -n "$what" ] && ! there "$what"; then
        missing+=("$what")
        packages+=("$package")
    fi
done <<<"$wanted"
[ ${#missing[@]} -gt 0 ] || exit 0

printf 'Outside tools missing: %s\n' "${missing[*]}"
scripts/apt.sh "${packages[@]}" || echo "Going on: what needs them is skipped and says so."
