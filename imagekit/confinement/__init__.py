"""Images of unknown origin, and outside programs, in processes that can do nothing else.

jobs.py      what the starter asks of a confined process, and what it answers it
start.py     fresh interpreters for that, and one that is there already and forks
child.py     the program that gives its rights away, then does one job
channel.py   messages and descriptors between the two; files.py the bytes that still come
seccomp.py   no system call that opens, connects or starts anything
rights.py    limits and Landlock, also as a program between imagekit and an outside one
"""
