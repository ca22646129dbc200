#!/bin/sh
# shellcheck disable=SC2034 # dracut reads rootok
# Tells dracut that somebody knows what to do with root=sprout:...

[ -z "$root" ] && root=$(getarg root=)

case "$root" in
    sprout:*) rootok=1 ;;
esac
