"""Other spellings of commands: `baselines` with dashes, a flag and a list of words; `presses` for a comparison."""

import json
from pathlib import Path

PRESSES = Path(__file__).parents[2] / "configs" / "eval" / "presses.yaml"
COMMAND = "baselines"
FLAG = "--memory-only"
LIST = "--baselines"


def expand_aliases(args: list[str]) -> list[str]:
    """`presses …` as `compare` with its config; `baselines --baselines FP16 INT8 --num-prompts 4 --memory-only` as the
    other commands have it. What is of no such command, or spelled so already, is left as it is."""
    if args and args[0] == "presses":
        return ["compare", "--config", str(PRESSES), *args[1:]]
    if not args or args[0] != COMMAND:
        return args
    found, rest = [COMMAND], list(args[1:])
    while rest:
        name, mark, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            found.append(name + mark + value)
            continue
        words = [value] if mark else []
        while not mark and rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        if name in (FLAG, FLAG.replace("-only", "_only")) and not words:
            words = ["true"]
        if name == LIST and not (len(words) == 1 and words[0].startswith("[")):
            words = [json.dumps(words)]
        found += ["--" + name[2:].replace("-", "_"), *words]
    return found
