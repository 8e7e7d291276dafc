"""``python -m cumempool``."""

from cumempool.cli import main

if __name__ == "__main__":
    main()
