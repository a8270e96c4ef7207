"""How many operations a meta-step asks of the device, and how often it waits for one: the GPU time of a small network.

    python benchmarks/operations.py

Counted are the operations that torch dispatches, without those that compute nothing, as views (on a GPU each of the others is
one launch or more), and the numbers that python asks tensors for, for each of which a GPU must finish what it was asked before.
Counts are the same on every machine. The trainer is that of hypergradient.py, with 64 x 64 images and AdamW(foreach=True),
as torch has it on a GPU by itself. Writes results/operations.json.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import torch
from hypergradient import ENGINES, Trainer
from measuring import device_name
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = ("_local_scalar_dense", "is_nonzero")
_NO_WORK = ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "is_same_size", "_has_same_storage_numel")


class Counting(TorchDispatchMode):
    """Counts what is dispatched inside.

    Args:
        steps: tensors that are on the CPU also where all else is on a GPU.
    """

    def __init__(self, steps: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's gap
        self._steps = steps
        self.operations = 0
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _WAITS:
            # The steps that AdamW has counted are numbers in the CPU's memory.
            self.waits += not any(args[0] is step for step in self._steps)
        elif name not in _NO_WORK and not func.is_view:
            self.operations += 1
        return func(*args, **(kwargs or {}))


def counts(work: Callable[[], object], optimizers: Sequence[torch.optim.Optimizer] = ()) -> Dict[str, int]:
    """Of one call, after one that warms up and gives the optimizers their states.

    Example:
        >>> x = torch.zeros(3)
        >>> counts(lambda: (x.view(3, 1) + 1).sum().item())
        {'operations': 2, 'waits': 1}
    """
    work()
    steps = [state["step"] for optimizer in optimizers for state in optimizer.state.values()]
    with Counting(steps) as counting:
        work()
    return {"operations": counting.operations, "waits": counting.waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.device("cpu")
    trainer = Trainer(64, 2, device)
    trainer.optimizer = torch.optim.AdamW(trainer.student.parameters(), lr=1e-4, foreach=True)
    rows: List[Dict[str, Any]] = [{"work": "plain student step", **counts(trainer.plain_step, [trainer.optimizer])}]
    for engine in ENGINES:
        step = trainer.calibration(engine)
        own = [trainer.optimizer, step.meta_optimizer]
        rows.append({"work": f"{engine}: meta-step", **counts(partial(trainer.meta_step, step), own)})
    for row in rows:
        print(f"{row['work']:<32}{row['operations']:8} operations{row['waits']:6} waits")
    report = {"torch": torch.__version__, "device": device_name(device), "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "operations.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
