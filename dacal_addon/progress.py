"""A progress bar: tqdm's where it is installed, a line now and then where it is not."""

import sys
from types import TracebackType
from typing import Any, Optional, Type


class Progress:
    """`with Progress("making streets", 100) as bar: ... bar.advance()`. Writes to standard error."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, desc=f"{title:<24}", dynamic_ncols=True, mininterval=0.5)

    def advance(self, note: str = "") -> None:
        """One more is done; `note` is shown behind the bar."""
        self._done += 1
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif self._done * 4 // self._total > (self._done - 1) * 4 // self._total:
            print(f"{self._title}: {self._done} of {self._total} {note}", file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if self._bar is not None:
            self._bar.close()
