"""What lies inside a guest's disk, and what that tells.

gpt.py, partitions.py, patched.py   partition tables; a disk that grew gets its GPT's backup where it belongs
fat.py, ext.py, initramfs.py        small readers: no mount, nothing unpacked to disk
firmware.py, readiness.py           the loader's signature; drivers, cloud-init, fstab; looking.py asks for both
drives.py, drive_check.py           config drives of anybody's making
"""
