"""Disk-image formats: what lies on the disk. One module a format; each ends in one FORMAT object."""

if __name__ != "imagekit.formats":
    raise ImportError("this folder installs inside imagekit: import it as imagekit.formats")
