"""The loss: Dice + focal for masks, class-weighted focal for grades, combined by uncertainty weighting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import ignite.distributed as idist
import torch
from monai.losses import DiceFocalLoss, DiceLoss, FocalLoss
from torch import nn

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.distributed import average_over_processes
from scripts.networks.stochastic import negative_log_likelihood

MIN_SIGMA = 0.1
TASKS = ("segmentation", "grading")
TASK_WEIGHTINGS = ("uncertainty", "sum")


class UncertaintyWeighting(nn.Module):
    r"""Homoscedastic uncertainty weighting of several losses (Kendall et al., CVPR 2018, equation 10), bounded.

    .. math:: L = \sum_i \frac{c_i L_i}{\sigma_i^2} + \log \sigma_i, \quad
              \sigma_i^2 = \exp(2 s_i) + \sigma_{min}^2

    By the paper, c is 1 for a classification, whose likelihood is a softmax, and 1/2 for a regression, whose likelihood
    is a Gaussian. It has sigma_min = 0. Then, when a loss approaches 0, its log sigma falls and its weight grows
    without bound, and the next large loss destabilises the network. The minimum of 0.1 bounds the weight by 100 c and
    each log term from below by log(0.1). The learnable log sigmas s_i start where sigma is 1.

    Args:
        regression: for each loss, whether it is one of a regression.
    """

    factor: torch.Tensor

    def __init__(self, regression: Sequence[bool]) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.full((len(regression),), 0.5 * math.log(1 - MIN_SIGMA**2)))
        self.register_buffer("factor", torch.tensor([0.5 if r else 1.0 for r in regression]), persistent=False)
        if idist.get_world_size() > 1:  # DistributedDataParallel averages only the gradients of the network
            self.log_sigma.register_hook(average_over_processes)

    @property
    def variance(self) -> torch.Tensor:
        """sigma_i squared, one per loss."""
        return (2 * self.log_sigma).exp() + MIN_SIGMA**2

    def forward(self, losses: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Weighted sum of scalar losses; a loss that is None is left out together with its sigma."""
        variance = self.variance
        terms = [
            self.factor[i] * loss / variance[i] + 0.5 * variance[i].log()
            for i, loss in enumerate(losses)
            if loss is not None
        ]
        return torch.stack(terms).sum()


def graded_slices(targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Grade ``[B]`` of the slices that are graded, -1 for the others: those without foreground in a mask that has some.

    Args:
        targets: ``label [B, R, ...]``, ``grade [B]`` and perhaps ``empty [B]``: the subject's whole mask is empty.
    """
    graded = targets["label"].flatten(1).any(dim=1)
    if "empty" in targets:
        graded = graded | targets["empty"]
    return torch.where(graded, targets["grade"], -1)


class MultiTaskLoss(nn.Module):
    """L_total of segmentation and grading; :attr:`components` holds the parts of the last call.

    L_seg = Dice + lambda focal (gamma 1.5) of the predicted clean mask. Dice is computed over the whole batch: the
    Dice of a single empty slice would be a constant. For ``epsilon`` and ``v_prediction`` L_seg is the published
    regression loss, because Dice through x_0 = (x_t - ...) / sqrt(abar) has a gradient 158 times too large at T - 1.
    L_calib = Dice + lambda focal of the calibration map, added to L_seg before the weighting. In a stochastic network
    it is the cross entropy, so that the map is a probability.
    A stochastic network has three further losses, which are added to L_total with weight 1. The reported L_total is
    without them, as in validation.
    L_draw = negative log-likelihood of the true mask under drawn masks, per voxel (Monteiro et al., NeurIPS 2020).
    L_first = Dice + lambda focal of the first mask.
    L_sample = energy score of two samples (:meth:`energy_score`).
    L_cls = focal loss (gamma 2) with class weights alpha, over the slices with foreground of subjects with a grade, and
    over all slices of a subject with a grade whose whole mask is empty. It is left out of a batch without such a slice.
    The weighting treats Dice + focal and L_cls as classifications, and the regression loss as a regression.
    With only one of the :data:`TASKS`, L_total is the loss of that task. With ``task_weighting: sum`` L_total is
    L_seg + L_calib + L_cls, and the sigmas do not change.

    Args:
        diffusion: the schedule; its ``prediction_type`` decides L_seg.
        alpha: class weights ``[K]``, one per grade.
        seg_gamma: gamma of the mask's focal loss.
        lambda_focal: weight of the mask's focal loss.
        cls_gamma: gamma of the grading loss.
        calib_weight: weight of L_calib.
        tasks: what is learned, a list from :data:`TASKS`.
        task_weighting: ``uncertainty`` or ``sum``.
        stochastic: whether the network is stochastic.

    Raises:
        InputError: for an unknown task, or none, or an unknown weighting.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        alpha: Sequence[float] = (1.0, 1.0),
        seg_gamma: float = 1.5,
        lambda_focal: float = 0.5,
        cls_gamma: float = 2.0,
        calib_weight: float = 1.0,
        tasks: Sequence[str] = TASKS,
        task_weighting: str = "uncertainty",
        stochastic: bool = False,
    ) -> None:
        super().__init__()
        if not tasks or not set(tasks) <= set(TASKS):
            raise InputError(f"tasks={tasks!r} must list one or both of {list(TASKS)}")
        if task_weighting not in TASK_WEIGHTINGS:
            raise InputError(f"task_weighting '{task_weighting}' is not one of {list(TASK_WEIGHTINGS)}")
        self.tasks = set(tasks)
        self.weighted = len(self.tasks) == 2 and task_weighting == "uncertainty"
        self.diffusion = diffusion
        self.calib_weight = calib_weight
        self.mask_loss = DiceFocalLoss(sigmoid=True, batch=True, gamma=seg_gamma, lambda_focal=lambda_focal)
        self.stochastic = stochastic
        # smoothed by a voxel: without it, the loss of an empty slice has no gradient
        self.distance = DiceLoss(jaccard=True, squared_pred=True, smooth_nr=1.0, smooth_dr=1.0)
        self.cls_loss = FocalLoss(
            to_onehot_y=True, use_softmax=True, gamma=cls_gamma, weight=list(alpha), reduction="none"
        )
        regression = diffusion.prediction_type != "sample"
        self.weighting = UncertaintyWeighting([regression, False]).requires_grad_(self.weighted)
        self.components: dict[str, torch.Tensor] = {}

    def forward(
        self,
        outputs: Sequence[torch.Tensor | None],
        targets: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Compute L_total.

        Args:
            outputs: ``(seg_logits [B, R, ...], cls_logits [B, K] or None, calib_map [B, R, ...] or None)``, and in
                the training of a stochastic network the logits that :class:`~scripts.training.steps.DenoisingInferer`
                adds.
            targets: ``label [B, R, ...]`` of 0 and 1, ``grade [B]`` with -1 for unknown, and perhaps ``empty [B]``
                (the subject's whole mask is empty) and, in training, ``timesteps [B]``.
        """
        seg_logits, cls_logits, calib_map, *further = outputs
        assert seg_logits is not None
        seg_logits, label = seg_logits.float(), targets["label"].float()
        components = {"L_seg": self._segmentation_loss(seg_logits, label, targets.get("timesteps"))}
        if calib_map is not None:
            calib_loss = nn.functional.binary_cross_entropy_with_logits if self.stochastic else self.mask_loss
            components["L_calib"] = calib_loss(calib_map.float(), label)
        task_losses = {"segmentation": components["L_seg"] + self.calib_weight * components.get("L_calib", 0)}
        if cls_logits is not None:
            loss_cls = self.grading_loss(cls_logits.float(), graded_slices(targets))
            if loss_cls is not None:
                components["L_cls"] = task_losses["grading"] = loss_cls
        components["L_total"] = total = self._total(task_losses, cls_logits)
        if further and "segmentation" in self.tasks:
            draws, first_mask, samples, truth = (part.float() for part in further if part is not None)
            added = {"L_draw": negative_log_likelihood(draws, label), "L_first": self.mask_loss(first_mask, label)}
            if len(truth):
                first, second = samples.chunk(2)
                added["L_sample"] = self.energy_score(first, second, truth)
            components |= added
            total = total + sum(added.values())
        self.components = {name: value.detach() for name, value in components.items()}
        return total

    def _segmentation_loss(
        self, seg_logits: torch.Tensor, label: torch.Tensor, timesteps: torch.Tensor | None
    ) -> torch.Tensor:
        """L_seg; validation has no timesteps."""
        if timesteps is not None and self.diffusion.prediction_type != "sample":
            return self.diffusion.regression_loss(seg_logits, 2 * label - 1, timesteps)
        return self.mask_loss(seg_logits, label)

    def energy_score(self, first: torch.Tensor, second: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Energy score of two samples, as logits, and a true mask, each ``[B, R, H, W]``.

        The mean distance of both samples to the truth, minus half of their distance to each other: it is lowest if the
        samples have the distribution of the truth (Gneiting and Raftery, JASA 2007; for diffusion De Bortoli et al.,
        ICML 2025). The distance is 1 - IoU of the probabilities.
        """
        one, two = first.sigmoid(), second.sigmoid()
        return (self.distance(one, label) + self.distance(two, label) - self.distance(one, two)) / 2

    def _total(self, task_losses: dict[str, torch.Tensor], cls_logits: torch.Tensor | None) -> torch.Tensor:
        """L_total; adds every output times 0, because DistributedDataParallel waits for a gradient of each."""
        losses = [task_losses.get(task) if task in self.tasks else None for task in TASKS]
        zero = 0 * task_losses["segmentation"]
        if cls_logits is not None:
            zero = zero + 0 * cls_logits.sum()
        if self.weighted and cls_logits is not None:
            return self.weighting(losses) + zero
        return zero + sum(loss for loss in losses if loss is not None)

    def check(self, network: nn.Module, grades: Iterable[int]) -> None:
        """Raise InputError, before any volume is read, if grading is the only task and cannot be learned.

        Args:
            network: its ``cls_head`` may be None.
            grades: of the training subjects, -1 for unknown.
        """
        if self.tasks == {"grading"} and (network.cls_head is None or max(grades, default=-1) < 0):
            raise InputError("tasks=['grading'] needs use_cls_head and training subjects with a grade")

    def grading_loss(self, cls_logits: torch.Tensor, grade: torch.Tensor) -> torch.Tensor | None:
        """Mean of alpha_c (1 - p_c)^gamma (-log p_c) over the items with a grade; None if there are none."""
        valid = grade >= 0
        if not valid.any():
            return None
        return self.cls_loss(cls_logits[valid], grade[valid, None]).sum(dim=1).mean()

    @property
    def sigmas(self) -> dict[str, float]:
        """Current ``sigma_seg`` and ``sigma_cls``."""
        sigma = self.weighting.variance.detach().sqrt().tolist()
        return {"sigma_seg": sigma[0], "sigma_cls": sigma[1]}
