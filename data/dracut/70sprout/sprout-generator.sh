#!/bin/sh
# A generator of systemd: /sysroot is mounted by mount.sprout, for root=sprout:...
# It goes where it wins over the sysroot.mount of systemd-fstab-generator, which
# knows neither the type nor that reading a whole stick (rd.sprout.check) may take
# longer than systemd lets a mount take.

read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        root=*) root=${word#root=} ;;
    esac
done
case "$root" in
    sprout:*) ;;
    *) exit 0 ;;
esac

cat >"$2/sysroot.mount" <<END
[Unit]
Description=Sprout of the live media
Documentation=man:sprout(7)
DefaultDependencies=no
After=systemd-udevd.service dracut-pre-mount.service
Before=initrd-root-fs.target

[Mount]
What=$(printf %s "$root" | sed 's/%/%%/g')
Where=/sysroot
Type=sprout
TimeoutSec=infinity
END
mkdir -p "$2/initrd-root-fs.target.requires"
ln -sf ../sysroot.mount "$2/initrd-root-fs.target.requires/sysroot.mount"
