package btrfs

import (
	"testing"
	"unsafe"
)

// The numbers are sizeof and offsetof of the structures in linux/btrfs.h.
func TestStructuresMatchTheKernels(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"vol_args", unsafe.Sizeof(volArgs{}), 4096},
		{"vol_args.name", unsafe.Offsetof(volArgs{}.name), 8},
		{"vol_args_v2", unsafe.Sizeof(volArgsV2{}), 4096},
		{"vol_args_v2.flags", unsafe.Offsetof(volArgsV2{}.flags), 16},
		{"vol_args_v2.devid", unsafe.Offsetof(volArgsV2{}.name), 56},
		{"fs_info", unsafe.Sizeof(fsInfoArgs{}), 1024},
		{"fs_info.num_devices", unsafe.Offsetof(fsInfoArgs{}.numDevices), 8},
		{"fs_info.fsid", unsafe.Offsetof(fsInfoArgs{}.fsid), 16},
		{"fs_info.nodesize", unsafe.Offsetof(fsInfoArgs{}.nodeSize), 32},
		{"fs_info.sectorsize", unsafe.Offsetof(fsInfoArgs{}.sectorSize), 36},
		{"fs_info.csum_type", unsafe.Offsetof(fsInfoArgs{}.csumType), 44},
		{"fs_info.csum_size", unsafe.Offsetof(fsInfoArgs{}.csumSize), 46},
		{"fs_info.flags", unsafe.Offsetof(fsInfoArgs{}.flags), 48},
		{"fs_info.generation", unsafe.Offsetof(fsInfoArgs{}.generation), 56},
		{"fs_info.metadata_uuid", unsafe.Offsetof(fsInfoArgs{}.metadataUUID), 64},
		{"dev_info", unsafe.Sizeof(devInfoArgs{}), 4096},
		{"dev_info.uuid", unsafe.Offsetof(devInfoArgs{}.uuid), 8},
		{"dev_info.bytes_used", unsafe.Offsetof(devInfoArgs{}.bytesUsed), 24},
		{"dev_info.total_bytes", unsafe.Offsetof(devInfoArgs{}.totalBytes), 32},
		{"dev_info.fsid", unsafe.Offsetof(devInfoArgs{}.fsid), 40},
		{"dev_info.path", unsafe.Offsetof(devInfoArgs{}.path), 3072},
		{"space_args", unsafe.Sizeof(spaceArgs{}), 16},
		{"space_args.total_spaces", unsafe.Offsetof(spaceArgs{}.total), 8},
		{"space_info", unsafe.Sizeof(spaceInfo{}), 24},
		{"space_info.used_bytes", unsafe.Offsetof(spaceInfo{}.used), 16},
		{"dev_replace (start)", unsafe.Sizeof(replaceStartArgs{}), 2600},
		{"dev_replace.start", unsafe.Offsetof(replaceStartArgs{}.start), 16},
		{"dev_replace.spare (start)", unsafe.Offsetof(replaceStartArgs{}.spare), 2088},
		{"dev_replace_start", unsafe.Sizeof(replaceStart{}), 2072},
		{"dev_replace_start.srcdev_name", unsafe.Offsetof(replaceStart{}.src), 16},
		{"dev_replace_start.tgtdev_name", unsafe.Offsetof(replaceStart{}.target), 1041},
		{"dev_replace (status)", unsafe.Sizeof(replaceStatusArgs{}), 2600},
		{"dev_replace.status", unsafe.Offsetof(replaceStatusArgs{}.status), 16},
		{"dev_replace.spare (status)", unsafe.Offsetof(replaceStatusArgs{}.spare), 2088},
		{"dev_replace_status", unsafe.Sizeof(replaceStatus{}), 48},
		{"dev_replace_status.time_stopped", unsafe.Offsetof(replaceStatus{}.stopped), 24},
		{"dev_replace_status.uncorrectable", unsafe.Offsetof(replaceStatus{}.readErrors), 40},
		{"balance_args (filter)", unsafe.Sizeof(balanceFilter{}), 136},
		{"balance_args.usage", unsafe.Offsetof(balanceFilter{}.usage), 8},
		{"balance_args.vend", unsafe.Offsetof(balanceFilter{}.vend), 48},
		{"balance_args.target", unsafe.Offsetof(balanceFilter{}.target), 56},
		{"balance_args.flags", unsafe.Offsetof(balanceFilter{}.flags), 64},
		{"balance_args.limit", unsafe.Offsetof(balanceFilter{}.limit), 72},
		{"balance_args.stripes_min", unsafe.Offsetof(balanceFilter{}.stripesMin), 80},
		{"ioctl_balance_args", unsafe.Sizeof(balanceArgs{}), 1024},
		{"ioctl_balance_args.data", unsafe.Offsetof(balanceArgs{}.data), 16},
		{"ioctl_balance_args.meta", unsafe.Offsetof(balanceArgs{}.meta), 152},
		{"ioctl_balance_args.sys", unsafe.Offsetof(balanceArgs{}.sys), 288},
		{"ioctl_balance_args.stat", unsafe.Offsetof(balanceArgs{}.expected), 424},
		{"search_key", unsafe.Sizeof(searchKey{}), 104},
		{"search_key.min_offset", unsafe.Offsetof(searchKey{}.minOffset), 24},
		{"search_key.min_transid", unsafe.Offsetof(searchKey{}.minTransID), 40},
		{"search_key.min_type", unsafe.Offsetof(searchKey{}.minType), 56},
		{"search_key.nr_items", unsafe.Offsetof(searchKey{}.nrItems), 64},
		{"search_args_v2", unsafe.Sizeof(searchArgsV2{}), 112},
		{"search_args_v2.buf_size", unsafe.Offsetof(searchArgsV2{}.bufSize), 104},
		{"search_header", unsafe.Sizeof(searchHeader{}), 32},
		{"search_header.objectid", unsafe.Offsetof(searchHeader{}.objectID), 8},
		{"search_header.offset", unsafe.Offsetof(searchHeader{}.offset), 16},
		{"search_header.type", unsafe.Offsetof(searchHeader{}.typ), 24},
		{"search_header.len", unsafe.Offsetof(searchHeader{}.length), 28},
		{"ino_lookup", unsafe.Sizeof(inoLookupArgs{}), 4096},
		{"ino_lookup.name", unsafe.Offsetof(inoLookupArgs{}.name), 16},
		{"logical_ino", unsafe.Sizeof(logicalInoArgs{}), 56},
		{"logical_ino.flags", unsafe.Offsetof(logicalInoArgs{}.flags), 40},
		{"logical_ino.inodes", unsafe.Offsetof(logicalInoArgs{}.inodes), 48},
		{"data_container.elem_cnt", unsafe.Offsetof(dataContainer{}.count), 8},
		{"data_container.val", unsafe.Offsetof(dataContainer{}.refs), 16},
		{"inode reference", unsafe.Sizeof(inodeRef{}), 24},

		// And the request numbers, as the header's macros expand.
		{"BTRFS_IOC_RESIZE", iocResize, 0x50009403},
		{"BTRFS_IOC_SCAN_DEV", iocScanDev, 0x50009404},
		{"BTRFS_IOC_FORGET_DEV", iocForgetDev, 0x50009405},
		{"BTRFS_IOC_SYNC", iocSync, 0x9408},
		{"BTRFS_IOC_ADD_DEV", iocAddDev, 0x5000940a},
		{"BTRFS_IOC_TREE_SEARCH_V2", iocTreeSearchV2, 0xc0709411},
		{"BTRFS_IOC_INO_LOOKUP", iocInoLookup, 0xd0009412},
		{"BTRFS_IOC_SPACE_INFO", iocSpaceInfo, 0xc0109414},
		{"BTRFS_IOC_DEV_INFO", iocDevInfo, 0xd000941e},
		{"BTRFS_IOC_FS_INFO", iocFSInfo, 0x8400941f},
		{"BTRFS_IOC_BALANCE_V2", iocBalanceV2, 0xc4009420},
		{"BTRFS_IOC_BALANCE_CTL", iocBalanceCtl, 0x40049421},
		{"FS_IOC_GETFSLABEL", iocGetLabel, 0x81009431},
		{"FS_IOC_SETFSLABEL", iocSetLabel, 0x41009432},
		{"BTRFS_IOC_DEV_REPLACE", iocDevReplace, 0xca289435},
		{"BTRFS_IOC_RM_DEV_V2", iocRmDevV2, 0x5000943a},
		{"BTRFS_IOC_LOGICAL_INO_V2", iocLogicalInoV2, 0xc038943b},
	} {
		if c.got != c.want {
			t.Errorf("%s is %#x, in the kernel's header %#x", c.name, c.got, c.want)
		}
	}
}
