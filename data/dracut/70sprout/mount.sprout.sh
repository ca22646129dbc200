#!/bin/sh
# mount(8) calls this as `mount.sprout WHAT WHERE [-o OPTIONS]'. What to mount, and
# how, sprout-initrd takes from the kernel command line.
# mount(8) gives its helpers no PATH.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec sprout-initrd mount "$2"
