#!/bin/bash
# build.sh: build the image of a live stick from Debian packages.
#
#   make live-image [SUITE=trixie] [INITRAMFS=initramfs-tools] ...
#
# The stick is what a distribution's ISO is after dd, made by ISO tools alone:
#
#   GPT  1  ISO 9660, label SPROUTLIVE, with LiveOS/root.img, the seed
#        2  ESP: systemd-boot, the kernel, the initramfs
#        3  a few hundred KiB that ISO 9660 wants
#           free space, for a partition that keeps the session
#
# Debian's packages are unpacked once a week, into a tar archive that is kept;
# this is the only slow step and the only one that uses the network. Everything
# happens in namespaces of this script's own. Root gets a seed with packed small
# files (package seed), which takes a loop device and a mount; for anybody else
# mkfs.btrfs writes a plain one.
set -euo pipefail

SUITE=${SUITE:-trixie}             # trixie or bookworm
INITRAMFS=${INITRAMFS:-initramfs-tools} # or dracut
BACKPORTS_KERNEL=${BACKPORTS_KERNEL:-} # 1: the kernel of SUITE-backports
BASELINE=${BASELINE:-}             # 1: squashfs and dmsquash-live, to compare with
STICK_FREE=${STICK_FREE:-1536M}    # left free on the stick
EXTRA_PACKAGES=${EXTRA_PACKAGES:-} # with spaces between them
OVERLAY=${OVERLAY:-}               # a directory that is copied over the root
APPEND=${APPEND:-}                 # more for the kernel's command line
COMPRESS=${COMPRESS:-3}            # level of zstd for the seed

LABEL=SPROUTLIVE
REPO=$(cd "$(dirname "$0")/.." && pwd)
CACHE=$REPO/.cache/live
OUT=${OUT:-$CACHE/${BASELINE:+baseline.img}}
[[ $OUT == */ ]] && OUT+=stick.img

if [ -n "$BASELINE" ]; then
	INITRAMFS=dracut
fi

# All mounts are in a namespace that ends with this script; users become the root
# of a namespace with all their subordinate users in it.
if [ -z "${LIVE_INSIDE:-}" ]; then
	mkdir -p "$CACHE"
	user=()
	[ "$(id -u)" -eq 0 ] || user=(--user --map-root-user --map-auto)
	LIVE_INSIDE=${user[0]:-root} exec unshare "${user[@]}" --mount --pid --fork --kill-child "$0"
fi

say() { echo "live: $(printf '%3d' $SECONDS) s: $*"; }
fail() {
	echo "cannot build the live image: $*" >&2
	exit 1
}

# quietly shows what a program says only if it fails.
quietly() {
	local out
	out=$("$@" 2>&1) || {
		echo "$out" >&2
		fail "${1##*/} failed"
	}
}

packages() {
	echo linux-image-amd64"${BACKPORTS_KERNEL:+/$SUITE-backports}"
	echo systemd systemd-sysv systemd-boot systemd-boot-efi udev dbus libpam-systemd
	echo polkitd pkexec sudo btrfs-progs dosfstools fdisk kmod zstd procps less
	case $SUITE in
	bookworm) ;;
	*) echo systemd-repart ;;
	esac
	case $INITRAMFS in
	dracut) echo dracut dracut-live ;;
	*) echo initramfs-tools ;;
	esac
	echo "$EXTRA_PACKAGES"
}

# make_tar unpacks and configures the packages. Their initramfs is left out: it
# comes later, with the module of sproutd.
make_tar() {
	local options=()
	if [ -n "$BACKPORTS_KERNEL" ]; then
		options+=(--setup-hook="sed -n 's/ $SUITE main/ $SUITE-backports main/p;q' \"\$1/etc/apt/sources.list\" >\"\$1/etc/apt/sources.list.d/backports.list\"")
	fi
	# shellcheck disable=SC2016 # mmdebstrap's shell knows what $1 is
	INITRD=No mmdebstrap --quiet --variant=minbase --include="$(packages | xargs | tr ' ' ,)" \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--customize-hook='rm -f "$1/etc/hostname" "$1"/etc/ssh/ssh_host_*' \
		"${options[@]}" "$SUITE" "$1.partial.tar"
	mv "$1.partial.tar" "$1"
}

# in_root runs a command in the new root, with the mounts that it needs. They are
# in a namespace of its own: nothing here can delete through them.
in_root() {
	# shellcheck disable=SC2016 # it is for the inner shell
	unshare --mount --pid --fork --kill-child bash -ec '
		mount -t proc proc "$0/proc"
		mount -t tmpfs -o mode=755 tmpfs "$0/dev"
		ln -s /proc/self/fd "$0/dev/fd"
		for node in null zero full random urandom; do
			touch "$0/dev/$node"
			mount --bind "/dev/$node" "$0/dev/$node"
		done
		export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
		exec chroot "$0" "$@"' "$root" "$@"
}

# configure makes a live system of the packages.
configure() {
	: >"$root/etc/machine-id" # each boot has one of its own, until it is persistent
	echo sproutlive >"$root/etc/hostname"
	printf '127.0.0.1 localhost\n127.0.1.1 sproutlive\n' >"$root/etc/hosts"
	echo LANG=C.UTF-8 >"$root/etc/default/locale"
	echo '# The root is mounted by the initramfs, and there is nothing else.' >"$root/etc/fstab"
	in_root useradd --create-home --shell /bin/bash --groups sudo --user-group live
	in_root passwd --quiet --delete live
	in_root passwd --quiet --lock root
	echo 'live ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/live"
	chmod 0440 "$root/etc/sudoers.d/live"
	# The group that this rule asks for is the user's own.
	install -D -m 0644 "$REPO/data/examples/50-sproutd-live.rules" -t "$root/etc/polkit-1/rules.d"
	local getty
	for getty in getty serial-getty; do
		mkdir -p "$root/etc/systemd/system/$getty@.service.d"
		cat >"$root/etc/systemd/system/$getty@.service.d/live.conf" <<-'END'
			[Service]
			ExecStart=
			ExecStart=-/sbin/agetty --autologin live --noclear --keep-baud 115200,57600,38400,9600 - $TERM
		END
	done
	cat >"$root/etc/motd" <<-'END'

		This is a live system. What you change is in memory, and gone at the next boot,
		until you say where to keep it.
		  sproutctl status             what it stands on now
		  sproutctl devices            what it could move to
		  sudo sproutctl persist free  keep it, in the free space of the stick
		  sudo sproutctl install DISK  move it to a disk, while you work

	END
	if [ -n "$OVERLAY" ]; then
		cp -a --no-preserve=ownership "$OVERLAY/." "$root/"
	fi
	# What each volatile boot would do again after a change of /usr.
	in_root ldconfig
	in_root journalctl --update-catalog
	in_root systemd-hwdb update --usr
	touch "$root/etc/.updated" "$root/var/.updated"
}

make_initramfs() {
	local options=()
	case $INITRAMFS in
	dracut)
		options=(--add sprout)
		[ -z "$BASELINE" ] || options=(--add dmsquash-live --omit sprout)
		quietly in_root dracut --quiet --force --no-hostonly --kver "$kernel" "${options[@]}" "/boot/initrd.img-$kernel"
		;;
	initramfs-tools)
		quietly in_root mkinitramfs -o "/boot/initrd.img-$kernel" "$kernel"
		;;
	esac
}

# progs runs a program of the new root's btrfs-progs, which know more than an older
# one of this machine, with $work as its /. So they see no mounts of others: to
# look whether these are of the image takes root.
progs() {
	local program
	program=$(cd "$work" && echo root/usr/*bin/"$1")
	shift
	mkdir -p "$work/proc"
	# shellcheck disable=SC2016 # it is for the inner shell
	unshare --mount --pid --fork --kill-child bash -ec 'mount -t proc proc "$0/proc"; exec chroot "$0" "$@"' "$work" \
		/root/lib64/ld-linux-x86-64.so.2 --library-path /root/usr/lib/x86_64-linux-gnu "/$program" "$@"
}

# make_seed makes the image file of the root.
make_seed() {
	if [ -n "$BASELINE" ]; then
		quietly mksquashfs "$root" "$1/squashfs.img" -comp zstd -Xcompression-level "$COMPRESS" -quiet -no-progress
	elif [ "$LIVE_INSIDE" = root ]; then
		quietly "$REPO/bin/sproutctl" seed build --label "$LABEL" --compress-level "$COMPRESS" "$root" "$1/root.img"
	else
		local compress=()
		if progs mkfs.btrfs --help 2>&1 | grep -q -e --compress; then
			compress=(--compress "zstd:$COMPRESS")
		fi
		quietly progs mkfs.btrfs --label "$LABEL" -d single -m single "${compress[@]}" --shrink \
			--rootdir /root "${1#"$work"}/root.img"
		quietly progs btrfstune -S 1 -f "${1#"$work"}/root.img"
	fi
}

# entry writes an entry of the boot menu: name, title, options.
entry() {
	cat >"$work/esp/loader/entries/$1.conf" <<-END
		title $2
		sort-key $1
		linux /live/linux
		initrd /live/initrd
		options $3 console=tty0 console=ttyS0 $APPEND
	END
}

make_esp() {
	local esp=$work/esp size
	mkdir -p "$esp"/{EFI/BOOT,loader/entries,live}
	cp "$root/usr/lib/systemd/boot/efi/systemd-bootx64.efi" "$esp/EFI/BOOT/BOOTX64.EFI"
	cp "$root/boot/vmlinuz-$kernel" "$esp/live/linux"
	cp "$root/boot/initrd.img-$kernel" "$esp/live/initrd"
	printf '%s\n' 'timeout 0' 'default 1-live.conf' 'editor yes' >"$esp/loader/loader.conf"
	if [ -n "$BASELINE" ]; then
		entry 1-live "Live system on squashfs" "root=live:LABEL=$LABEL rd.live.image rd.live.overlay.overlayfs=1"
	else
		entry 1-live "Live system" "root=sprout:LABEL=$LABEL"
		entry 2-clean "Live system, without what was kept" "root=sprout:LABEL=$LABEL rd.sprout.persist=no"
		entry 3-check "Live system, checked for damage first" "root=sprout:LABEL=$LABEL rd.sprout.check"
		entry 4-reset "Start over: drop what was kept" "root=sprout:LABEL=$LABEL rd.sprout.reset"
	fi
	# Firmware and mtools take FAT32 only with 65525 clusters and more, so these
	# are of one sector each.
	size=$(($(du --summarize --bytes "$esp" | cut -f1) * 103 / 100 / 1048576 + 8))
	truncate -s "$((size < 40 ? 40 : size))M" "$work/esp.img"
	quietly mkfs.vfat -F 32 -s 1 -n ESP "$work/esp.img"
	mcopy -s -i "$work/esp.img" "$esp"/* ::
}

make_stick() {
	quietly xorriso -as mkisofs -quiet -V "$LABEL" -o "$work/stick.img" -iso-level 3 -R -partition_offset 16 \
		-append_partition 2 C12A7328-F81F-11D2-BA4B-00A0C93EC93B "$work/esp.img" -appended_part_as_gpt \
		-e --interval:appended_partition_2:all:: -no-emul-boot "$work/iso"
	truncate -s "+$STICK_FREE" "$work/stick.img"
	# Without --no-tell-kernel it would wait for all file systems of this machine.
	quietly sfdisk --quiet --no-tell-kernel --relocate gpt-bak-std "$work/stick.img"
	cp --sparse=always "$work/stick.img" "$OUT.partial"
	mv "$OUT.partial" "$OUT"
}

for tool in mmdebstrap xorriso mcopy sfdisk mkfs.vfat; do
	command -v "$tool" >/dev/null || fail "$tool is not installed, run \`sudo tests/setup.sh vm\`"
done

[[ $INITRAMFS == dracut || $INITRAMFS == initramfs-tools ]] ||
	fail "INITRAMFS is dracut or initramfs-tools, not $INITRAMFS"
[ -z "$OVERLAY" ] || [ -d "$OVERLAY" ] || fail "OVERLAY is not a directory: $OVERLAY"

umask 022
# Not below the checkout: make gives what root owns there back to its owner.
work=$(mktemp -d "${TMPDIR:-/var/tmp}/sproutd-live.XXXXXX")
tar=$CACHE/root-$({ echo "$SUITE" && packages && declare -f make_tar; } | sha256sum | cut -c1-12).tar
trap 'rm -rf --one-file-system "$work" "$tar.partial.tar"' EXIT
if [ -z "$(find "$tar" -mtime -7 2>/dev/null)" ]; then
	say "unpack Debian $SUITE"
	make_tar "$tar"
	find "$CACHE" -name 'root-*.tar' -mtime +7 -delete
fi
root=$work/root
mkdir -p "$root" "$work/iso/LiveOS"
tar -x -f "$tar" -C "$root" --xattrs --xattrs-include='*' --exclude='./dev/*'
kernel=$(cd "$root/usr/lib/modules" && printf '%s\n' * | sort -V | tail -1)
say "install sproutd in it"
make -C "$REPO" --no-print-directory --silent install DESTDIR="$root" GIVE_BACK=:
configure
say "make the initramfs for $kernel with $INITRAMFS"
make_initramfs
say "make the seed"
make_seed "$work/iso/LiveOS"
say "make the stick"
make_esp
make_stick
say "$OUT is ready: $(du -h --apparent-size "$OUT" | cut -f1) with $STICK_FREE free, kernel $kernel"
