"""Many images in one run: what is to be done, what was done, and a report of both.

manifest.py   what a user wrote → items, validated whole before the first byte
tasks.py      one item, done anywhere: here in a child process, or on another machine
journal.py    what is proven done (SQLite); a run that was stopped goes on from it
runner.py     items through an executor, a window at a time, the largest first
crew.py       the executor of this computer; cluster.py that of a Dask scheduler
report.py     report.json; page.py report.html
"""
