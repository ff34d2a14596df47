"""What stops a run whose loss is not a number: the pair is named, on the screen and in ``nan.json``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jrs.errors import JrsError
from jrs.files import write_json
from jrs.train.batch import PairSource, pair_names
from jrs.train.devices import Peers
from jrs.train.step import not_numbers

NAN = "nan.json"


class NotANumber:
    """Looks at the values of every pair before they change a weight."""

    def __init__(self, folder: Path, train: PairSource, validation: PairSource, peers: Peers) -> None:
        self._folder, self._train, self._validation, self._peers = folder, train, validation, peers

    def check_step(self, step: int, pairs: list[dict[str, float]], norms: list[float]) -> None:
        """Raise JrsError if a value of one of the step's pairs, in order, or the gradients' norm is not finite."""
        bad = {n: values for n, values in enumerate(pairs) if not_numbers(values)}
        norm_is_bad = not all(math.isfinite(norm) for norm in norms)
        if not bad and not norm_is_bad:
            return
        what = "loss" if bad else "gradient"
        # A gradient cannot be laid at one pair's door: all of them are named.
        chosen = bad or dict(enumerate(pairs))
        numbers = {step * len(pairs) + n: values for n, values in chosen.items()}
        self._stop("training", self._train, step + 1, what, numbers)

    def check_validation(self, step: int, pairs: dict[int, dict[str, float]]) -> None:
        """The same of validation pairs by their number, after ``step`` steps."""
        bad = {number: values for number, values in pairs.items() if not_numbers(values)}
        if bad:
            self._stop("validation", self._validation, step, "validation loss", bad)

    def _stop(self, kind: str, source: PairSource, step: int, what: str, pairs: dict[int, dict[str, float]]) -> None:
        entries: list[dict[str, Any]] = []
        for number, values in pairs.items():
            moving, fixed = pair_names(source, number)
            entries.append(
                {
                    "pair": number,
                    "moving": moving,
                    "fixed": fixed,
                    "not_numbers": not_numbers(values),
                    "values": {k: v if math.isfinite(v) else str(v) for k, v in values.items()},
                }
            )
        if self._peers.first:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / NAN, {"set": kind, "step": step, "pairs": entries})
        else:
            # All processes stop here; one of them says why.
            raise SystemExit(JrsError.exit_code)
        first = entries[0]
        terms = f", term {' and '.join(first['not_numbers'])}" if first["not_numbers"] else ""
        more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        raise JrsError(
            f"{self._folder}: the {what} of step {step} is not a number; pair {first['pair']} "
            f"(moving {first['moving'] or 'unnamed'}, fixed {first['fixed'] or 'unnamed'}){more}{terms}, see {NAN}; "
            "look at these images, or resume from the last checkpoint with a lower learning rate or in fp32"
        )
