"""What an image may be packed in: gzip, xz, bzip2, zstd, zip, tar, OVA.

unwrap.py takes layer after layer off, within limits that all share (parts.py): streams.py, zip.py, tar.py, ova.py.
"""
