"""Every command of the pages, those of bundles/ too, is run, as it stands there. Run by `make docs-test`.

Pages are run in copies of the repository, block by block, as a reader does. Nothing of a command is changed but its
sizes (reduced.py) and the folders below /path/to, which are made up. A new page needs nothing here, unless it has

- a data set of its own: one line in DATA,
- files that another page makes: its name in SHARED, behind that page,
- a command that cannot run here: one line in EXEMPT, with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_phantom import write_series, write_subject
from PIL import Image

import forked
from scripts.tools.phantom import make_dataset
from scripts.tools.phantom_ct import make_subject as make_ct

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600
# Pages that share a copy, in this order; every other page has one of its own. `make demo` (README.md) and `make staged`
# (training.md) write the phantoms that others use.
SHARED = [
    ["README.md", "docs/ablation.md", "docs/results.md", "models/README.md"],
    [
        "docs/train.md",
        "docs/evaluate.md",
        "docs/infer.md",
        "docs/dicom.md",
        "docs/export.md",
        "docs/training.md",
        "docs/scale.md",
        "docs/performance.md",
        "docs/conditioning.md",
    ],
]
# Pages whose commands another test runs.
ELSEWHERE = {
    "docs/monai_label.md": "test_label.py, which has the environment of the server",
    "docs/clinic.md": "test_clinic.py, which has an archive and a browser, too",
}
# Commands that begin with these words are not run.
EXEMPT = {
    "make test": "CI runs it by itself",
    "make conformance": "CI runs it by itself",
    "make docs-test": "CI runs it by itself",
    "make label-test": "CI runs it by itself",
    "make clinic-test": "CI runs it by itself",
    "make gpu-bench": "needs a GPU; the page has the command that tries the same script on a processor",
    "pytest tests/test_gpu.py": "a part of `make test`",
    "python -m monai.bundle run --ckpt_dir models": "`make conformance` runs it and compares the scores",
    "python -m monai.bundle trt_export": "needs an NVIDIA GPU and torch-tensorrt",
    "pytest tests/test_configs.py -k seed_settings": "a part of `make test`",
    "tensorboard --logdir runs": "a server: it does not end",
    "mlflow ui": "a server: it does not end",
    "torchrun --nnodes 2": "needs two machines",
    "python -m monai.bundle run --config_file configs/ablation.yaml --scheduler": "test_cluster.py has a scheduler",
    "python -m monai.bundle run --scheduler": "test_cluster.py has a scheduler",
    "python -m monai.bundle run --dataset_dir s3://bucket/brains": "test_cluster.py has an object store",
}
IDENTITY = ["-c", "user.name=docs", "-c", "user.email=docs@example.org"]
COMMAND = re.compile(r"(python|make|pip|torchrun|git|pytest|tensorboard|mlflow|OMP_\w+=\S+) \S")
CODE = re.compile(r"^```(?P<language>\w*)\n(?P<fenced>.*?)^```$|`(?P<inline>[^`]+)`", re.MULTILINE | re.DOTALL)


# ---- the data sets of the pages
def phantoms(folder: Path, count: int = 10) -> None:
    make_dataset(folder, num_subjects=count, shape=(32, 32, 8), seed=3)


def listed(folder: Path) -> None:
    """Two subjects in a table."""
    phantoms(folder, 2)
    names = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    rows = [{"subject": n} | {m: f"{n}/{n}_{m}.nii.gz" for m in ("t1", "t1ce", "t2", "flair")} for n in names]
    pd.DataFrame(rows).to_csv(folder / "subjects.csv", index=False)


def one_subject(folder: Path) -> None:
    phantoms(folder.with_name("one"), 1)
    next(folder.with_name("one").glob("BraTS*")).rename(folder)


def train_and_test(make: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [make(folder / part) for part in ("Train", "Test")] and None


def tcga_lgg(folder: Path) -> None:
    """Label 1 alone, WHO grades in a table of other columns."""
    phantoms(folder)
    for file in folder.glob("*/*_seg.nii.gz"):
        image = nib.load(file)
        nib.save(nib.Nifti1Image((np.asarray(image.dataobj) > 0).astype(np.uint8), image.affine), file)
    table = pd.read_csv(folder / "name_mapping.csv").rename(columns={"BraTS_2020_subject_ID": "subject_ID"})
    table.replace({"Grade": {"LGG": "G2", "HGG": "G3"}}).to_csv(folder / "name_mapping.csv", index=False)


def decathlon(folder: Path) -> None:
    """One 4D file per subject; labels 1, 2 and 3."""
    order = ["flair", "t1", "t1ce", "t2"]
    phantoms(folder.with_name("3d"))
    for i, subject in enumerate(sorted(folder.with_name("3d").glob("BraTS*"))):
        volumes = {name: nib.load(subject / f"{subject.name}_{name}.nii.gz") for name in [*order, "seg"]}
        image = np.stack([np.asarray(volumes[name].dataobj) for name in order], axis=-1)
        label = np.array([0, 2, 1, 0, 3], np.uint8)[np.asarray(volumes["seg"].dataobj)]
        for part, data in (("images", image), ("labels", label)) if i < 8 else (("images", image),):
            file = folder / f"{part}{'Tr' if i < 8 else 'Ts'}" / f"BRATS_{i:03d}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, volumes["seg"].affine), file)


def pictures(images: Path, masks: Path, names: list[str], suffix: str, levels: list[int], grey: bool = False) -> None:
    """Noisy pictures of discs one within another, and masks with their grey levels, the first of the background."""
    rng = np.random.default_rng(0)
    images.mkdir(parents=True)
    masks.mkdir()
    rows, columns = np.indices((40, 32))
    for name in names:
        radius = np.hypot(rows - rng.uniform(12, 24), columns - rng.uniform(12, 20))
        mask = np.array(levels, np.uint8)[np.sum([radius < size for size in (10, 5)[: len(levels) - 1]], axis=0)]
        noisy = (rng.uniform(40, 80, (*mask.shape, 3)) + 0.4 * mask[..., None]).astype(np.uint8)
        Image.fromarray(noisy[..., 0] if grey else noisy).save(images / f"{name}.{suffix}")
        Image.fromarray(mask).save(masks / f"{name}.png")


def dicom(folder: Path) -> None:
    for number in (1, 2):
        write_subject(folder / f"case{number}", seed=number)


def refuge2(folder: Path) -> None:
    names = [f"T{i:04d}" for i in range(8)]
    pictures(folder / "Disc_Cup_Fovea_Illustration", folder / "Disc_Cup_Masks", names, "jpg", [255, 128, 0])


def drishti(folder: Path) -> None:
    """Votes of four experts for disc and cup, as shares of 255."""
    names = [f"{i:03d}" for i in range(10)]
    pictures(folder / "images", folder / "votes", names, "png", [0, 100, 255])
    for name in names:
        levels = np.asarray(Image.open(folder / "votes" / f"{name}.png"))
        for part, votes in (("disc", [0, 191, 255]), ("cup", [0, 64, 255])):
            shares = np.select([levels == level for level in (0, 100, 255)], votes).astype(np.uint8)
            Image.fromarray(shares).save(folder / "votes" / f"{name}_{part}.png")
        (folder / "votes" / f"{name}.png").unlink()
    pd.DataFrame({"image": names, "label": ["normal", "glaucoma"] * 5}).to_csv(folder / "labels.csv", index=False)


def grey_pictures(folder: Path) -> None:
    names = [f"case{i}" for i in range(8)]
    pictures(folder / "images", folder / "masks", names, "png", [0, 255], grey=True)
    pd.DataFrame({"image": names, "label": ["benign", "malignant"] * 4}).to_csv(folder / "labels.csv", index=False)


def ultrasounds(folder: Path) -> None:
    names = [f"lesion{i}" for i in range(12)]
    pictures(folder / "images", folder / "masks", names, "png", [0, 255])
    pd.DataFrame({"image": names, "label": ["benign", "malignant"] * 6}).to_csv(folder / "labels.csv", index=False)


def ct_series(folder: Path) -> None:
    """A CT as a DICOM series, in Hounsfield units."""
    image, _ = make_ct(np.random.default_rng(0), (32, 32, 24), (10.0, 10.0, 20.0))
    for file in write_series(folder / "case1", image + 1024, np.diag([10.0, 10.0, 20.0, 1.0])):
        header = pydicom.dcmread(file)
        header.RescaleSlope, header.RescaleIntercept = 1, -1024
        header.save_as(file)


DATA: dict[str, Callable[[Path], None]] = {  # by the name behind /path/to
    "BraTS2020": phantoms,
    "BraTs2021": train_and_test(phantoms),
    "BraTS2021_00000": one_subject,
    "REFUGE2": train_and_test(refuge2),
    "Task01_BrainTumour": decathlon,
    "busi": ultrasounds,
    "cache": lambda folder: folder.mkdir(),
    "ct_series": ct_series,
    "drishti": drishti,
    "new": grey_pictures,
    "new_subjects": lambda folder: phantoms(folder, 2),
    "listed_subjects": listed,
    "own": grey_pictures,
    "studies": dicom,
    "tcga_lgg": tcga_lgg,
}


# ---- the commands of the pages
@dataclass(frozen=True)
class Block:
    """Commands that are run together, or a file that the page asks for."""

    page: str
    line: int
    text: str
    fenced: bool
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[tuple[str, str]]:
        """Each command as it stands there, and on one line without comment."""
        found = re.findall(r"(?:.*\\\n)*.*\n?", self.text)
        return [(text, " ".join(re.sub(r"\\\n|(^|\s)#.*", " ", text).split())) for text in found if text.strip()]

    def script(self) -> str:
        """What is run: everything but the exempt."""
        return "".join(text for text, command in self.commands() if not exemption(command))


def exemption(command: str) -> str | None:
    return next((words for words in EXEMPT if f"{command} ".startswith(f"{words} ")), None)


def blocks_of(page: str) -> Iterator[Block]:
    """Blocks of a page in order: fenced commands and files, and commands within the text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in CODE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        fenced, inline = match["fenced"], match["inline"]
        if inline is not None:
            inline = " ".join(inline.split())
            if COMMAND.match(inline):
                yield Block(page, line, inline, fenced=False)
        elif file := re.match(r"# (configs/\w+\.yaml)\n", fenced):
            yield Block(page, line, fenced, fenced=True, file=file[1])
        elif match["language"] in ("bash", "sh", "shell", "console") or re.search(f"(?m)^{COMMAND.pattern}", fenced):
            yield Block(page, line, fenced, fenced=True)


def copies() -> list[list[Block]]:
    """Blocks by the copy that they are run in; what a fenced block runs, or the text before, is not run again."""
    pages = ["README.md", "docs/*.md", "models/README.md", "bundles/*/docs/*.md"]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *pages]
    tracked = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    pages = sorted(page for page in tracked if (ROOT / page).is_file() and page not in ELSEWHERE)
    groups = SHARED + [[page] for page in pages if not any(page in group for group in SHARED)]
    blocks = [[block for page in group for block in blocks_of(page)] for group in groups]
    seen = {command for group in blocks for block in group if block.fenced for _, command in block.commands()}
    result = []
    for group in blocks:
        result.append([])
        for block in group:
            if block.fenced or block.text not in seen:
                result[-1].append(block)
                seen.add(block.text)
    return [group for group in result if group]


COPIES = copies()
BLOCKS = [block for group in COPIES for block in group if not block.file]


# ---- running them
@dataclass(frozen=True)
class Outcome:
    returncode: int
    output: str
    empty: list[str]  # folders of --output_dir without a file


def copy_repository(folder: Path) -> Path:
    """The files of the repository, and an environment whose interpreter reduces sizes."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    for words in (["init", "-q"], ["add", "-A"], [*IDENTITY, "commit", "-qm", "copy"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for program in ("python", "python3", "pip", "torchrun"):
        (programs / program).write_text(
            f'#!/bin/sh\nexec {sys.executable} {ROOT}/acceptance/reduced.py {program} "$@"\n'
        )
        (programs / program).chmod(0o755)
    (programs / "activate").write_text(f"export PATH={programs}:$PATH\n")
    for tool in Path(sys.executable).parent.iterdir():
        if not re.match("python|pip|activate", tool.name, re.IGNORECASE) and not (programs / tool.name).exists():
            (programs / tool.name).symlink_to(tool)
    (folder / ".venv-peers").mkdir()
    for stamp in (
        ".venv/.installed",
        ".venv/.installed-extras",
        ".venv-peers/.installed",
    ):  # nothing is to be installed
        (folder / stamp).touch()
    return folder


def run(block: Block, copy: Path, data: Path, interpreter: Path) -> Outcome:
    """Run a block in its copy, or write its file there. Of a loop over folds or seeds, only the first is run."""
    text = (block.text if block.file else block.script()).replace("/path/to/", f"{data}/")
    text = re.sub(r"(for \w+ in \d+)( \d+)+", r"\1", text)
    if block.file:
        (copy / block.file).write_text(text, encoding="utf-8")
        return Outcome(0, "", [])
    outputs = copy / ".outputs"
    outputs.write_text("")
    environment = os.environ | {"PATH": f"{copy}/.venv/bin:/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment |= {"DOCS_OUTPUTS": str(outputs), "DOCS_INTERPRETER": str(interpreter), "MAKEFLAGS": ""}
    environment.pop("PYTHONPATH", None)
    with (copy / ".log").open("w+", encoding="utf-8") as log:
        command = ["timeout", str(TIMEOUT), "bash", "-eo", "pipefail", "-c", text]
        process = subprocess.run(command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.seek(0)
        output = log.read()
    folders = outputs.read_text().splitlines()
    empty = [name for name in folders if not any(path.is_file() for path in Path(name).rglob("*"))]
    return Outcome(process.returncode, output, empty)


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory) -> Iterator[dict[Block, Future]]:
    """What each block came to: copies are run two at a time, each up to the last block that is asked for."""
    wanted = {item.callspec.params.get("block") for item in request.session.items if hasattr(item, "callspec")}
    data = tmp_path_factory.mktemp("data")
    for name, make in DATA.items():
        make(data / name)
    interpreter = tmp_path_factory.mktemp("interpreter") / "socket"
    process = forked.start(interpreter)
    futures: dict[Block, Future] = {block: Future() for group in COPIES for block in group}
    stopped = threading.Event()

    def run_group(group: list[Block], copy: Path) -> None:
        try:
            copy_repository(copy)
            for block in group:
                if stopped.is_set():
                    return
                futures[block].set_result(run(block, copy, data, interpreter))
        except Exception as error:  # a test that waits for its block would wait for ever
            for block in group:
                if not futures[block].done():
                    futures[block].set_exception(error)

    with ThreadPoolExecutor(2) as pool:
        for group in COPIES:
            last = max((i for i, block in enumerate(group) if block in wanted), default=-1)
            if last >= 0:
                pool.submit(run_group, group[: last + 1], tmp_path_factory.mktemp("copy"))
        yield futures
        stopped.set()
    process.terminate()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_commands_run(block, outcomes):
    unknown = set(re.findall(r"/path/to/([\w.-]+)", block.text)) - DATA.keys()
    assert not unknown, f"{block}: no data set is made for /path/to/{unknown.pop()}; add it to DATA"
    gaps = re.findall(r"<\w[\w -]*>|\[settings\]|\.\.\. ", block.script())
    assert not gaps, f"{block}: {gaps} is not a command; give one that runs, or add it to EXEMPT with the reason"
    if not any(command and not exemption(command) for _, command in block.commands()):
        pytest.skip(EXEMPT[exemption(block.commands()[-1][1])])
    outcome = outcomes[block].result()
    tail = "\n".join(outcome.output.splitlines()[-40:])
    assert outcome.returncode == 0, f"{block} ended with {outcome.returncode}:\n{block.text}\n{tail}"
    assert not outcome.empty, f"{block} wrote nothing to {outcome.empty}:\n{block.text}\n{tail}"


@pytest.mark.parametrize("words", EXEMPT)
def test_exempt_commands_still_stand_in_the_docs(words):
    assert any(exemption(command) == words for block in BLOCKS for _, command in block.commands())


def test_links_lead_somewhere():
    for page in {block.page for block in BLOCKS}:
        for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
