"""``python -m imagekit``."""

from imagekit.cli import program

if __name__ == "__main__":
    program()
