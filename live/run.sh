#!/bin/bash
# run.sh: boot the live stick in a virtual machine, with this terminal as its
# serial console: `make vm`. Give it more arguments of QEMU if you like.
#
# The stick is on USB and the image itself stays as it is: what the machine writes
# goes to .cache/live/vm, and so the next `make vm` finds what was made persistent.
# `make vm FRESH=1`, or a newer image, begins again.
set -euo pipefail

CACHE=$(cd "$(dirname "$0")/.." && pwd)/.cache/live
IMAGE=${OUT:-$CACHE/stick.img}
VM=$CACHE/vm

fail() {
	echo "cannot start the virtual machine: $*" >&2
	exit 1
}

first() {
	local file
	for file in "$@"; do
		[ -e "$file" ] && echo "$file" && return
	done
	fail "no firmware is here ($1), run \`sudo tests/setup.sh vm\`"
}

command -v qemu-system-x86_64 >/dev/null || fail "QEMU is not installed, run \`sudo tests/setup.sh vm\`"
[ -e "$IMAGE" ] || fail "there is no $IMAGE, run \`sudo make live-image\`"
code=$(first /usr/share/OVMF/OVMF_CODE_4M.fd /usr/share/edk2/ovmf/OVMF_CODE.fd)
vars=$(first /usr/share/OVMF/OVMF_VARS_4M.fd /usr/share/edk2/ovmf/OVMF_VARS.fd)

if [ -n "${FRESH:-}" ] || [ "$IMAGE" -nt "$VM/stick.qcow2" ]; then
	rm -rf "$VM"
	mkdir -p "$VM"
	qemu-img create -q -f qcow2 -b "$IMAGE" -F raw "$VM/stick.qcow2"
	qemu-img create -q -f qcow2 "$VM/disk.qcow2" 4G
	cp "$vars" "$VM/vars.fd"
fi

# /dev/kvm may be there and still not work.
accel=(-accel "tcg,thread=multi" -cpu max)
if [ -w /dev/kvm ] && qemu-system-x86_64 -accel kvm -machine none -display none -nodefaults -monitor none -serial none \
	-daemonize -pidfile "$VM/probe.pid" 2>/dev/null; then
	kill "$(cat "$VM/probe.pid")"
	accel=(-accel kvm -cpu host)
else
	echo "no KVM here: the processor is emulated, and booting takes half a minute or more"
fi

cat <<END
The stick is $IMAGE, and there is an empty NVMe disk of 4 GiB.
You are logged in as "live", without a password; try: sproutctl status
To leave: \`sudo poweroff\`, or Ctrl-A and then X, which is pulling the plug.
To pull the stick out: Ctrl-A, then C, then "device_del stick", then Ctrl-A and C again.
END
exec qemu-system-x86_64 -name sproutlive -machine q35 "${accel[@]}" -smp 2 -m 2048 -nodefaults -display none \
	-serial mon:stdio \
	-drive "if=pflash,format=raw,readonly=on,file=$code" -drive "if=pflash,format=raw,file=$VM/vars.fd" \
	-device qemu-xhci,id=xhci \
	-drive "if=none,id=stickdrive,format=qcow2,file=$VM/stick.qcow2" \
	-device usb-storage,id=stick,bus=xhci.0,drive=stickdrive,removable=on \
	-drive "if=none,id=diskdrive,format=qcow2,file=$VM/disk.qcow2" \
	-device nvme,serial=sprout,drive=diskdrive \
	"$@"
