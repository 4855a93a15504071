"""Every patch method, one file each. A file added to this folder is picked up by itself."""

from importlib import import_module
from pkgutil import iter_modules

from ..method import Method, registered_methods

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> type[Method]:
    """``methods.Delta`` for every registered method's class."""
    for cls in registered_methods().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
