"""How a module runs differently for a while: per call and per thread, and gone without a trace afterwards.

A *touch* stands in for a module's forward. While at least one context in any thread touches a module, its
``forward`` is shadowed by a dispatcher that looks up the touch of the *current* context; contexts without
one run
the module's own forward. Nothing is renamed, re-parented, hooked or registered, and the last context to leave
removes the shadow.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType, MethodType
from typing import Any

from torch import nn

Touch = Callable[..., Any]
"""``touch(forward, *args, **kwargs)`` computes a module's output; ``forward`` is the module's own."""

_NOTHING: Mapping[nn.Module, Touch] = MappingProxyType({})
_current: ContextVar[Mapping[nn.Module, Touch]] = ContextVar("deltapatch_touches", default=_NOTHING)
_lock = Lock()

_SHADOWS = "_deltapatch_shadows"


class _Missing:
    """Stands for what a module's instance has not; as a class, it stays itself in a deep copy."""


class _Shadows(dict[str, tuple[int, Any]]):
    """Method name -> how many contexts shadow it, and what the instance itself had under that name."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shadows":
        # No context holds the copy of a module: its copied shadows find a depth of 0 and run what is its own.
        return _Shadows({name: (0, deepcopy(own, memo)) for name, (_, own) in self.items()})


def _shadow(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Puts ``function``, bound to the module, before the module's own attribute; counts how often."""
    shadows: _Shadows = module.__dict__.setdefault(_SHADOWS, _Shadows())
    depth, own = shadows.get(name, (0, module.__dict__.get(name, _Missing)))
    if depth == 0:
        # A bound method: a deep copy of the module rebinds it to the copy.
        module.__dict__[name] = MethodType(function, module)
    shadows[name] = (depth + 1, own)


def _unshadow(module: nn.Module, name: str) -> None:
    """Takes one `_shadow` off; the last one leaves the module's ``__dict__`` as it was found."""
    shadows: _Shadows = module.__dict__[_SHADOWS]
    depth, own = shadows.pop(name)
    if depth > 1:
        shadows[name] = (depth - 1, own)
        return
    if own is _Missing:
        del module.__dict__[name]
    else:
        module.__dict__[name] = own
    if not shadows:
        del module.__dict__[_SHADOWS]


def _own(module: nn.Module, name: str) -> Callable[..., Any]:
    """The method that the module would run without us: one set on the instance, or its class's."""
    _, own = module.__dict__.get(_SHADOWS, {}).get(name, (0, _Missing))
    return getattr(type(module), name).__get__(module) if own is _Missing else own


def _dispatch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    touch = _current.get().get(self)
    own = _own(self, "forward")
    return own(*args, **kwargs) if touch is None else touch(own, *args, **kwargs)


def _ignore_mode(self: nn.Module, mode: bool = True) -> nn.Module:
    depth, _ = self.__dict__.get(_SHADOWS, {}).get("train", (0, _Missing))
    return self if depth else _own(self, "train")(mode)


@contextmanager
def touched(touches: Mapping[nn.Module, Touch], instead_of: nn.Module | None = None) -> Generator[None]:
    """Within the context, and in this thread or task only, the given modules run as their touches say.

    Contexts nest: the inner one's touch of a module wins, and touches of modules of ``instead_of`` that an
    outer
    context made are laid aside. Taken off whatever happens; if a module cannot be touched, those before it
    are
    restored and the error is raised.
    """
    shadowed: list[nn.Module] = []
    outer = _current.get()
    if outer and instead_of is not None:
        hidden = set(instead_of.modules())
        outer = {module: touch for module, touch in outer.items() if module not in hidden}
    token = _current.set({**outer, **touches})
    try:
        with _lock:
            for module in touches:
                _shadow(module, "forward", _dispatch)
                shadowed.append(module)
        yield
    finally:
        with _lock:
            for module in shadowed:
                _unshadow(module, "forward")
        _current.reset(token)


def touched_modules(root: nn.Module) -> list[str]:
    """Names of the modules of ``root`` that some context touches now."""
    return [name for name, module in root.named_modules() if _is_touched(module)]


def is_shadowed(module: nn.Module, name: str) -> bool:
    """Whether what a module's instance has under a method's name was put there by us."""
    return bool(module.__dict__.get(_SHADOWS, {}).get(name, (0, _Missing))[0])


def _is_touched(module: nn.Module) -> bool:
    return any(depth for depth, _ in module.__dict__.get(_SHADOWS, {}).values())


@dataclass
class Freezer:
    """Keeps a model in eval mode and without gradients while anyone computes with it.

    The modes and gradient flags that the caller had set come back when the last computation leaves. A
    caller who
    calls ``train()`` on the model, or on something that holds it, in the meantime changes nothing that runs.
    """

    root: nn.Module
    _depth: int = 0
    _training: list[nn.Module] = field(default_factory=list)
    _with_gradients: list[nn.Parameter] = field(default_factory=list)

    @contextmanager
    def frozen(self, hold_mode: bool = False) -> Generator[None]:
        """Frozen within the context. With ``hold_mode``, ``train()`` has no effect on the model meanwhile."""
        modules = list(self.root.modules())
        with _lock:
            if self._depth == 0:
                self._training = [module for module in modules if module.training]
                self._with_gradients = [p for p in self.root.parameters() if p.requires_grad]
                self._set(False)
            self._depth += 1
            if hold_mode:
                for module in modules:
                    _shadow(module, "train", _ignore_mode)
        try:
            yield
        finally:
            with _lock:
                if hold_mode:
                    for module in modules:
                        _unshadow(module, "train")
                self._depth -= 1
                if self._depth == 0:
                    self._set(True)
                    self._training, self._with_gradients = [], []

    def _set(self, value: bool) -> None:
        for module in self._training:
            module.training = value
        for parameter in self._with_gradients:
            parameter.requires_grad_(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Freezer":
        return Freezer(deepcopy(self.root, memo))
