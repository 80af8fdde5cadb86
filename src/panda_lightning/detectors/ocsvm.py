"""One-class SVM on pixels or on pretrained features."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from panda_lightning.arguments import Positive, Share
from panda_lightning.detectors.pretrained import PretrainedDetector
from panda_lightning.formulas import metrics
from panda_lightning.networks import augment
from panda_lightning.networks.folding import Optimize
from panda_lightning.runtime.derived import Derived
from panda_lightning.runtime.features import extract, on_device
from panda_lightning.runtime.sizes import in_words
from panda_lightning.runtime.systems import wide_device, widenable
from panda_lightning.types import Batch, PandaError

Array = npt.NDArray[np.float64]

GRIDS: dict[str, tuple[list[float], list[float]]] = {  # select: values of nu (none: the one given), values of gamma
    "tenth": ([], [2.0**p for p in range(-10, 0)]),
    "test": ([p / 10 for p in range(1, 10)], [2.0**p for p in range(-7, 3)]),
}


class OCSVM(PretrainedDetector):
    r"""One-class support vector machine with an RBF kernel (Schoelkopf et al. 2001), solved by scikit-learn.

    .. math:: s(x) = -\sum_i \alpha_i \exp(-\gamma \lVert z(x) - z_i \rVert^2)

    The SVM's offset is the same for all images and is left out: the small similarities of distant images would be lost
    in its rounding. ``inputs`` chooses z: pixels_pca (contrast-normalised by the L1 norm, scaled to [0, 1] by the range
    of the normal training images, then PCA with 95 % of the variance, as in Deep SVDD's table), pixels (scaled to [-1,
    1], as in GEOM), or backbone (a pretrained network's features). If all normal training images are grey, images have
    one channel here, not three: the mean of red, green and blue.

    The published results chose gamma and nu by test labels. The default does not; ``select`` does the same as the
    publications, and every output is then marked oracle. There are no training steps: ``lightning test`` fits the SVM
    and saves ``last.ckpt``.

    Args:
        backbone: See DN2; used only for ``inputs=backbone``.
        weights: See DN2.
        inputs: Input of the SVM, see above.
        nu: Upper bound on the share of normal images outside the boundary.
        gamma: Of the kernel; scale is 1 / (dimensions x variance).
        select: none; tenth: gamma in 2^-10..2^-1 by AUROC on a tenth of the test images of either kind (oracle); test:
            nu in 0.1..0.9 and gamma in 2^-7..2^2 by AUROC on all test images (oracle).
        optimize: See DN2.

    Attributes:
        bank: The SVM: z = (x - mean) @ components, support vectors (S, P), their alpha (S,), gamma, all float64; and
            the row of each support vector's normal image, (S,).
    """

    bank = Derived[dict[str, Tensor] | None](None)

    def __init__(
        self,
        backbone: str = "resnet152.tv_in1k",
        weights: str | None = None,
        inputs: Literal["pixels_pca", "pixels", "backbone"] = "pixels_pca",
        nu: Share = 0.1,
        gamma: Positive | Literal["scale"] = "scale",
        select: Literal["none", "tenth", "test"] = "none",
        optimize: Optimize = "folded",
    ) -> None:
        super().__init__(backbone, weights, optimize)
        self.save_hyperparameters()
        self.inputs = inputs
        self.nu = nu
        self.gamma = gamma
        self.select = select

    @property
    @override
    def method(self) -> str:
        return "OC-SVM" if self.select == "none" else "OC-SVM (oracle)"

    @property
    @override
    def auroc_name(self) -> str:
        return "auroc" if self.select == "none" else "auroc_oracle"

    @property
    @override
    def SHAPES(self) -> Literal["any", "one"]:  # type: ignore[override]  # pixels are compared one by one
        return "any" if self.inputs == "backbone" else "one"

    @override
    def load_backbone(self) -> None:
        if self.inputs == "backbone":
            super().load_backbone()

    @override
    def embed(self, batch: Batch) -> Tensor:
        if self.inputs == "backbone":
            return super().embed(batch)
        images = batch["image"]
        x = images / 127.5 - 1 if self.inputs == "pixels" else augment.contrast_normalize(images)
        return x.flatten(1)

    @override
    def anomaly_score(self, batch: Batch) -> Tensor:
        return self.explained(batch)["score"]

    @override
    def explained(self, batch: Batch) -> dict[str, Tensor]:
        if self.bank is None:
            raise PandaError(f"{self.method} has no bank of normal images yet: run a test, which makes it.")
        m = self.bank
        z, support = _projected(widenable(self.embed(batch)).double(), m), m["support"]
        squared = z.square().sum(dim=1, keepdim=True) - 2 * z @ support.mT + support.square().sum(dim=1)
        distances = squared.clamp(min=0).sqrt()
        found = {"score": -torch.exp(-m["gamma"] * distances.square()) @ m["alpha"]}
        if "image" in m:
            distance, row = distances.topk(min(self.LISTED, distances.shape[1]), largest=False)
            found |= {"neighbour": m["image"][row], "distance": distance}
        home = batch["image"].device
        if home != z.device:  # which has no float64
            found = {name: (t.float() if t.is_floating_point() else t).to(home) for name, t in found.items()}
        return found

    # ---- fitting -------------------------------------------------------------------------------------------------

    @override
    def fit_index(self) -> int:
        assert self.bank is not None
        self.bank = {name: t.to(wide_device(self.device)) for name, t in self.bank.items()}
        return len(self.bank["support"])

    @override
    def make_bank(self) -> dict[str, Tensor]:
        """Fit the machine on the normal training images."""
        from sklearn.svm import OneClassSVM  # slow to import

        train = extract(self.trainer, self.embed, self.data.normal_dataloader(), "Normal images").cpu().double()
        space = self._space(train)
        z = _projected(train, space).numpy()
        if not z.var():
            raise PandaError("the normal training images are all the same, and OC-SVM needs different ones.")
        gamma, nu = 1 / (z.shape[1] * z.var()) if self.gamma == "scale" else float(self.gamma), self.nu
        if self.select != "none":
            gamma, nu = self._selected(z, space)
        rank_zero_info(f"{self.method}: {len(z)} images, {z.shape[1]} dimensions, gamma {gamma:.4g}, nu {nu:g}")
        svm = OneClassSVM(gamma=gamma, nu=nu, cache_size=1000).fit(z)
        return {
            **space,
            "support": torch.from_numpy(svm.support_vectors_),
            "alpha": torch.from_numpy(svm.dual_coef_[0]),
            "image": torch.from_numpy(svm.support_.astype(np.int64)),
            "gamma": torch.tensor(gamma),
        }

    def _space(self, train: Tensor) -> dict[str, Tensor]:
        """Where z lies, from the inputs x of the normal training images (N, D)."""
        if self.inputs != "backbone":
            red, green, blue = train.chunk(3, dim=1)
            if torch.equal(red, green) and torch.equal(red, blue):
                train = red
        if self.inputs != "pixels_pca":
            return {"mean": torch.zeros(train.shape[1], dtype=torch.float64)}
        from sklearn.decomposition import PCA

        low, width = train.min(), train.max() - train.min() or 1.0  # of flat images, which are refused later
        pca = PCA(0.95, svd_solver="full").fit(((train - low) / width).numpy())
        return {
            "mean": low + width * torch.from_numpy(pca.mean_),
            "components": torch.from_numpy(pca.components_.T.copy()) / width,
        }

    def _selected(self, train: Array, space: dict[str, Tensor]) -> tuple[float, float]:
        """Gamma and nu with the largest AUROC on labelled test images: oracle."""
        from sklearn.svm import OneClassSVM

        loader = self.data.test_dataloader()
        label = loader.dataset.label
        rows = torch.arange(len(label))
        if self.select == "tenth":  # of either kind, so that there is an AUROC
            drawn = torch.randperm(len(label), generator=torch.Generator().manual_seed(self.data.seed))
            kinds = (drawn[label[drawn] == kind] for kind in (0, 1))
            rows = torch.cat([kind[: max(1, len(kind) // 10)] for kind in kinds])
        test, label = extract(self.trainer, self.embed, loader, "Test images").cpu().double()[rows], label[rows]
        z = _projected(test, space)
        rank_zero_info(f"{self.method}: kernels of {in_words(8 * len(train) * (2 * len(train) + len(z)))}")
        own, cross = (torch.cdist(a, torch.from_numpy(train)).square() for a in (torch.from_numpy(train), z))
        nus, gammas = GRIDS[self.select]
        found = []
        for gamma in on_device(self.trainer, gammas, "Grid of gamma and nu"):
            kernel, other = torch.exp(-gamma * own).numpy(), torch.exp(-gamma * cross)
            for nu in nus or [self.nu]:
                svm = OneClassSVM(kernel="precomputed", nu=nu).fit(kernel)
                score = -other[:, svm.support_] @ torch.from_numpy(svm.dual_coef_[0])
                found.append((-metrics.auroc(score, label), gamma, nu))
        return min(found)[1:]


def _projected(x: Tensor, space: dict[str, Tensor]) -> Tensor:
    """Inputs (N, D) as the machine sees them, (N, P)."""
    parts = x.view(x.shape[0], -1, len(space["mean"]))  # not len(x), which an export would fix
    first = parts[:, 0]
    x = first + (parts - parts[:, :1]).mean(dim=1) - space["mean"]  # of a grey machine the mean of three, exactly
    return x @ space["components"] if "components" in space else x
