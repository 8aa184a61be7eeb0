"""Where the guest is started: the QEMU rehearsal, later the Hyper-V stage."""
