"""A training run from its request: configuration, processes, data, loop."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrs.errors import BackendError, CannotCreateError, ConfigurationError, JrsError, MissingInputError, first_line
from jrs.files import remove_tree
from jrs.reading import read_volume
from jrs.resources import atlas_path
from jrs.train.batch import NamedPairs, PairSource
from jrs.train.config import TrainConfig
from jrs.train.configfile import load_config, to_toml

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric

    from jrs.train.devices import Peers


@dataclass(frozen=True)
class TrainRequest:
    """What ``jrs train`` was asked for; see the command's help.

    ``overrides`` are fields of the configuration by their dotted names, ``settings`` the same as text. A resumed
    run takes from its folder what is None.
    """

    out: Path
    synthetic: Path | None = None
    data: Path | None = None
    validation: Path | None = None
    config: str | None = None
    init: Path | None = None
    resume: bool = False
    atlas: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    settings: tuple[str, ...] = ()
    threads: int | None = None
    memory_check: bool = True
    layout: str | None = None
    splits: Path | None = None
    align: str | None = None


def configuration(request: TrainRequest) -> TrainConfig:
    """The configuration that a request means, every field settled."""
    name = request.config
    if name is None and request.resume and (request.out / "config.toml").is_file():
        name = str(request.out / "config.toml")
    if name is None:
        name = "paper" if request.data is not None else "default"
    return load_config(name, request.overrides, request.head, request.settings)


def describe(config: TrainConfig) -> str:
    """The configuration as TOML, and as comments in it what it amounts to: weights, memory, steps."""
    import torch

    from jrs.train.devices import process_counts, share_of
    from jrs.train.memory import estimate_memory, parameter_counts

    accelerator = "cuda" if torch.cuda.is_available() and config.hardware.accelerator != "cpu" else "cpu"
    devices, nodes = process_counts(config.hardware, accelerator)
    share = share_of(config, devices * nodes)
    counts = parameter_counts(config.model.architecture)
    memory = estimate_memory(config, share)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    steps = (
        f"{config.steps_per_epoch * config.epochs:,} ({config.epochs} epochs of {config.steps_per_epoch})"
        if config.steps_per_epoch
        else f"{config.epochs} epochs, each one pass over the training images"
    )
    return (
        f"{to_toml(config)}\n"
        f"# parameters: {sum(counts.values()):,} ({parts})\n"
        f"# memory: about {memory.total / 2**30:.1f} GiB a process, {memory.step / 2**30:.1f} of them for the pairs "
        f"worked off at once ({share})\n"
        f"# steps: at most {steps}, {config.batch_size} pairs each, over {devices * nodes} process(es)\n"
    )


def train_run(request: TrainRequest) -> None:
    """Do what was asked; raises JrsError for anything a user can mend."""
    import torch

    from jrs.train.devices import Peers, make_fabric
    from jrs.train.memory import check_memory
    from jrs.train.workers import WorkerPairs

    if request.threads:
        torch.set_num_threads(request.threads)
    request = _completed(request)
    config = configuration(request)
    fabric = make_fabric(config)
    _launch(fabric)
    peers = Peers(fabric)
    with ExitStack() as stack:
        _together(peers, lambda: stack.enter_context(_alone_in(request.out)) if peers.first else None)
        if request.memory_check:
            _together(peers, lambda: check_memory(config, fabric.device, peers.count))
        train, validation = _in_turn(peers, lambda: _sources(request, config, fabric.device))
        if isinstance(train, WorkerPairs):
            stack.callback(train.close)
        _train(request, config, fabric, train, validation)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _completed(request: TrainRequest) -> TrainRequest:
    """The request with what a resumed run knows already; raises JrsError if the folder does not fit the request."""
    from jrs.models.checkpoint import find_checkpoint
    from jrs.train.state import LAST, PREVIOUS, load_last

    there = any((request.out / name).exists() for name in (LAST, PREVIOUS))
    if request.resume and not there:
        raise MissingInputError(f"{request.out}: holds no {LAST} to resume; drop --resume to start")
    if not request.resume and there:
        raise CannotCreateError(f"{request.out}: holds a run already; pass --resume, or choose another folder")
    if request.init is not None:
        find_checkpoint(request.init)
    known: dict[str, str | None] = {}
    if request.resume and request.synthetic is None and request.data is None:
        known = load_last(request.out).training.get("record", {}).get("options", {})
    changes: dict[str, Any] = {
        name: Path(value)
        for name in ("synthetic", "data", "validation")
        if getattr(request, name) is None and (value := known.get(name))
    }
    defaults = {"atlas": "sri24", "layout": "auto", "align": "auto"}
    changes |= {name: getattr(request, name) or known.get(name) or value for name, value in defaults.items()}
    request = replace(request, **changes)
    if (request.synthetic is None) == (request.data is None):
        raise ConfigurationError(f"{request.out}: give either --synthetic LABEL_DIR or --data CASES")
    return request


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One run in a folder at a time; the system frees the lock of one that was killed.

    What did not begin leaves no folder that was not there.
    """
    from filelock import FileLock, Timeout

    lock, created = FileLock(folder / ".lock"), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CannotCreateError(f"{folder}: another jrs train is at work in it; choose another --out") from error
    except OSError:  # what cannot be written is said when it is; some file systems have no locks
        pass
    try:
        yield
    finally:
        lock.release()
        if created and folder.is_dir() and all(path.name == ".lock" for path in folder.iterdir()):
            remove_tree(folder)


def _launch(fabric: Fabric) -> None:
    """Start the other processes, unless torchrun or Slurm did, and let all find one another."""
    try:
        fabric.launch()
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"the processes did not find one another: {first_line(error)}") from error


def _in_turn(peers: Peers, load: Callable[[], tuple[PairSource, PairSource]]) -> tuple[PairSource, PairSource]:
    """The first process prepares the data and says so, the others read what it wrote."""
    sources: list[tuple[PairSource, PairSource]] = []

    def take() -> None:
        with redirect_stderr(sys.stderr if peers.first else StringIO()):
            sources.append(load())

    for turn in (True, False):
        _together(peers, take if peers.first == turn else lambda: None)
    return sources[0]


def _together(peers: Peers, act: Callable[[], None]) -> None:
    """Act; if that fails in any process all end, and one says why."""
    failure: Exception | None = None
    try:
        act()
    except Exception as error:
        failure = error
    codes = peers.gather(None if failure is None else getattr(failure, "exit_code", JrsError.exit_code))
    failed = [rank for rank, code in enumerate(codes) if code is not None]
    if failed:
        if failure is not None and peers.rank == failed[0]:
            raise failure
        raise SystemExit(codes[failed[0]])


def _train(
    request: TrainRequest, config: TrainConfig, fabric: Fabric, train: PairSource, validation: PairSource
) -> None:
    from jrs.train.loop import Trainer
    from jrs.train.progress import ProgressDisplay

    first = fabric.is_global_zero
    options = {name: _absolute(getattr(request, name)) for name in ("synthetic", "data", "validation")}
    record = {
        "options": options | {name: getattr(request, name) for name in ("atlas", "layout", "align")},
        "data": {"training": _identity(train), "validation": _identity(validation)},
    }
    with ProgressDisplay(shown=first) as display:
        trainer = Trainer(config, train, validation, request.out, display.update, fabric, record)
        if request.init is not None:
            trainer.start_from(request.init)
        if request.resume:
            trainer.resume(_say if first else lambda text: None)
        try:
            progress = trainer.run()
        except (KeyboardInterrupt, SystemExit):
            if first:
                _say(f"{request.out}: stopped after step {trainer.progress.step}; continue with --resume")
            raise
    if first:
        print(
            f"{request.out}: {progress.step} steps, best validation loss {progress.best_loss:.4f}, "
            f"{trainer.timing.wait_share:.1%} of the time waited for data"
        )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _identity(source: PairSource) -> str:
    """What a source's images are called, in short: a resumed run must find the same, wherever they lie."""
    count = f"{len(source)} images"
    if not isinstance(source, NamedPairs):
        return count
    names = json.dumps(source.names(0, len(source)))
    return f"{count}, {hashlib.sha256(names.encode()).hexdigest()[:16]}"


def _sources(request: TrainRequest, config: TrainConfig, device: torch.device) -> tuple[PairSource, PairSource]:
    if request.synthetic is not None:
        from jrs.train.labelmaps import find_label_maps, prepare_label_maps
        from jrs.train.synth import SyntheticPairs
        from jrs.train.workers import WorkerPairs

        atlas = read_volume(atlas_path(request.atlas or "sri24"))

        def load(folder: Path) -> Any:
            return prepare_label_maps(
                find_label_maps(folder),
                config.model.grid,
                atlas,
                request.out / "label-maps",
                _say,
                config.synthesis.oversampling,
            )

        if request.validation is None:  # before minutes are spent on aligning them
            split_indices(len(find_label_maps(request.synthetic)), config)
        maps = load(request.synthetic)
        if request.validation is not None:
            held_out = load(request.validation)
        else:
            chosen, rest = split_indices(len(maps.names), config)
            maps, held_out = maps.subset(rest), maps.subset(chosen)
        seed = config.seed
        drawn = SyntheticPairs(maps, config.model, config.synthesis, seed)
        return (
            WorkerPairs(drawn, device, config.hardware.workers) if device.type == "cuda" else drawn,
            # Drawn on the CPU, so that they are the same pairs on every machine.
            SyntheticPairs(held_out, config.model, config.synthesis, seed + 500_009),
        )
    from jrs.train.cases import real_pairs

    assert request.data is not None
    return real_pairs(
        request.data,
        request.validation,
        config,
        atlas_path(request.atlas or "sri24"),
        request.out,
        resume=request.resume,
        layout=request.layout or "auto",
        splits=request.splits,
        align="off" if request.align == "off" else "auto",
        say=_say,
    )


def split_indices(count: int, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Held-out and remaining indices, by the run's seed; at least two of each."""
    import torch

    if count < 4:
        raise ConfigurationError(f"{count} images are too few to hold some out; give --validation or at least 4")
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(count, generator=generator).tolist()
    held = min(max(2, round(count * config.validation_share)), count - 2)
    return sorted(order[:held]), sorted(order[held:])


def _say(text: str) -> None:
    print(text, file=sys.stderr)
