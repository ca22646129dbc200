package plan

// StateOf says which state members are in. The members decide; the unfinished
// request only tells a flatten that has the seed left to remove from a
// finished persist, which look the same to the kernel.
func StateOf(members []Member, intent *Request) State {
	var seeds, zrams, disks int
	for _, m := range members {
		switch {
		case m.Seed:
			seeds++
		case m.Zram:
			zrams++
		default:
			disks++
		}
	}
	switch {
	case intent != nil && begun(members, *intent):
		return Partial
	case disks == 0:
		return Volatile
	case zrams > 0 || disks > 1:
		// Written data is on more than one device; losing any of them loses
		// the file system.
		return Partial
	case seeds > 0:
		return Persistent
	}
	return Installed
}

// RoleOf says what m is to its sprout.
func RoleOf(m Member, members []Member, intent *Request) Role {
	switch {
	case m.Seed:
		return RoleSeed
	case m.Zram:
		return RoleZram
	case intent != nil && intent.Operation == Flatten && intent.Target.is(m):
		return RoleDisk
	}
	for _, other := range members {
		if other.Seed {
			return RolePersistent
		}
	}
	return RoleDisk
}

// is reports whether m is the device that r names. The Btrfs device UUID
// decides once there is one; before, the block device does.
func (r TargetRef) is(m Member) bool {
	if r.UUID != "" {
		return r.UUID == m.UUID
	}
	return r.ID.Same(m.ID)
}

// find gives the member that r names.
func (r TargetRef) find(members []Member) (Member, bool) {
	for _, m := range members {
		if r.is(m) {
			return m, true
		}
	}
	return Member{}, false
}

// begun reports whether a move that r asks for has begun and is not finished.
func begun(members []Member, r Request) bool {
	if r.Operation != Persist && r.Operation != Flatten {
		return false
	}
	_, present := r.Target.find(members)
	return present && len(leaving(members, r)) > 0
}

// leaving lists the members that r wants gone, in the order in which they
// leave: RAM first, because it is what a power cut would lose, then writable
// devices, then the seed, which is never lost.
func leaving(members []Member, r Request) []Member {
	var zrams, disks, seeds []Member
	for _, m := range members {
		switch {
		case r.Operation == AddDevice, r.Operation == Release:
		case r.Operation == RemoveDevice && !r.Target.is(m):
		case r.Operation != RemoveDevice && r.Target.is(m):
		case m.Seed && r.Operation == Persist:
		case m.Seed:
			seeds = append(seeds, m)
		case m.Zram:
			zrams = append(zrams, m)
		default:
			disks = append(disks, m)
		}
	}
	return append(append(zrams, disks...), seeds...)
}
