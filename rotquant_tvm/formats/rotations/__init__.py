"""The rotation families, one file each; every module here declares its ``FAMILY``."""
