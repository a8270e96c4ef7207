"""Listen to a host without changing its code: for the time of a `with`, its own functions are replaced, one by one."""

import inspect
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from torch import nn

from .._check import problem

Replacement = Callable[[Any], Any]


@contextmanager
def shadowed(owner: Any, name: str, replacement: Replacement) -> Iterator[None]:
    """Inside, `owner.name` is `replacement(what it was)`; afterwards what it was, also after an error.

    Set on the instance (or module) alone, so that other instances and `isinstance` see nothing of it; and past `setattr`,
    which torch's modules do not allow for everything.

    Example:
        >>> class Host:
        ...     def greet(self):
        ...         return "hello"
        >>> host = Host()
        >>> with shadowed(host, "greet", lambda greet: lambda: greet() + " there"):
        ...     print(host.greet())
        hello there
        >>> host.greet(), vars(host)
        ('hello', {})
    """
    own = vars(owner)
    was_own, before = name in own, own.get(name)
    own[name] = replacement(getattr(owner, name))
    try:
        yield
    finally:
        if was_own:
            own[name] = before
        else:
            del own[name]


@contextmanager
def unshadowed(owner: Any, name: str) -> Iterator[None]:
    """Inside, `owner.name` is its class's again."""
    own = vars(owner)
    shadow = own.pop(name)
    try:
        yield
    finally:
        own[name] = shadow


def wants_pictures(network: nn.Module) -> List[nn.Module]:
    """The modules that make debug images in a pass: mmseg's heads do while their `debug` is set."""
    return [module for module in network.modules() if vars(module).get("debug")]


@contextmanager
def without_pictures(network: nn.Module) -> Iterator[None]:
    """Inside, the network makes no debug images: a pass that the host does not make has no use for them."""
    with ExitStack() as stack:
        for module in wants_pictures(network):
            stack.enter_context(shadowed(module, "debug", lambda debug: False))
        yield


class Call(NamedTuple):
    """One call of a function, with its arguments under their names, however they were passed.

    Example:
        >>> def forward_train(stage, img, *, weight=None, **rest):
        ...     return stage, img, weight, rest
        >>> call = Call.of(forward_train, 1, "image", levels=2)
        >>> call.arguments
        {'stage': 1, 'img': 'image', 'levels': 2}
        >>> call.changed(img="mixed", weight=3, levels=4)()
        (1, 'mixed', 3, {'levels': 4})
    """

    function: Callable[..., Any]
    bound: inspect.BoundArguments

    @staticmethod
    def of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Call":
        """`function(*args, **kwargs)`."""
        return Call(function, inspect.signature(function).bind(*args, **kwargs))

    @property
    def arguments(self) -> Dict[str, Any]:
        """Those that were passed, in the function's order; what its `**rest` takes comes last."""
        named = dict(self.bound.arguments)
        rest = named.pop(self._rest, {})
        return {**named, **rest}

    def argument(self, name: str) -> Any:
        """The value of one that was passed.

        Raises:
            TypeError: it was not.
        """
        if name not in self.arguments:
            raise self._problem(f"to be called with {name}")
        return self.arguments[name]

    def changed(self, **changes: Any) -> "Call":
        """The same call with other values of some arguments, also such as were not passed.

        Raises:
            TypeError: the function takes no argument of that name.
        """
        named = OrderedDict(self.bound.arguments)
        rest = dict(named.pop(self._rest, {}))
        for name, value in changes.items():
            takes = name in self.bound.signature.parameters
            if not takes and not self._rest:
                raise self._problem(f"to take {name}")
            (named if takes else rest)[name] = value
        if rest:
            named[self._rest] = rest
        return self._replace(bound=inspect.BoundArguments(self.bound.signature, named))  # which knows their order

    def by(self, function: Callable[..., Any]) -> Any:
        """The same call of another function with these parameters."""
        return function(*self.bound.args, **self.bound.kwargs)

    def __call__(self) -> Any:
        return self.by(self.function)

    def _problem(self, what: str) -> Exception:
        name = getattr(self.function, "__qualname__", str(self.function))
        return problem(
            "uda.dacal",
            expected=f"the host's {name} {what}",
            got=f"({', '.join(self.arguments)}) for {self.bound.signature}",
            remedy="give it mmseg's names of arguments, or set labels='hard', every=0",
            error=TypeError,
        )

    @property
    def _rest(self) -> str:
        """The name of what takes all other arguments; empty if nothing does."""
        parameters = self.bound.signature.parameters.values()
        return next((parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD), "")


class FirstCall:
    """A listener, for `shadowed`: remembers the first call of a function, and what it returned.

    Args:
        keep: what to remember of the returned value: `(call, returned) -> anything`.

    Example:
        >>> heard = FirstCall()
        >>> [heard(len)(word) for word in ("one", "three")]
        [3, 5]
        >>> heard.kept, heard.call.arguments["obj"]
        (3, 'one')
    """

    def __init__(self, keep: Callable[[Call, Any], Any] = lambda call, returned: returned) -> None:
        self._keep = keep
        self.call: Optional[Call] = None
        self.kept: Any = None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement of a function."""

        def called(*args: Any, **kwargs: Any) -> Any:
            returned = function(*args, **kwargs)
            if self.call is None:
                call = Call.of(function, *args, **kwargs)
                self.kept, self.call = self._keep(call, returned), call
            return returned

        return called
