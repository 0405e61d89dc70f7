"""Write docs/keys.md, the table of the public keys, from configs/train.yaml: ``python -m scripts.tools.keys``."""

from __future__ import annotations

import re

from scripts.config import BUNDLE_ROOT, atomic_path

PAGE = BUNDLE_ROOT / "docs" / "keys.md"
KEY = re.compile(r"^(?P<key>\w+): *(?P<default>.*?) +# (?P<meaning>.*)$")
HEAD = """# Keys

Every public key of [configs/train.yaml](../configs/train.yaml) can be given on the command line, such as
`--batch_size 8` or `--regions "['TC','WT','ET']"`, or in an overlay. A key that does not exist is refused, and the
nearest known key is named. `python -m scripts.tools.keys` writes this page; a test compares it with the file.

The keys of [configs/inference.yaml](../configs/inference.yaml) have the same names and meanings. The settings of the
network are not among them: inference takes them from the checkpoint.
"""
ADDRESSES = """
## Other values

Everything else in the configuration has an address: the path of its keys, joined by `::`. Items of a list have
numbers from 0.

| address | default | meaning |
|---|---|---|
| `--subjects::label_suffix` | `seg` | suffix of the segmentation file |
| `--alpha` | n / (K n_c) | class weights of the grading loss, such as `"[2.4, 0.6]"` |
| `--loss::lambda_focal` | `0.5` | weight of the focal loss against the Dice loss |
| `--loss::tasks` | `[segmentation, grading]` | what is learned |
| `--loss::task_weighting` | `uncertainty` | `sum` adds the losses without learned weights |
| `--optimizer::params::weight_decay` | `0.01` | weight decay of the weights; norms and biases have none |
| `--optimizer::params::trainable` | `null` | regular expression of the parameters that are trained |
| `--ema::decay` | `0.999` | with `ema.yaml`: decay of the moving average |
| `--lr_scheduler::T_0`, `::patience`, `::warmup_epochs` | `25`, `10`, `5` | with the overlays `lr_*.yaml` |
| `--train::amp_dtype` | `bfloat16` | `float16` uses loss scaling |
| `--train::compile` | `false` | torch.compile, which needs a C++ compiler |
| `--train::early_stopping` | `null` | number of validations without a better Dice after which training stops |
| `--train::inferer::noised_mask` | `null` | mask that training noises: `truth`, `prediction` or `calibration` |
| `--train::random_transforms::0::pos` | `2.0` | slices with foreground drawn for each slice without |
| `--train::handlers::4::max_norm` | `1.0` | upper bound of the gradient norm |
| `--train::trainer::accumulation_steps` | `1` | batches per step of the optimiser |
| `--validate::inferer::sampling_batch_size` | `32` | slices times samples in one batch; bounds the memory |
| `--validate::inferer::eta` | `0.0` | noise that `ddim` adds, 0 to 1 |
| `--validate::inferer::start_timestep` | `null` | start from the noised calibration map instead of from pure noise |
| `--validate::inferer::calibrated_for` | `foreground` | `lesion` applies the temperature fitted near the lesion |
| `--validate::report::results::dataset` | folder's name | with `evaluate.yaml`: name in `evaluation_results.json` |

In inference, `--validate::inferer::` is `--inferer::`.
"""


def table() -> str:
    """Markdown of the page.

    Raises:
        ValueError: naming a public key without a comment.
    """
    text = (BUNDLE_ROOT / "configs" / "train.yaml").read_text(encoding="utf-8")
    lines = text[text.index("# ---- data") : text.index("\nsubjects:")].splitlines()
    page = [HEAD]
    for line in lines:
        if line.startswith("# ---- "):
            page += [f"\n## {line[7:].capitalize()}\n", "| key | default | meaning |", "|---|---|---|"]
        elif match := KEY.match(line):
            default, meaning = (match[name].replace("|", "\\|") for name in ("default", "meaning"))
            page.append(f"| `{match['key']}` | `{default}` | {meaning} |")
        elif line:
            raise ValueError(f"configs/train.yaml: '{line}' has no comment")
    return "\n".join(page) + "\n" + ADDRESSES


def main() -> None:
    """Replace the page."""
    with atomic_path(PAGE) as path:
        path.write_text(table(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
