"""Listen to a host without changing its code: for the time of a `with`, its own functions are replaced, one by one."""

from contextlib import contextmanager
from typing import Any, Callable, Iterator


@contextmanager
def shadowed(owner: Any, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
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
