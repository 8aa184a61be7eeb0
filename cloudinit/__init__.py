"""Guest metadata: what the guest reads at its first boot."""

if __name__ != "imagekit.cloudinit":
    raise ImportError("this folder installs inside imagekit: import it as imagekit.cloudinit")
