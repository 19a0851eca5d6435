"""CRD: contrastive representation distillation against two memory banks of embeddings.

Each image's embedding by one network is to be close to what the bank remembers of the same image by the other network,
and far from what it remembers of K images of other classes.

Equation: L = CE(s, y) + b · (C(e_s, M_t) + C(e_t, M_s)), with e = the normalised linear embedding of the pooled vector,
    C(e, M) = -mean over B of [ln h(i) + Σ_k ln(1 - h(k))], h(k) = o_k / (o_k + K/n), o_k = exp(M_k·e / T) / Z;
    afterwards M_i becomes the normalised (1-m) · e + m · M_i
Reductions: means over the batch, sums over the K negatives.
Source: Tian et al. 2020, arXiv 1910.10699, Eq. 17-19; numbers equal to RepDistiller. b = 0.8, K = 16384, T = 0.07, m = 0.5,
    128 dimensions (CRD's tables; ImageNet too). `kd_weight=1` gives their "CRD+KD".
Tensors: the pooled vectors of both networks, the images' labels and positions in the training set.
Cost: one teacher forward; two linear layers (wrn40_2 → wrn16_2: 33,024 parameters); two banks of n x 128 numbers (CIFAR-100:
    49 MiB, ImageNet 1.25 GiB), on each rank; B x n inner products with each, or B x K where n is far larger. Memory in a
    step, beside the banks: 4·2·128·n bytes for their successors (49 MiB again) and about 8·B·(2n + 3K) for products and
    gradients (n > K): with n = 50,000 and K = 16384 counted 120 MiB more than KD at B = 64, 330 at 256.
Our reading: Z is fixed by the first batch, as in the code. Negatives are drawn with replacement on the device, where the code
    draws without it wherever there are enough candidates (`replacement=false`): of 16384 negatives among 49500 about a
    seventh are repeats, which changes the variance of the sum but not its mean, and drawing for a batch of 64 takes a sixth
    of the time (0.045 s against 0.26 s on one CPU core; on ImageNet every step would have to sort 1.28 million numbers per
    image). On several ranks all rows of the batch enter every rank's banks, so that these are equal and those of one process.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError
from kdcli.gather import counts, gathered, share
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress, Setting
from kdcli.methods.feature import FeatureMethod, FeatureSpec
from kdcli.methods.pairing import backbone
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel

_EPSILON = 1e-7
# Scores of all n rows come from one matrix product, those of the K needed rows from reading K x D numbers per image.
# Measured on one CPU core (K = 16384, forward and backward): n = 50,000 0.18 against 4.1 s, n = 400,000 1.7 against 4.9 s
# for 64 images, n = 800,000 1.6 against 1.0 s for 16. So the product up to this many times more rows than are needed.
_WHOLE_BANK = 32


class CRDSpec(FeatureSpec):
    """Settings of CRD."""

    name: str = "crd"
    """The method's name."""
    weight: float = Field(default=0.8, ge=0)
    """Weight b of the contrast."""
    dim: int = Field(default=128, ge=1)
    """Width of the embeddings and of the banks."""
    negatives: int = Field(default=16384, ge=1)
    """K, the number of images of other classes each image is contrasted with."""
    contrast_temperature: float = Field(default=0.07, gt=0)
    """T, by which the inner products are divided."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """m, the share of the old entry when a bank takes up an embedding."""
    mode: Literal["exact", "relax"] = "exact"
    """What an image is to be close to: its own entry, or that of a random image of its class (the code's other mode)."""
    replacement: bool = True
    """Whether one image may be drawn twice as a negative of another. `false` is what the code does where it can: where
    every class leaves K images of others; else (few images or classes) it is drawn with replacement all the same."""


class CRD(FeatureMethod):
    """L = CE(s, y) + weight · (contrast of the student's embeddings + contrast of the teacher's).

    Raises:
        IncompatibleError: all training images are of one class, so that there are no negatives.
    """

    Spec: ClassVar[type[MethodSpec]] = CRDSpec
    mixes: ClassVar[bool] = False
    memory_s: Tensor
    memory_t: Tensor
    z_s: Tensor
    z_t: Tensor
    by_class: Tensor
    start: Tensor
    size: Tensor

    def __init__(
        self, spec: CRDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        if student is None or teacher is None:
            return
        labels = setting.labels
        size = torch.bincount(labels, minlength=setting.classes)
        if int(size.max()) == len(labels):
            raise IncompatibleError(
                "all training images are of one class, so that there is nothing to contrast them with",
                field="method",
                hint="crd needs two classes at least",
            )
        # The same for every image, so that ranks that hold different ones draw alike.
        self.replacement = spec.replacement or len(labels) - int(size.max()) < spec.negatives
        self.embed_s = nn.Linear(student.pooled_dim, spec.dim)
        self.embed_t = nn.Linear(backbone(teacher).pooled_dim, spec.dim)
        bound = (3 / spec.dim) ** 0.5
        for side in ("s", "t"):
            self.register_buffer(f"memory_{side}", torch.empty(len(labels), spec.dim).uniform_(-bound, bound))
            self.register_buffer(f"z_{side}", torch.tensor(-1.0))  # not known yet
        # The images sorted by class, and where each class lies: other classes can then be drawn without rejection.
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("start", size.cumsum(0) - size, persistent=False)
        self.register_buffer("size", size, persistent=False)

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"crd_s", "crd_t"} from the pooled vectors [B,C] of both networks; takes the embeddings up into the banks."""
        e_s = F.normalize(self.embed_s(exact(student.pooled)), dim=1)
        e_t = F.normalize(self.embed_t(exact(teacher.pooled.detach())), dim=1)
        return self.contrast(e_s, e_t, self.contrast_index(batch, progress), batch)  # type: ignore[call-arg]

    def contrast(self, e_s: Tensor, e_t: Tensor, chosen: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Both sides' loss from unit embeddings [B,D] and the compared entries, int64 [B,1+K], the positive first."""
        s, self.z_s = self._scores(e_s, self.memory_t, chosen, self.z_s, batch)
        t, self.z_t = self._scores(e_t, self.memory_s, chosen, self.z_t, batch)
        terms = {"crd_s": self.spec.weight * self._loss(s), "crd_t": self.spec.weight * self._loss(t)}
        index = gathered(batch.index, batch)
        self.memory_s = self._updated(self.memory_s, index, gathered(e_s.detach(), batch))
        self.memory_t = self._updated(self.memory_t, index, gathered(e_t.detach(), batch))
        return terms

    def variant(self, progress: Progress) -> Hashable | None:
        """None: the compared entries are drawn from the step's seed."""
        return None

    @torch.compiler.disable
    def contrast_index(self, batch: Batch, progress: Progress) -> Tensor:
        """int64 [B,1+K]: for each image the entry it is to be close to, and K of other classes.

        Drawn for the whole batch from the step's seed, so that it does not matter how ranks share the batch.
        """
        device = batch.labels.device
        generator = torch.Generator(device).manual_seed(progress.seed)
        first, mine = share(batch)
        whole = sum(counts(mine, device))
        rows = slice(first, first + max(mine, 1)) if mine else slice(0, 1)
        own_start, own = (x[batch.labels][:, None] for x in (self.start, self.size))
        others = len(self.by_class) - own
        negatives = self.spec.negatives
        if self.replacement:
            place = torch.randint(2**62, (whole, negatives), generator=generator, device=device)[rows] % others
        else:
            keys = torch.rand(whole, len(self.by_class), generator=generator, device=device)[rows]
            columns = torch.arange(keys.shape[1], device=device)
            place = keys.masked_fill(columns >= others, -1).topk(negatives, dim=1).indices
        chosen = self.by_class[place + own * (place >= own_start)]
        if self.spec.mode == "exact":
            return torch.cat([batch.index[:, None], chosen], 1)
        friend = torch.randint(2**62, (whole, 1), generator=generator, device=device)[rows] % own
        return torch.cat([self.by_class[own_start + friend], chosen], 1)

    def _scores(self, e: Tensor, memory: Tensor, chosen: Tensor, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """exp(M·e/T)/Z [B,1+K] of the chosen entries, and Z: the mean over the first batch times n, then constant."""
        if memory.shape[0] <= _WHOLE_BANK * chosen.shape[1]:
            products = (e @ memory.T).gather(1, chosen)
        else:
            products = (memory[chosen] @ e[:, :, None])[:, :, 0]
        scores = (products / self.spec.contrast_temperature).exp()
        mean = gathered(scores.detach().mean(1), batch).mean()
        z = torch.where(z < 0, mean * memory.shape[0], z)
        return scores / z, z

    def _loss(self, scores: Tensor) -> Tensor:
        """Minus the log-likelihood that the first of [B,1+K] is the positive one and the others are noise, mean over B."""
        noise = self.spec.negatives / self.memory_s.shape[0]
        total = scores + (noise + _EPSILON)
        positive = (scores[:, 0] / total[:, 0]).log().sum()
        negative = (noise / total[:, 1:]).log().sum()
        return -(positive + negative) / scores.shape[0]

    @torch.no_grad()
    def _updated(self, memory: Tensor, index: Tensor, embedded: Tensor) -> Tensor:
        """The bank with the rows `index` moved towards the embeddings."""
        moved = self.spec.momentum * memory[index] + (1 - self.spec.momentum) * embedded
        moved = F.normalize(moved, dim=1).to(memory.dtype)
        if memory.shape[0] <= _WHOLE_BANK * (1 + self.spec.negatives):
            return memory.index_copy(0, index, moved)  # the backward pass still needs the bank as it was
        return memory.index_copy_(0, index, moved)
