"""The machine under the models: devices and processes, disks and buckets, owners of folders, trees of arrays."""
