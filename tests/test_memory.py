"""Whether a step will fit: the estimate against measured memory, and what is free."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_training import ROOT, train_config

from jrs.architecture import Architecture
from jrs.errors import OutOfMemoryError
from jrs.manifest import GridSpec, ModelSpec
from jrs.models.network import JointNet
from jrs.train import memory
from jrs.train.config import Precision, TrainConfig
from jrs.train.memory import available_memory, check_memory, estimate_memory, parameter_counts, values_per_voxel

MEASURE = """
import sys, tempfile
from pathlib import Path
import torch
from small_training import label_maps, train_config, trainer
from jrs.architecture import Architecture
from jrs.manifest import GridSpec, ModelSpec
from jrs.train.config import LossConfig
side, norm, precision = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
spec = ModelSpec(Architecture(norm=norm, head="displacement"), grid=GridSpec((side,) * 3, (2.0,) * 3))
loss = LossConfig(structure_dice=1.0, tumor_dice=0.5, diffusion=1.0, folding=10.0)
made = trainer(Path(tempfile.mkdtemp()), train_config(spec, precision=precision, loss=loss))

def resident(kind):
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(kind)).split()[1])

parts, before = [made.train.batch(0, 1)], resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
for _ in range(2):  # Adam's moments appear at the end of the first
    made._step(parts)
peak = resident("VmHWM")
print(peak - before)
"""


def config_of(side: int, norm: str = "instance", precision: Precision = "fp32", **changes: object) -> TrainConfig:
    spec = ModelSpec(Architecture(norm=norm, head="displacement"), grid=GridSpec((side,) * 3, (2.0,) * 3))  # type: ignore[arg-type]
    return train_config(spec, precision=precision, **changes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("side", "norm", "precision"), [(48, "instance", "fp32"), (80, "instance", "bf16"), (64, "none", "fp32")]
)
def test_the_estimate_is_what_a_step_takes(side: int, norm: str, precision: Precision) -> None:
    # The most of two runs: the allocator's own part differs, 346 to 387 MB for the first of these.
    measured = 0
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(side), norm, precision],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        measured = max(measured, int(done.stdout.split()[-1]))
    assert estimate_memory(config_of(side, norm, precision), 1).total == pytest.approx(measured, rel=0.15)


def test_the_estimate_grows_as_memory_does() -> None:
    small, large = estimate_memory(config_of(32), 1), estimate_memory(config_of(64), 1)
    assert large.step == pytest.approx(8 * small.step, rel=1e-6) and large.weights == small.weights
    assert estimate_memory(config_of(32), 3).step == pytest.approx(3 * small.step, rel=1e-6)
    assert estimate_memory(config_of(32, precision="bf16"), 1).step < 0.7 * small.step


def test_weights_are_counted_by_hand() -> None:
    """Convolutions of the paper's table: encoder, segmentation and registration decoder (4 channels, subtract)."""
    assert parameter_counts(Architecture()) == {
        "encoder": 1_845_408,
        "segmentation": 664_676,
        "registration": 664_667,
    }


def test_values_are_counted_as_the_network_makes_them() -> None:
    """Outputs of all convolutions and of the levels' sums, seen by hooks; what else is kept is in the formula."""
    net, seen = JointNet(Architecture()), 0

    def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal seen
        seen += output.numel()

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv3d) and ".levels." in name:
            module.register_forward_hook(hook)
    with torch.no_grad():
        net(torch.zeros(1, 4, 32, 32, 32), torch.zeros(1, 4, 32, 32, 32))
    # Both ways: the registration decoder, which is the segmentation's for one image, a second time.
    alone, both = (values_per_voxel(Architecture(num_labels=0), both_ways) for both_ways in (False, True))
    assert both - alone == pytest.approx((values_per_voxel(Architecture()) - alone) / 2, rel=1e-6)
    # With a norm two more of each are kept.
    with_norm, without = (values_per_voxel(Architecture(norm=norm)) for norm in ("instance", "none"))  # type: ignore[arg-type]
    assert with_norm - without == pytest.approx(2 * seen / 32**3, rel=1e-6)


def test_what_will_not_fit_is_refused_with_a_remedy() -> None:
    huge = dataclasses.replace(config_of(1024), batch_size=4)
    with pytest.raises(OutOfMemoryError) as caught:
        check_memory(huge, torch.device("cpu"), 1)
    message = str(caught.value)
    assert caught.value.exit_code == 75 and "\n" not in message
    for word in ("accumulate", "batch_size (now 4)", "bf16", "1024x1024x1024", "--no-memory-check"):
        assert word in message
    check_memory(config_of(32), torch.device("cpu"), 1)


def test_what_is_free_is_some_of_what_there_is() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is not None and 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("version", "line"), [(2, "0::/job/step\n"), (1, "5:cpu,memory:/job/step\n3:cpuset:/\n")])
def test_limits_of_a_control_group(tmp_path: Path, version: int, line: str) -> None:
    root = tmp_path / "cgroup"
    base = root if version == 2 else root / "memory"
    step = base / "job" / "step"
    step.mkdir(parents=True)
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    limit, used = names[version]
    for folder, allowed in ((step, "max" if version == 2 else str(2**60)), (step.parent, "1000")):
        (folder / limit).write_text(f"{allowed}\n")
        (folder / used).write_text("700\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    (tmp_path / "self").write_text(line)
    assert memory._free_in_control_group(tmp_path / "self", root) == 1000 - 700 + 200
    (tmp_path / "self").write_text("0::/elsewhere\n")
    assert memory._free_in_control_group(tmp_path / "self", root / "none") is None
    assert memory._free_in_control_group(tmp_path / "none", root) is None
