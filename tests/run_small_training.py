"""A small run in a process of its own: ``run_small_training.py FOLDER CONFIG.json [--resume] [--kill-write N]``.

Started by tests, by torchrun, or by Fabric. ``--kill-write N`` ends the process in the middle of its Nth checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def kill_in_write(number: int) -> None:
    """Let the process be killed when half of a checkpoint's file is written."""
    import safetensors.torch

    write, count = safetensors.torch.save_file, 0

    def save(tensors: Any, path: Any, metadata: Any) -> None:
        nonlocal count
        count += 1
        write(tensors, path, metadata=metadata)
        if count == number:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = save


def main(arguments: list[str]) -> None:
    import torch
    from small_training import trainer

    from jrs.schema import decode
    from jrs.train.config import TrainConfig

    torch.set_num_threads(1)
    if "--kill-write" in arguments:
        kill_in_write(int(arguments[arguments.index("--kill-write") + 1]))
    folder = Path(arguments[0])
    made = trainer(folder, decode(TrainConfig, json.loads(Path(arguments[1]).read_text()), arguments[1]))
    if "--resume" in arguments and (folder / "last.safetensors").exists():
        made.resume(lambda text: print(text, file=sys.stderr))
    print(made.run().step)


if __name__ == "__main__":
    main(sys.argv[1:])
