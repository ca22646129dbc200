#!/bin/bash
# setup.sh: install the programs that the tests and the demo call, on Debian,
# Ubuntu or Fedora. Does nothing, and needs no root, when all of them are there.
#
#   tests/setup.sh [bench|vm]
#
# With bench, also those that `make bench` compares with. With vm, it is the
# programs that build the live image and boot it, and no others.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

# What is looked for, and the packages it is in: Debian's and Fedora's.
needs="
gcc               gcc                  gcc
libc.h            libc6-dev            glibc-devel
git               git                  git
make              make                 make
mkfs.btrfs        btrfs-progs          btrfs-progs
btrfstune         btrfs-progs          btrfs-progs
mkfs.ext4         e2fsprogs            e2fsprogs
mkfs.xfs          xfsprogs             xfsprogs
mkfs.vfat         dosfstools           dosfstools
mksquashfs        squashfs-tools       squashfs-tools
cryptsetup        cryptsetup-bin       cryptsetup
mount             mount                util-linux
losetup           mount                util-linux
addpart           util-linux           util-linux
mkswap            util-linux           util-linux
wipefs            util-linux           util-linux
sfdisk            fdisk                util-linux
rsync             rsync                rsync
setfattr          attr                 attr
setcap            libcap2-bin          libcap
modprobe          kmod                 kmod
dbus-daemon       dbus-daemon          dbus-daemon
busctl            systemd              systemd
systemd-analyze   systemd              systemd
systemd-nspawn    systemd-container    systemd-container
systemd-repart    systemd-repart       systemd-udev
gdbus             libglib2.0-bin       glib2
polkitd           polkitd              polkit
pkcheck           polkitd              polkit
xmllint           libxml2-utils        libxml2
man               man-db               man-db
shellcheck        shellcheck           ShellCheck
"

needs_vm="
make              make                 make
mmdebstrap        mmdebstrap           mmdebstrap
debian.gpg        debian-archive-keyring debian-keyring
gpg               gpg                  gnupg2
newuidmap         uidmap               shadow-utils
xorriso           xorriso              xorriso
mcopy             mtools               mtools
sfdisk            fdisk                util-linux
mkfs.vfat         dosfstools           dosfstools
mkfs.btrfs        btrfs-progs          btrfs-progs
mksquashfs        squashfs-tools       squashfs-tools
cpio              cpio                 cpio
zstd              zstd                 zstd
qemu-system-x86_64 qemu-system-x86 qemu-system-x86
qemu-img          qemu-utils           qemu-img
ovmf              ovmf                 edk2-ovmf
"
if [ "${1:-}" = vm ]; then
	needs=$needs_vm
fi

# The tools of other installers and copiers.
if [ "${1:-}" = bench ]; then
	needs+="
unsquashfs        squashfs-tools       squashfs-tools
tar               tar                  tar
cp                coreutils            coreutils
dd                coreutils            coreutils
btrfs             btrfs-progs          btrfs-progs
"
fi

present() {
	case $1 in
	ovmf) [ -e /usr/share/OVMF/OVMF_CODE_4M.fd ] || [ -e /usr/share/edk2/ovmf/OVMF_CODE.fd ] ;;
	debian.gpg) [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] ;;
	libc.h) echo '#include <stdlib.h>' | gcc -E - >/dev/null 2>&1 ;;
	polkitd) [ -x /usr/lib/polkit-1/polkitd ] || [ -x /usr/libexec/polkitd ] ;;
	modprobe) { [ -e /dev/btrfs-control ] && [ -e /dev/loop-control ] && [ -e /dev/fuse ] && [ -e /sys/class/zram-control ]; } || command -v modprobe >/dev/null ;;
	*) command -v "$1" >/dev/null ;;
	esac
}

# A module that is built in, or loaded already, shows in /sys or /dev.
load_modules() {
	[ -e /dev/btrfs-control ] || modprobe btrfs
	[ -e /dev/loop-control ] || modprobe loop
	[ -e /dev/fuse ] || modprobe fuse
	[ -e /sys/class/zram-control ] || modprobe zram num_devices=0 || {
		# Ubuntu keeps it in a package of its own.
		apt-get -q install -y --no-install-recommends "linux-modules-extra-$(uname -r)"
		modprobe zram num_devices=0
	}
}

debian=() fedora=() missing=()
while read -r name deb rpm; do
	if [ -n "$name" ] && ! present "$name"; then
		missing+=("$name") debian+=("$deb") fedora+=("$rpm")
	fi
done <<<"$needs"

if [ ${#missing[@]} -gt 0 ]; then
	if [ "$(id -u)" -ne 0 ]; then
		echo "missing: ${missing[*]}; run \`sudo tests/setup.sh $*\`" >&2
		exit 1
	fi
	echo "installing what is missing: ${missing[*]}"
	if command -v apt-get >/dev/null; then
		export DEBIAN_FRONTEND=noninteractive
		apt-get -q update
		# Debian 11 and Ubuntu 22.04 have no packages dbus-daemon and polkitd of their own.
		for i in "${!debian[@]}"; do
			[ -n "$(apt-cache -q madison "${debian[i]}")" ] && continue
			case ${debian[i]} in
			dbus-daemon) debian[i]=dbus ;;
			polkitd) debian[i]=policykit-1 ;;
			systemd-repart) debian[i]=systemd ;;
			fdisk) debian[i]=util-linux ;;
			esac
		done
		apt-get -q install -y --no-install-recommends "${debian[@]}"
	elif command -v dnf >/dev/null; then
		dnf install -y --setopt=install_weak_deps=False "${fedora[@]}"
	else
		echo "neither apt-get nor dnf is here; install what gives: ${missing[*]}" >&2
		exit 1
	fi
fi

if [ "$(id -u)" -eq 0 ]; then
	load_modules
fi
