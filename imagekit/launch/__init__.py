"""Where the guest is started: the QEMU rehearsal, later the Hyper-V stage.

Named after what it does, not `boot`: that is the library's function, and a submodule would take its place.
"""
