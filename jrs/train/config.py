"""Configuration of a training run: frozen dataclasses, stored with the run as TOML and in its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jrs.errors import ConfigurationError
from jrs.manifest import ModelSpec

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the joint loss; a term of weight 0 is not computed.

    Attributes:
        similarity: of the squared residual between fixed and moved image.
        masked: let the similarity go of the tumour, L_reg* of the paper.
        gradient_l1: alpha, of ||Phi - 1||_1 summed over voxels.
        segmentation: beta, of the cross-entropies of both images.
        class_weights: of the cross-entropy, one a class.
        tumor_dice: of the soft Dice of whole tumour, core and enhancing tumour.
        structure_dice: of the soft Dice of warped anatomical structures, where labels exist.
        structures_per_step: how many structures, drawn at random, that term warps at once.
        diffusion: of the mean squared gradient of the displacement (voxels).
        folding: of the depth of folds, where the Jacobian determinant falls below 0.1.
    """

    similarity: float = 1.0
    masked: bool = True
    gradient_l1: float = 1e-10
    segmentation: float = 1.0
    class_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    tumor_dice: float = 0.0
    structure_dice: float = 0.0
    structures_per_step: int = 8
    diffusion: float = 0.0
    folding: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its learning rate.

    Attributes:
        learning_rate: at the start (plateau) or at the top (one-cycle).
        schedule: ``plateau``: multiplied by ``plateau_factor`` after ``plateau_epochs`` without a better
            validation loss, stopped after ``stop_epochs`` (the paper's); ``one-cycle``: up and down once.
        clip_norm: gradients are scaled down to this norm; 0 leaves them.
        ema_decay: of the exponential moving average of the weights, which then are validated and exported in place
            of the weights themselves: average = decay * average + (1 - decay) * weights after each step, the decay
            held to (1 + steps) / (10 + steps) at first; 0 keeps no average.
    """

    learning_rate: float = 2e-3
    schedule: Literal["plateau", "one-cycle"] = "plateau"
    plateau_factor: float = 0.2
    plateau_epochs: int = 30
    stop_epochs: int = 50
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0.0:
            raise ConfigurationError("learning_rate must be above 0")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigurationError("ema_decay must lie between 0 (off) and 1, which it must not reach")
        if self.clip_norm < 0.0:
            raise ConfigurationError("clip_norm must be at least 0 (off)")
        if self.plateau_epochs < 1 or self.stop_epochs < 1:
            raise ConfigurationError("plateau_epochs and stop_epochs must be at least 1")


@dataclass(frozen=True)
class HardwareConfig:
    """What a run computes on; it may be another when the run is resumed.

    Attributes:
        accelerator: ``cpu``, ``cuda``, or ``auto``: CUDA if it is there.
        devices: processes a node, one a device; 0: as torchrun or Slurm started them, else 1; -1: every GPU.
        nodes: machines; 0: as torchrun or Slurm started them, else 1.
        strategy: ``ddp``: every process keeps the network; ``fsdp``: each keeps a part of it; ``auto``: ddp where
            there are several processes.
        workers: threads that prepare batches, in each process.
        prefetch: batches prepared ahead, in each process.
    """

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 0
    nodes: int = 0
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    workers: int = 1
    prefetch: int = 2

    def __post_init__(self) -> None:
        if self.devices < -1 or self.nodes < 0:
            raise ConfigurationError("devices must be at least -1 (all), nodes at least 0 (as started)")
        if self.workers < 1 or self.prefetch < 1:
            raise ConfigurationError("workers and prefetch must be at least 1")


@dataclass(frozen=True)
class SynthesisConfig:
    """How images are drawn from label maps; lengths in mm, intensities relative to white matter in T1.

    Attributes:
        deformation_mm: largest standard deviation of the smooth random displacement.
        control_mm: distance of its control points.
        rotation_deg, scale, shift_mm: largest random affine misplacement left after pre-alignment.
        moving_tumor, fixed_tumor: share of images with a tumour.
        single_modality_moving, single_modality_fixed: share of images with the first channel alone.
        drop_channel: chance of each other channel to be missing.
        noise, bias, gamma, jitter, texture, blur: largest deviation of each.
    """

    deformation_mm: float = 3.5
    control_mm: float = 28.0
    rotation_deg: float = 5.0
    scale: float = 0.05
    shift_mm: float = 3.0
    moving_tumor: float = 0.75
    fixed_tumor: float = 0.25
    single_modality_moving: float = 0.2
    single_modality_fixed: float = 0.4
    drop_channel: float = 0.12
    noise: float = 0.06
    bias: float = 0.25
    gamma: float = 0.3
    jitter: float = 0.08
    texture: float = 0.08
    blur: float = 0.22


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: the network and what it takes.
        epochs: at most so many.
        steps_per_epoch: 0 means one pass over the cases.
        batch_size: pairs a step, over all processes; the loss is the mean over them.
        accumulate: in how many parts, one after the other, each process works off its pairs of a step: the same
            gradients in less memory.
        seed: of everything random.
        precision: ``bf16`` or ``fp16`` (autocast; the head stays FP32, fp16 scales the loss), or ``fp32``.
        checkpoint_minutes: between two writes of ``last.safetensors``.
        validation_share: of the cases held out when no validation set is given.
        validation_pairs: pairs the validation loss is the mean of.
        log_every: steps between two rows of the log.
        hardware: what it computes on.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    epochs: int = 200
    steps_per_epoch: int = 0
    batch_size: int = 2
    accumulate: int = 1
    seed: int = 0
    precision: Precision = "bf16"
    checkpoint_minutes: float = 5.0
    validation_share: float = 0.15
    validation_pairs: int = 8
    log_every: int = 10
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.steps_per_epoch < 0 or self.validation_pairs < 1:
            raise ConfigurationError("epochs, batch_size and validation_pairs must be at least 1")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ConfigurationError(f"accumulate {self.accumulate} must divide batch_size {self.batch_size}")
        if self.log_every < 1 or self.checkpoint_minutes < 0:
            raise ConfigurationError("log_every must be at least 1, checkpoint_minutes at least 0")
        if not 0.0 < self.validation_share < 1.0:
            raise ConfigurationError("validation_share must lie between 0 and 1")
        if self.loss.tumor_dice and self.model.architecture.num_labels not in (0, 4):
            raise ConfigurationError(
                f"tumor_dice knows the four BraTS classes, not {self.model.architecture.num_labels}; set it to 0"
            )
        if self.model.architecture.segmentation and len(self.loss.class_weights) != len(self.model.labels):
            raise ConfigurationError(
                f"{len(self.loss.class_weights)} class_weights for {len(self.model.labels)} labels"
            )
