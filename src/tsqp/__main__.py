"""``python -m tsqp`` is the same as ``tsqp``."""

from .cli import main

if __name__ == "__main__":
    main()
