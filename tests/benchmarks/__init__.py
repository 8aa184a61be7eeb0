"""Benchmarks: pairs against qemu-img, on a corpus made once. Run by ``make bench``; never part of the tests."""
