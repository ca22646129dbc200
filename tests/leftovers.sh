#!/bin/bash
# leftovers.sh: run a command with a temporary directory of its own, and fail
# when it leaves loop devices, mounts or zram devices behind.
#
#   tests/leftovers.sh COMMAND [ARGUMENT...]
#
# Loops and mounts are the command's own when they are in its temporary
# directory; what else goes on on the machine does not matter. Says nothing when
# all is clean. The exit code is the command's own, or 1 when it succeeded and
# left something behind. Ctrl-C, TERM and HUP reach the command, and the check
# comes after its end all the same.
set -u

TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/sproutd-run.XXXXXX") || exit 1
export TMPDIR
chmod 0755 "$TMPDIR" # other users connect to the bus in it

# What is there now, a line each.
inventory() {
	local backing zram where what
	for backing in /sys/block/loop*/loop/backing_file; do
		[ -e "$backing" ] || continue
		what=${backing#/sys/block/}
		where=$(cat "$backing" 2>/dev/null)
		[[ $where == "$TMPDIR"/* ]] && echo "loop /dev/${what%%/*} ($where)"
	done
	for zram in /sys/block/zram*; do
		[ -e "$zram" ] && echo "zram /dev/${zram##*/}"
	done
	while read -r _ _ _ _ where _; do
		[[ $where == "$TMPDIR"/* ]] && echo "mount $where"
	done </proc/self/mountinfo
	return 0
}

before=$(inventory | sort)

# Job control gives the command a process group of its own, so that a signal
# ends the command and this script lives on to look.
set -m
"$@" &
pid=$!
# shellcheck disable=SC2064 # the process is known now
for signal in INT TERM HUP; do
	trap "kill -$signal -- -$pid 2>/dev/null" "$signal"
done
while
	wait "$pid"
	status=$?
	kill -0 "$pid" 2>/dev/null
do :; done
trap - INT TERM HUP

# The kernel detaches a loop device some time after its last user has gone.
for _ in {1..50}; do
	left=$(comm -13 <(echo "$before") <(inventory | sort))
	if [ -z "$left" ]; then
		rm -rf --one-file-system -- "$TMPDIR"
		exit "$status"
	fi
	sleep 0.1
done
echo "left behind by $*:" >&2
echo "$left" >&2
[ "$status" -eq 0 ] && status=1
exit "$status"
