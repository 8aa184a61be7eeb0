"""Bytes that lie elsewhere or are still coming: addresses, HTTP, object stores, pipes; and are they the right ones.

addresses.py    which sources are no paths, and how they become a file
http.py, objects.py, proxies.py   ranges of bytes over a network; file.py makes a file of them that fills itself
arriving.py     what readers of such a file wait for; stream.py is a pipe as such a file
partial.py      what was kept of an interrupted download
checksums.py, signatures.py       the bytes are those that somebody vouched for
"""
