"""Configuration of a training run: frozen dataclasses, stored with the run as TOML and in its checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from jrs.errors import ConfigurationError
from jrs.manifest import ModelSpec

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the joint loss; a term of weight 0 is not computed.

    Attributes:
        similarity: of the unlikeness of fixed and moved image.
        similarity_measure: ``mse``: the squared residual (the paper's); ``lncc``: 1 - the squared correlation within
            cubes; ``mi``: minus the mutual information, for images of different contrast.
        lncc_window: side of those cubes in voxels, odd.
        lncc_stride: every so many-th cube counts, along each axis.
        mi_bins, mi_samples: of the joint histogram, and voxels that it is drawn from.
        masked: let the similarity go of the tumour, L_reg* of the paper.
        gradient_l1: alpha, of ||Phi - 1||_1 summed over voxels.
        segmentation: beta, of the cross-entropies of both images.
        class_weights: of the cross-entropy, one a class.
        tumor_dice: of the soft Dice of whole tumour, core and enhancing tumour.
        structure_dice: of the soft Dice of warped anatomical structures, where labels exist.
        structures_per_step: how many structures, drawn at random, that term warps at once.
        diffusion: of the mean squared gradient of the displacement (voxels).
        bending: of the mean squared second derivatives of the displacement (voxels).
        folding: of the depth of folds, where the Jacobian determinant falls below 0.1.
        tumor_rigidity: of the mean squared gradient of the displacement (voxels) within the warped tumour, where both
            images have labels: nothing is compared there, so that whatever helps beside it may else shrink the tumour.
        symmetric: how much the way back, from the fixed to the moving image, counts beside the way there in all
            terms of the registration: 1 as much, 0 not at all (and it is not computed).
        inverse_consistency: of the mean squared distance (voxels) by which going there and back misses.
    """

    similarity: float = 1.0
    similarity_measure: Literal["mse", "lncc", "mi"] = "mse"
    lncc_window: int = 9
    lncc_stride: int = 2
    mi_bins: int = 32
    mi_samples: int = 65536
    masked: bool = True
    gradient_l1: float = 1e-10
    segmentation: float = 1.0
    class_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    tumor_dice: float = 0.0
    structure_dice: float = 0.0
    structures_per_step: int = 8
    diffusion: float = 0.0
    bending: float = 0.0
    folding: float = 0.0
    tumor_rigidity: float = 0.0
    symmetric: float = 0.0
    inverse_consistency: float = 0.0

    def __post_init__(self) -> None:
        if self.lncc_window < 3 or self.lncc_window % 2 == 0:
            raise ConfigurationError(f"lncc_window must be odd and at least 3, not {self.lncc_window}")
        if not 1 <= self.lncc_stride <= self.lncc_window:
            raise ConfigurationError(f"lncc_stride must lie between 1 and lncc_window, not {self.lncc_stride}")
        if self.mi_bins < 4 or self.mi_samples < 2 or self.structures_per_step < 1:
            raise ConfigurationError("mi_bins must be at least 4, mi_samples 2 and structures_per_step 1")
        for name, value in vars(self).items():
            if isinstance(value, float) and not 0.0 <= value < math.inf:
                raise ConfigurationError(f"{name} must be a weight of 0 or more, not {value}")

    @property
    def both_ways(self) -> bool:
        """Whether the network has to register the pair both ways."""
        return self.symmetric > 0 or self.inverse_consistency > 0


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
        workers: threads that prepare batches, in each process; on a GPU, processes that draw synthetic images there.
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
        oversampling: label maps are kept on a grid so many times finer, for partial volumes.
        deformation_mm: largest standard deviation of the smooth random displacement.
        control_mm: distance of its control points.
        fine_deformation_mm: the same of a second one, whose control points lie half as far apart.
        rotation_deg, scale, shift_mm: largest random affine misplacement left after pre-alignment.
        mirror: share of pairs with left and right exchanged.
        one_head: share of pairs drawn twice from one label map, as images of one head at two times.
        moving_tumor, fixed_tumor: share of images with a tumour.
        mass_effect: largest share of its radius by which a tumour pushes its surroundings away.
        single_modality_moving, single_modality_fixed: share of images with one channel alone, mostly the first.
        two_modalities: share of images with T1ce and FLAIR alone.
        drop_channel: chance of each channel to be missing in the others.
        with_skull: share of images that are not skull-stripped.
        stripping: how far skull-stripping strays from the brain, 0 (not at all) to 1.
        cropped: share of images whose field of view ends inside the brain.
        thick_slices, slice_mm: share of channels seen through thick slices, and how thick at most.
        membranes: share of images with dura and venous sinuses in the fluid around the brain.
        hyperintensities, vessels: share of images with bright spots of white matter, with enhancing vessels.
        contrast: how far the contrast between tissues strays.
        noise, bias, gamma, jitter, texture, blur: largest deviation of each.
    """

    oversampling: int = 2
    deformation_mm: float = 3.5
    control_mm: float = 28.0
    fine_deformation_mm: float = 1.0
    rotation_deg: float = 5.0
    scale: float = 0.05
    shift_mm: float = 3.0
    mirror: float = 0.5
    one_head: float = 0.0
    moving_tumor: float = 0.7
    fixed_tumor: float = 0.2
    mass_effect: float = 0.45
    single_modality_moving: float = 0.3
    single_modality_fixed: float = 0.5
    two_modalities: float = 0.12
    drop_channel: float = 0.12
    with_skull: float = 0.04
    stripping: float = 1.0
    cropped: float = 0.1
    thick_slices: float = 0.3
    slice_mm: float = 6.0
    membranes: float = 0.7
    hyperintensities: float = 0.5
    vessels: float = 0.7
    contrast: float = 0.8
    noise: float = 0.06
    bias: float = 0.25
    gamma: float = 0.3
    jitter: float = 0.08
    texture: float = 0.08
    blur: float = 0.22

    def __post_init__(self) -> None:
        if not 1 <= self.oversampling <= 4:
            raise ConfigurationError("oversampling must lie between 1 and 4")


@dataclass(frozen=True)
class AugmentConfig:
    """How a batch is changed before a step; the field named for an effect is its chance, those after it its size.

    A chance is per image, of intensities per channel, of a flip per pair. All are 0 by default.

    Attributes:
        drop_channel: of each optional channel to be left out (modality dropout); one always stays.
        flip: left-right, front-back, up-down; a left-right flip exchanges left and right structures.
        affine: of a random affine map about the grid's middle.
        rotation_deg, scale, shear, shift_mm: its largest part about or along each axis.
        elastic: of a smooth random displacement.
        elastic_mm, elastic_control_mm: its largest standard deviation, and the distance of its control points.
        blur: of a Gaussian blur; ``blur_mm`` its largest standard deviation.
        resolution: of thick slices along a random axis; ``resolution_factor`` the most voxels that one spans.
        bias: of a bias field.
        bias_strength, bias_control_mm: largest deviation of its logarithm, and the distance of its control points.
        gamma: of a power of the intensities, between 1 / (1 + ``gamma_range``) and 1 + ``gamma_range``.
        noise: of Gaussian noise; ``noise_level`` its largest deviation as a share of the foreground's.
        intensity: of a change of the normalised foreground's level.
        intensity_scale, intensity_shift: its largest factor less 1, and its largest shift in deviations.
    """

    drop_channel: float = 0.0
    flip: tuple[float, float, float] = (0.0, 0.0, 0.0)
    affine: float = 0.0
    rotation_deg: float = 10.0
    scale: float = 0.1
    shear: float = 0.05
    shift_mm: float = 5.0
    elastic: float = 0.0
    elastic_mm: float = 3.0
    elastic_control_mm: float = 32.0
    blur: float = 0.0
    blur_mm: float = 1.0
    resolution: float = 0.0
    resolution_factor: float = 4.0
    bias: float = 0.0
    bias_strength: float = 0.3
    bias_control_mm: float = 70.0
    gamma: float = 0.0
    gamma_range: float = 0.4
    noise: float = 0.0
    noise_level: float = 0.2
    intensity: float = 0.0
    intensity_scale: float = 0.1
    intensity_shift: float = 0.1

    def __post_init__(self) -> None:
        for name in ("drop_channel", "affine", "elastic", *_INTENSITY_EFFECTS):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigurationError(f"{name} is a chance between 0 and 1, not {getattr(self, name)}")
        if not all(0.0 <= chance <= 1.0 for chance in self.flip):
            raise ConfigurationError(f"flip is three chances between 0 and 1, not {self.flip}")
        for name, value in vars(self).items():
            if name != "flip" and not 0.0 <= value < math.inf:
                raise ConfigurationError(f"{name} must be 0 or more, not {value}")
        if self.scale >= 1.0 or self.shear >= 1.0 or self.intensity_scale >= 1.0:
            raise ConfigurationError("scale, shear and intensity_scale must be below 1")
        if self.resolution_factor < 1.0 or self.elastic_control_mm < 1.0 or self.bias_control_mm < 1.0:
            raise ConfigurationError("resolution_factor, elastic_control_mm and bias_control_mm must be at least 1")

    @property
    def changes_images(self) -> bool:
        """Whether there is more than dropped channels and flips."""
        return any(getattr(self, name) for name in ("affine", "elastic", *_INTENSITY_EFFECTS))

    @property
    def active(self) -> bool:
        """Whether any chance is above 0."""
        return bool(self.changes_images or self.drop_channel or any(self.flip))


_INTENSITY_EFFECTS = ("blur", "resolution", "bias", "gamma", "noise", "intensity")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: the network and what it takes.
        epochs: at most so many.
        steps_per_epoch: 0 means one pass over the cases.
        batch_size: pairs a step, over all processes; the loss is the mean over them.
        second_pass: share of steps whose pairs are first registered by the network as it is, so that it learns what
            to do where the moving image is nearly in place (``passes`` of the model above 1).
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
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    epochs: int = 200
    steps_per_epoch: int = 0
    batch_size: int = 2
    second_pass: float = 0.0
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
        if not 0.0 <= self.second_pass <= 1.0:
            raise ConfigurationError("second_pass is a share of the steps, between 0 and 1")
        if self.second_pass and not self.model.architecture.registration:
            raise ConfigurationError("second_pass needs a registration decoder; set it to 0")
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
