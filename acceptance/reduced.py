"""Stands for the interpreter in test_docs.py: the command of a page with smaller sizes, all else as it is.

``reduced.py python -m monai.bundle run ...`` becomes that very command with the sizes below, in float32 where the
processor has no bfloat16. Each ``--output_dir`` is noted in the file that ``DOCS_OUTPUTS`` names.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import yaml

import forked

# Put in where a command does not say otherwise. Evaluation gets them too: the network must be that of training.
TRAINING = {
    "--image_size": ["32"],
    "--channels": ["[8,8,8]"],
    "--calib_channels": ["[8,8,8]"],
    "--slices_per_volume": ["2"],
    "--batch_size": ["8"],
    "--val_interval": ["1"],
}
NETWORK = {key: TRAINING[key] for key in ("--image_size", "--channels", "--calib_channels")}
FINE_TUNING = {key: TRAINING[key] for key in TRAINING.keys() - NETWORK.keys()}  # the network is that of the weights
ORGANS = {
    "--image_size": ["32"],
    "--features": ["[8,8,8,8,8,8]"],
    "--slices_per_volume": ["4"],
    "--val_interval": ["1"],
}
SYNTHESIS = {
    "--features": ["[8,8,8,8,8,8]"],
    "--refiner_width": ["8"],
    "--refiner_units": ["2"],
    "--slices_per_volume": ["2"],
    "--val_interval": ["1"],
}
# Put in whatever a command says.
EPOCHS = {"--max_epochs": ["1"]}
BENCHMARKS = {
    "annotators.py": {"--kinds": ["nested"], "--seeds": ["0"], "--steps": ["2"], "--pictures": ["2"]},
    "ct.py": {"--shape": ["64", "64", "16"], "--features": ["8"] * 6},
    "cup_to_disc.py": {},
    "curve.py": {},
    "data.py": {"--num_subjects": ["1"], "--shape": ["32", "32", "8"], "--image_size": ["32"]},
    "export.py": {"--repeats": ["1"], "--slices": ["2"]},
    "false_volume.py": {},
    "flops.py": {},
    "folds.py": {},
    "gpu.py": {
        "--sizes": ["32"],
        "--shape": ["32", "32", "8"],
        "--num_samples": ["2"],
        "--channels": ["[8,8,8]"],
        "--calib_channels": ["[8,8,8]"],
        "--batch_size": ["4"],
    },
    "grades.py": {"--repeats": ["1"]},
    "randomisation.py": {"--epochs": ["1"], "--arms": ["all parts", "without skull"]},
    "registration.py": EPOCHS | {"--num_subjects": ["6"], "--seeds": ["0"]},
    "parts.py": {},
    "resize.py": {},
    "inference.py": {},
    "int8.py": {"--image_size": ["32"], "--repeats": ["1"]},
    "network.py": {"--repeats": ["1"], "--image_size": ["32"], "--variants": ["S"]},
    "scale.py": {"--counts": ["2"], "--shared": ["0"]},
    "run.py": {"--minutes": ["0.01"], "--folds": ["0"], "--seeds": ["0"], "--arms": ["this bundle"]},
    "structure.py": {},
    "threads.py": {"--seconds": ["0.2"], "--loads": ["0"]},
    "sampling.py": EPOCHS | {"--prediction_types": ["sample"], "--samplers": ["ddim"], "--steps": ["1", "2"]},
    "training.py": {"--steps": ["1"], "--repeats": ["1"]},
    "windows.py": {},
}


def values_of(words: list[str], option: str) -> list[str] | None:
    """What stands behind an option, up to the next one; None without it."""
    if option not in words:
        return None
    start = words.index(option) + 1
    stop = next((i for i in range(start, len(words)) if re.match("--?[a-zA-Z]", words[i])), len(words))
    return words[start:stop]


def put(words: list[str], options: dict[str, list[str]], *, replace: bool) -> list[str]:
    """The command with these options; those that it gives itself stay, unless they are to be replaced."""
    for option, values in options.items():
        old = values_of(words, option)
        if old is None:
            words = [*words, option, *values]
        elif replace:
            start = words.index(option) + 1
            words = [*words[:start], *values, *words[start + len(old) :]]
    return words


def sizes_of(config: str) -> dict[str, list[str]]:
    """The smaller sizes of the bundle that a configuration belongs to."""
    own = {"bundles/organs": ORGANS, "bundles/synthesis": SYNTHESIS}
    return next((sizes for folder, sizes in own.items() if folder in config), TRAINING)


def reduced(words: list[str]) -> list[str]:
    """The arguments of ``python`` or ``torchrun`` with smaller sizes."""
    if "monai.bundle run" in " ".join(words):
        (files,) = values_of(words, "--config_file") or ["[]"]
        names = [files] if files.endswith(".yaml") and "[" not in files else yaml.safe_load(files)
        bases = {Path(name).name for name in names}
        if "ablation.yaml" in bases:
            return reduced_ablation(words, names)
        if "train.yaml" in bases:
            sizes = FINE_TUNING if "fine_tune.yaml" in bases else sizes_of(names[0])
            if values_of(words, "--ckpt_path") == ["models/model.pt"]:  # they have a size
                sizes = {}
            words = put(put(words, sizes, replace=False), EPOCHS, replace=True)
        if "--nproc_per_node" in words:
            words = put(words, {"--nproc_per_node": ["2"]}, replace=True)
            if "train.yaml" in bases:  # one of ten subjects could not be shared by two processes
                words = put(words, {"--validation_share": ["0.34"]}, replace=False)
        return words
    if words[:2] == ["-m", "scripts.tools.phantom_ct"]:
        count = min(10, int((values_of(words, "--num_subjects") or ["10"])[0]))
        return put(words, {"--num_subjects": [str(count)]}, replace=True)
    if words[:2] == ["-m", "scripts.tools.phantom"]:
        count = min(10, int((values_of(words, "--num_subjects") or ["10"])[0]))
        words = put(words, {"--num_subjects": [str(count)]}, replace=True)
        if "--randomise" in words:
            return put(words, {"--size": ["32"]}, replace=True)
        return put(words, {"--shape": ["32", "32", "8"]}, replace=False)
    if words[:3] == ["-m", "pip", "install"]:
        return [*words, "--dry-run"]
    if words and "benchmarks" in Path(words[0]).parts:
        name = Path(words[0]).name
        if "--nnunet" in words:  # its environment is not made for the test of the pages
            words = [word for word in words if word not in ("--nnunet", *values_of(words, "--nnunet"))]
        words = put(words, BENCHMARKS[name], replace=True)
        for file in values_of(words, "--arms_file") or []:
            fine_tuning = Path(file).name == "fine_tuning.yaml"
            words = put(words, {"--arms": ["these weights" if fine_tuning else "full resolution"]}, replace=True)
            if fine_tuning:
                return put(words, FINE_TUNING | {"--training_patients": ["2"]}, replace=True)
        if name == "training.py" and "--subjects" in words:
            words = put(words, {"--subjects": ["8", "10"]}, replace=True)
        options = {"training.py": NETWORK, "inference.py": NETWORK, "sampling.py": TRAINING, "run.py": TRAINING}
        options |= {"windows.py": NETWORK, "randomisation.py": TRAINING, "export.py": NETWORK}
        return put(words, options.get(name, {}), replace=False)
    return words


def reduced_ablation(words: list[str], files: list[str]) -> list[str]:
    """One seed and epoch, of the arms the reference and the last, of the grid the first values."""
    config: dict = {}
    for file in files:
        config |= yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    arms = yaml.safe_load((values_of(words, "--arms") or [str(config["arms"])])[0])
    (reference,) = values_of(words, "--reference") or [config.get("reference") or next(iter(arms))]
    kept = dict.fromkeys([reference, list(arms)[-1]])
    grid = {key: values[:1] for key, values in config.get("grid", {}).items()}
    chosen = str({name: {key: arms[name][key] for key in arms[name].keys() - {"max_epochs"}} for name in kept})
    epochs = {"--max_epochs": ["4"]} if "staged" in chosen else EPOCHS  # the stages share them
    words = put(words, epochs | {"--seeds": ["[0]"], "--arms": [chosen]}, replace=True)
    sizes = sizes_of(files[0]).items()
    settings = {f"--ablation::settings::{key[2:]}": value for key, value in sizes if key != "--val_interval"}
    return put(words, {"--grid": [str(grid)]} | settings, replace=False)


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16. Without, torch emulates it 30 times slower. torch is not imported here."""
    file = Path("/proc/cpuinfo")
    return not file.is_file() or "bf16" in file.read_text()


def main() -> None:
    """Become the reduced command."""
    program, *words = sys.argv[1:]
    inside = "DOCS_INSIDE" in os.environ  # of a command that has the smaller sizes already
    if not inside:
        words = reduced(["-m", "pip", *words] if program == "pip" else words)
    if "--amp" in words and not has_bfloat16():
        place = words.index("--amp")
        words = words[:place] + words[place + 1 + len(values_of(words, "--amp") or []) :]
    for folder in [] if inside else values_of(words, "--output_dir") or []:
        with open(os.environ["DOCS_OUTPUTS"], "a", encoding="utf-8") as file:
            file.write(f"{Path(folder).resolve()}\n")
    interpreter = os.environ.get("DOCS_INTERPRETER")
    if program != "torchrun" and forked.can_run(words, interpreter):
        sys.exit(forked.run(words, interpreter))
    module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    os.execv(sys.executable, [sys.executable, *module, *words])


if __name__ == "__main__":
    main()
