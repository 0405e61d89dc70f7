"""Plan, train and predict with nnU-Net v2, in its environment: it imports nothing of this bundle.

``nnUNet_raw``, ``nnUNet_preprocessed`` and ``nnUNet_results`` name its folders. The data set has the number 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ITERATIONS = 5  # of an epoch; with 250, as usual, a short training could not be cut to length
WORKERS = "nnUNet_n_proc_DA"
PROBES = 3  # iterations that are timed, after a first


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["train", "predict"])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--images")
    parser.add_argument("--masks")
    args = parser.parse_args()
    if args.step == "train":
        train(args.minutes, args.seed)
    else:
        predict(args.images, args.masks)


def train(minutes: float, seed: int) -> None:
    """Plan and train for some minutes, and write how long it took into ``trained.json``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ[WORKERS] = "1"
    extract_fingerprints([1], num_processes=1)
    plan_experiments([1])
    preprocess([1], configurations=["2d"], num_processes=[1])
    os.environ[WORKERS] = "0"  # augmentation in this process, as that of the bundle; planning needs one
    probe = make_trainer(1)
    probe.on_train_start()
    seconds = [timed_iteration(probe) for _ in range(1 + PROBES)]
    epochs = max(1, round(60 * minutes / (ITERATIONS * np.mean(seconds[1:]))))
    trainer, validating = make_trainer(epochs), []
    validate = trainer.validation_step

    def timed_validation(batch: dict) -> dict:
        start = time.perf_counter()
        result = validate(batch)
        validating.append(time.perf_counter() - start)
        return result

    trainer.validation_step = timed_validation
    start = time.perf_counter()
    trainer.run_training()
    trained = {"minutes": (time.perf_counter() - start - sum(validating)) / 60, "epochs": epochs}
    Path(str(nnUNet_results), "trained.json").write_text(json.dumps(trained))


def make_trainer(epochs: int) -> nnUNetTrainer:
    """The default trainer with another length."""
    trainer = get_trainer_from_args("1", "2d", 0, device=DEVICE)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, ITERATIONS, 1
    return trainer


def timed_iteration(trainer: nnUNetTrainer) -> float:
    """Seconds of a batch and its training step."""
    start = time.perf_counter()
    trainer.train_step(next(trainer.dataloader_train))
    return time.perf_counter() - start


def predict(images: str, masks: str) -> None:
    """Write the probabilities of each image, with the last weights."""
    predictor = nnUNetPredictor(device=DEVICE, perform_everything_on_device=DEVICE.type == "cuda", allow_tqdm=False)
    folder = make_trainer(1).output_folder_base
    predictor.initialize_from_trained_model_folder(folder, (0,), "checkpoint_final.pth")
    predictor.predict_from_files(
        images, masks, save_probabilities=True, num_processes_preprocessing=1, num_processes_segmentation_export=1
    )


if __name__ == "__main__":
    main()
