"""The config of each step: a template of configs/recipe with the values of the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cli.recipe.look import Kind, Look
from cli.recipe.mix import MANUAL
from cli.recipe.settings import SIZES, Options
from cli.recipe.templates import fill
from smartkv.errors import SmartKVError
from smartkv.io.atomic import PART, write_atomically
from smartkv.io.locks import LOCK

TEMPLATES = Path(__file__).parents[2] / "configs" / "recipe"
FOOTPRINTS = [0.125, 0.25]  # that the card tells of
HAYSTACKS = ("books", MANUAL)  # kinds around the facts of the report, where they can be had
VALIDATIONS = 8  # of the distillation; as many times its state is saved
WHAT = {
    "harvest": "Keys and lifespans of the model, from the mix of texts. The same command goes on after a kill.",
    "lifespans": "Gates that predict lifespans. --ckpt_path last goes on after a kill.",
    "distilled": "Gates distilled through the frozen model. --ckpt_path last goes on after a kill.",
    "report": "What the gates lose, by kind of text, beside a sliding window. The same command goes on after a kill.",
}


EXPORT = ("config.json", "model.safetensors", "README.md")
FIT = (
    "config.yaml", "hparams.yaml", "heads.csv", "events.out.tfevents.*", "hpc_ckpt_*.ckpt", "checkpoints/epoch=*.ckpt",
    "checkpoints/last*.ckpt", *(f"export/{name}" for name in EXPORT),
)  # fmt: skip
MADE = {  # glob patterns of the files that the steps write, by subfolder
    "configs": tuple(f"{step}.yaml" for step in WHAT),
    "shards": (
        "config.yaml",
        "manifest.json",
        "windows.safetensors",
        "train-*.safetensors",
        "validation-*.safetensors",
    ),
    "lifespans": FIT,
    "distilled": FIT,
    "report": ("compare.json", "compare.md", "compare.cells", "frontier_*.png", "recall.png"),
    "gates": EXPORT,
}


@dataclass(frozen=True)
class Layout:
    """The files in the folder of a run.

    Attributes:
        out: the folder.
    """

    out: Path

    @property
    def made(self) -> list[Path]:
        """The files that the command has written, beside its record."""
        return [file for name, made in MADE.items() for pattern in made for file in (self.out / name).glob(pattern)]

    def clear(self) -> list[Path]:
        """Delete what the command has written, beside its record, and the folders that are empty then.

        Returns:
            The files in its folders that it did not make, which stay.
        """
        for file in self.made:
            file.unlink(missing_ok=True)
        left = list[Path]()
        for part in (self.out / name for name in MADE):
            below = sorted(part.rglob("*"), reverse=True)  # what lies in a folder comes before it
            for path in below:
                if path.is_dir() and not path.is_symlink():
                    _remove_if_empty(path)
                elif path.name == LOCK or path.name.endswith(PART):
                    path.unlink(missing_ok=True)
                else:
                    left.append(path)
            _remove_if_empty(part)
        return sorted(left)

    @property
    def gates(self) -> Path:
        """Folder of the gates that are the result."""
        return self.out / "gates"

    def config(self, step: str) -> Path:
        """Return the config of a step."""
        return self.out / "configs" / f"{step}.yaml"

    def result(self, step: str) -> Path:
        """Return the file that a step leaves at its end."""
        files = {
            "harvest": "shards/manifest.json",
            "lifespans": "lifespans/export/config.json",
            "distilled": "distilled/export/config.json",
            "report": "report/compare.json",
        }
        return self.out / files[step]

    def command(self, step: str) -> list[str]:
        """Return the command of a step, after `python`."""
        config = str(self.config(step))
        if step == "report":
            return ["-m", "eval", "compare", "--config", config]
        return ["main.py", "predict" if step == "harvest" else "fit", "-c", config]


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def steps_of(look: Look) -> list[str]:
    """Return the steps after the look, in order."""
    return ["harvest", "lifespans", "distilled", *(["report"] if look.kinds else [])]


def write_configs(layout: Layout, options: Options, look: Look) -> None:
    """Write the config of each step, unless it is there.

    Raises:
        SmartKVError: a config is there with other values.
    """
    for step in steps_of(look):
        command = " ".join(["python", *layout.command(step)])
        header = f"{WHAT[step]}\nMade by `make gates` for {options.backbone}. To run this step by hand:\n  {command}"
        template = (TEMPLATES / f"{step}.yaml").read_text(encoding="utf-8")
        text = fill(template, values(step, layout, options, look), header)
        path = layout.config(step)
        if not path.is_file():
            write_atomically(path, text.encode())
        elif _read(path) != yaml.safe_load(text):
            raise SmartKVError(
                f"{path} holds other values than `make gates` writes for these options: run the step by hand with "
                f"'{command}', delete the file to have it written again, or begin anew with --overwrite"
            )


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SmartKVError(f"{path} cannot be read ({type(error).__name__}): delete it, it is written again") from error


def values(step: str, layout: Layout, options: Options, look: Look) -> dict[str, Any]:
    """Return the values of a step's config, by dotted key."""
    return {"harvest": _harvest, "lifespans": _lifespans, "distilled": _distilled, "report": _report}[step](
        layout, options, look
    )


def _accelerator(look: Look) -> dict[str, Any]:
    return {"trainer.accelerator": "gpu" if look.device == "cuda" else "cpu"}


def _model(options: Options, look: Look) -> dict[str, Any]:
    return {
        "model.init_args.backbone": options.backbone,
        "model.init_args.dtype": options.dtype,
        "model.init_args.threads": look.threads,
        "model.init_args.trust_remote_code": options.trust_remote_code,
    }


def _data(options: Options, look: Look, window: int, windows: tuple[int, int]) -> dict[str, Any]:
    return {
        "data.init_args.backbone": options.backbone,
        "data.init_args.window": window,
        "data.init_args.windows": {"train": windows[0], "validation": windows[1], "test": 0},
        "data.init_args.trust_remote_code": options.trust_remote_code,
        "data.init_args.sources": [part.source for part in look.parts],
    }


def _harvest(layout: Layout, options: Options, look: Look) -> dict[str, Any]:
    amounts = SIZES[options.size].within(look.max_positions)
    return {
        "out": str(layout.out / "shards"),
        **_accelerator(look),
        **_model(options, look),
        "model.init_args.follow_up": amounts.follow_up,
        **_data(options, look, amounts.window, amounts.harvest),
        "data.init_args.seed": options.seed,
    }


def _lifespans(layout: Layout, options: Options, look: Look) -> dict[str, Any]:
    return {
        "seed_everything": options.seed,
        "out": str(layout.out / "lifespans"),
        **_accelerator(look),
        "trainer.max_epochs": SIZES[options.size].epochs,
        "data.init_args.shards": str(layout.out / "shards"),
    }


def _distilled(layout: Layout, options: Options, look: Look) -> dict[str, Any]:
    amounts = SIZES[options.size].within(look.max_positions)
    return {
        "out": str(layout.out / "distilled"),
        **_accelerator(look),
        "trainer.val_check_interval": max(1, amounts.distilled[0] // VALIDATIONS),
        **_model(options, look),
        "model.init_args.gates": str(layout.out / "lifespans" / "export"),
        "model.init_args.scored_tokens": look.scored_tokens,
        "model.init_args.calibration_windows": amounts.calibration,
        **_data(options, look, amounts.short_window, amounts.distilled),
        "data.init_args.seed": options.seed + 1,  # other windows than the harvest's
    }


def asked_in(look: Look) -> dict[str, Kind]:
    """Return the kinds of text in which the report asks for facts, by what `eval compare` calls them.

    Prose is `books` there; where the report measures neither prose nor code nor chats, it is the first kind.
    """
    prose = next((kind for kind in look.kinds if kind.name in HAYSTACKS), None)
    asked = {"books": prose} if prose else {}
    asked |= {kind.name: kind for kind in look.kinds if kind.name in ("code", "chat")}
    asked = asked or {"books": look.kinds[0]}
    split = next(iter(asked.values())).split
    return {name: kind for name, kind in asked.items() if kind.split == split}


def _report(layout: Layout, options: Options, look: Look) -> dict[str, Any]:
    amounts = SIZES[options.size].within(look.max_positions)
    texts = [{"name": k.name, "split": k.split, "windows": amounts.report, "sources": k.sources} for k in look.kinds]
    asked = asked_in(look)
    prose = asked.get("books", next(iter(asked.values())))
    room = max(1, amounts.window - 148)  # the rest is for a fact, its question and its answer
    return {
        "out": str(layout.out / "report"),
        "gates": str(layout.gates),
        "texts": texts,
        "recall.trials": amounts.facts,
        "recall.tokens": room,
        "recall.split": prose.split,
        "recall.kinds": list(asked),
        "recall.haystack": prose.sources,
        **{f"recall.{name}_haystack": asked[name].sources for name in ("code", "chat") if name in asked},
        "calibration.sources": [part.source for part in look.parts],
        "calibration.windows": amounts.calibration,
        "measure.window": amounts.window,
        "measure.score_from": amounts.window // 4,
        "measure.seed": options.seed,
        "model.backbone": options.backbone,
        "model.dtype": options.dtype,
        "model.device": look.device,
        "model.trust_remote_code": options.trust_remote_code,
    }
