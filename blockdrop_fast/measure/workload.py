"""Workloads: a network, and the images and decisions that contenders are measured on."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from blockdrop_fast._extension import extension_status
from blockdrop_fast.data.batches import batches_of, load_dataset
from blockdrop_fast.data.image_sets import NO_NORMALIZATION
from blockdrop_fast.engine import Engine, compile
from blockdrop_fast.executors.gather_graph import Launch
from blockdrop_fast.measure.baselines import Call, UnavailableError
from blockdrop_fast.measure.published import PUBLISHED, published_decisions, scaled_decisions
from blockdrop_fast.measure.tolerance import (
    REFERENCE_CHUNK,
    Reference,
    make_policy_reference,
    make_reference,
)
from blockdrop_fast.networks.architectures import by_name
from blockdrop_fast.networks.blockdrop import BlockDrop, Output
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.checkpoints import load
from blockdrop_fast.networks.flops import DEFAULT_IMAGE_SIZE
from blockdrop_fast.networks.folding import FoldedNetwork, fold_network
from blockdrop_fast.networks.gated import GatedPolicy
from blockdrop_fast.networks.policy import policy_resnet8, policy_resnet10
from blockdrop_fast.networks.resnet import ResNet


@dataclass
class Workload:
    """A network, and the images and decisions that contenders run it on.

    Attributes:
        name: of the network, for tables.
        model: backbone and policy network, in eval mode, in float32 or in the images' dtype.
        images: (N, 3, H, W) normalised, contiguous, of the contenders' dtype and device.
        decisions: (N, K) bool.
        calls: what ``contenders.build`` made once for many images, by contender and batch size.
    """

    name: str
    model: BlockDrop
    images: Tensor
    decisions: Tensor
    calls: dict[tuple[str, int], Call] = field(default_factory=dict, repr=False)
    _engines: dict[tuple, Engine] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """What contenders compute in."""
        return self.images.dtype

    @cached_property
    def folded(self) -> FoldedNetwork:
        """The backbone with folded batch norm, which all baselines share."""
        return fold_network(self.model.backbone, self.dtype)

    @cached_property
    def all_kept(self) -> Reference:
        """What a complete network has to compute."""
        return make_reference(self.model.backbone, self.images, None, self.dtype)

    @cached_property
    def at_decisions(self) -> Reference:
        """What the backbone has to compute at the decisions."""
        return make_reference(self.model.backbone, self.images, self.decisions, self.dtype)

    @cached_property
    def policy_logits(self) -> Reference:
        """What the policy network has to compute."""
        return make_policy_reference(self.model.policy, self.images, self.dtype)

    def check_own(self, name: str, output: Output) -> None:
        """Raise unless an engine decided as the policy network does, and is right at that.

        Raises:
            WrongLogitsError: naming the contender.
        """
        self.policy_logits.check_decisions(name, output.decisions)
        if torch.equal(output.decisions, self.decisions):
            reference = self.at_decisions
        else:
            reference = make_reference(
                self.model.backbone, self.images, output.decisions, self.dtype
            )
        reference.check(name, output.logits)

    def engine(self, strategy: str, launch: Launch = "counts") -> Engine:
        """The compiled model, once a strategy; see ``compile``.

        Raises:
            UnavailableError: the strategy does not serve this network or this installation.
        """
        extension = extension_status()
        if strategy == "walk" and not extension.loaded:
            raise UnavailableError(f"the walk needs the compiled extension: {extension.reason}")
        if strategy == "walk" and self.images.is_cuda and not extension.build_info.get("cuda"):
            raise UnavailableError("the walk on a GPU needs CUDA kernels: see `blockdrop info`")
        key = (strategy, launch)
        if key not in self._engines:
            try:
                self._engines[key] = compile(
                    self.model, dtype=self.dtype, strategy=strategy, launch=launch
                )
            except (TypeError, ValueError) as error:
                raise UnavailableError(str(error)) from None
        return self._engines[key]

    def engine_reasons(self) -> dict[str, str]:
        """Of each engine made so far, by strategy and launch: why it runs as it does."""
        return {
            " ".join(key): f"{engine.strategy}, {engine.strategy_reason}"
            for key, engine in self._engines.items()
        }

    def first(self, images: int) -> Workload:
        """The same on the first images only; engines are shared."""
        return replace(self, images=self.images[:images], decisions=self.decisions[:images])

    def at(self, decisions: Tensor) -> Workload:
        """The same at other decisions (N, K); engines are shared."""
        return replace(self, decisions=decisions.to(self.decisions.device))


def make_workload(
    network: str,
    images: int,
    decisions: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """A network of random weights at the decisions of the published usage.

    Args:
        network: name of an architecture, see ``architectures.by_name``.
        images: N.
        decisions: (at least N, K) bool, the first N are used; default: those of
            ``published_decisions``, and for networks that they are not published of,
            ``scaled_decisions`` of ResNet-110 or ResNet-101.
        device: of all tensors.
        dtype: of the images, and what contenders compute in.

    Raises:
        ValueError: an unknown network, or fewer decisions than images.
    """
    build = by_name(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build()
        if decisions is None and network in PUBLISHED:
            decisions = published_decisions(network)
        elif decisions is None:
            alike = "resnet101" if backbone.config.stem == "imagenet" else "resnet110"
            decisions = scaled_decisions(alike, backbone.num_blocks)
        if len(decisions) < images:
            raise ValueError(f"images: expected at most {len(decisions)}, got {images}")
        size = DEFAULT_IMAGE_SIZE[backbone.config.stem]
        return random_workload(network, backbone, decisions[:images], size, device, dtype)


def random_workload(
    name: str,
    backbone: ResNet,
    decisions: Tensor,
    size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """A network with batch norms as of a trained one, a policy network for it, and images.

    Args:
        name: for tables.
        backbone: with fresh weights.
        decisions: (N, K) bool.
        size: height and width of the images.
        device, dtype: see ``make_workload``.
    """
    settle(backbone)
    imagenet = backbone.config.stem == "imagenet"
    policy = (policy_resnet10 if imagenet else policy_resnet8)(backbone.num_blocks)
    inputs = torch.randn(len(decisions), 3, size, size)
    model = BlockDrop(backbone, policy).eval().requires_grad_(False).to(device)
    return Workload(name, model, inputs.to(device, dtype), decisions.to(device))


def fit_policy(workload: Workload) -> Workload:
    """The same with a policy network that decides about as the workload's decisions.

    Images are tinted, each policy of the decisions with a colour of its own. The policy network's
    head is the least-squares map from its features to the decisions as -1 and 1; then each
    block's threshold is set so that as many images keep it. Ten policies are met exactly; of
    hundreds, the blocks' keep rates are, and which images keep which blocks is what the features
    tell. Time does not depend on what images or weights hold but for the decisions.
    """
    decisions = workload.decisions
    policies, index = decisions.cpu().unique(dim=0, return_inverse=True)
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(len(policies), 3, generator=generator).to(workload.images)
    images = workload.images + colours[index.to(colours.device)][:, :, None, None]
    model = copy.deepcopy(workload.model)
    head = model.policy.network.fc
    trunk = copy.deepcopy(model.policy)
    trunk.network.fc = nn.Identity()
    with torch.no_grad():
        rows = images.to(head.weight.dtype).split(REFERENCE_CHUNK)
        features = torch.cat([trunk.logits(part) for part in rows]).double().cpu()
        mean = features.mean(0)
        centred, target = features - mean, 2 * decisions.double().cpu() - 1
        gram = centred.T @ centred
        # A little ridge: directions in which features hardly vary would be noise at 16 bits.
        gram += 1e-5 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram, centred.T @ (target - target.mean(0)))
        weight /= (centred @ weight).std() + 1e-12
        logits = centred @ weight
        ranked = logits.sort(0, descending=True).values
        # Between the last image that keeps the block and the first that drops it.
        ranked = torch.cat([ranked[:1] + 2, ranked, ranked[-1:] - 2])
        kept = decisions.sum(0, keepdim=True).cpu()
        threshold = (ranked.gather(0, kept) + ranked.gather(0, kept + 1))[0] / 2
        head.weight.copy_(weight.T)
        head.bias.copy_(-(mean @ weight) - threshold)
    return Workload(workload.name, model, images, decisions)


def settle(backbone: ResNet) -> None:
    """Give batch norms the statistics and scales of a trained network, roughly.

    Fresh residual blocks double the variance each: after 54 of them floats are no longer what
    trained networks compute with, and tolerances mean little.
    """
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for block, _ in backbone.blocks():
        last = block.bn3 if backbone.config.block == "bottleneck" else block.bn2
        nn.init.uniform_(last.weight, 0.1, 0.3)


def load_workload(
    checkpoint: Path,
    images: int,
    data_folder: Path | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """A trained BlockDrop at its own decisions on test images drawn from its data set.

    Args:
        checkpoint: a file, or a name of ``checkpoints.load``.
        images: N.
        data_folder: of the data set; None: see ``data.load_dataset``.
        device, dtype: see ``make_workload``.

    Raises:
        ValueError: a data set of fewer images, or a model that decides on the way: contenders take
            decisions that are made before.
        CheckpointError, OSError: see ``load`` (a bare backbone, for one) and
            ``data.load_dataset``.
    """
    model = load(checkpoint).eval().requires_grad_(False).to(device)
    if isinstance(model, Cascade) or isinstance(model.policy, GatedPolicy):
        raise ValueError(
            f"{checkpoint}: expected a policy that decides before the backbone runs, this model "
            "decides on the way"
        )
    normalization = model.backbone.normalization or NO_NORMALIZATION
    test = load_dataset(data_folder).test
    if len(test) < images:
        raise ValueError(f"data: expected at least {images} test images, got {len(test)}")
    # Test splits come sorted by class: draw the images.
    drawn = test.subset(images)
    inputs, _ = next(iter(batches_of(drawn, images, normalization=normalization)))
    inputs = inputs.contiguous().to(device, dtype)
    decisions = compile(model, dtype=dtype, strategy="dense")(inputs).decisions.clone()
    return Workload(checkpoint.stem, model, inputs, decisions)
