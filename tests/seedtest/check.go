package seedtest

import "context"

// Check runs `btrfs check`, data checksums included, on an unmounted
// filesystem in an image file or on a device. It changes nothing. The error
// holds everything the check printed.
func Check(ctx context.Context, path string) error {
	_, err := run(ctx, "btrfs", "check", "--readonly", "--check-data-csum", path)
	return err
}
