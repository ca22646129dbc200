#!/bin/bash
# shellcheck disable=SC2154 # dracut sets moddir and systemdutildir
# dracut module "sprout": boots a sprout, for root=sprout:...
#
# In an initramfs with systemd the root is an ordinary sysroot.mount whose type is
# "sprout" (sprout-generator.sh), mounted by mount.sprout. Without systemd it is
# mounted by a hook.

# called by dracut
check() {
    require_binaries /usr/libexec/sprout-initrd || return 1
    # Only where it is asked for: dracut --add sprout.
    return 255
}

# called by dracut
depends() {
    echo udev-rules fs-lib
}

# called by dracut
installkernel() {
    # A stick is put into other machines: it has the drivers of all, not only
    # those of this one.
    hostonly='' instmods btrfs zram loop iso9660 ext4 vfat nls_cp437 nls_ascii nls_iso8859-1 nls_utf8
    # What compresses for zram is a part of it on newer kernels.
    hostonly='' instmods lzo-rle lzo lz4 zstd
    hostonly='' instmods usb-storage uas sd_mod sr_mod xhci-pci ehci-pci nvme ahci sdhci-pci mmc_block \
        virtio_pci virtio_blk virtio_scsi
}

# called by dracut
install() {
    inst_multiple modprobe
    inst_simple /usr/libexec/sprout-initrd /usr/bin/sprout-initrd
    inst_rules 65-sproutd.rules
    inst_hook cmdline 30 "$moddir/parse-sprout.sh"
    if dracut_module_included "systemd-initrd"; then
        inst_script "$moddir/mount.sprout.sh" /usr/sbin/mount.sprout
        inst_script "$moddir/sprout-generator.sh" "$systemdutildir/system-generators/sprout-generator"
    else
        inst_hook mount 30 "$moddir/mount-sprout.sh"
    fi
}
