"""What stands on disks and hubs: the one reader of weight files, the one writer, the hub."""
