"""Every merge, one file each. A file added to this folder is picked up by itself: its function has the file's
name.
"""

from importlib import import_module
from pkgutil import iter_modules

NAMES = tuple(sorted(found.name for found in iter_modules(__path__) if not found.name.startswith("_")))

for _name in NAMES:
    import_module(f"{__name__}.{_name}")
