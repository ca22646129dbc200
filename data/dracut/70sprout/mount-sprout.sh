#!/bin/sh
# shellcheck disable=SC2154 # dracut sets root
# The hook that mounts the root where the initramfs has no systemd.

if [ "${root%%:*}" = sprout ] && ! ismounted "$NEWROOT"; then
    sprout-initrd mount "$NEWROOT" || emergency_shell -n sprout "sprout: nothing could be booted, see the lines above"
fi
