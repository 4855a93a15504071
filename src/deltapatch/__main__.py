"""``python -m deltapatch``."""

from .cli import main

main()
