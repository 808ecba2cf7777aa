"""SmartKV on the Lightning CLI.

python main.py predict -c configs/harvest/smollm2.yaml   # text -> shards of keys and lifespans
python main.py fit     -c configs/gates/smollm2.yaml     # shards -> gates
"""

import logging
import os
import sys
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # blocks are memory-mapped: none needed
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message=".*infer the batch indices.*")  # a shard carries its own place
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())

import lightning as L  # noqa: E402
from lightning.pytorch.cli import LightningCLI  # noqa: E402

import callbacks  # noqa: F401, E402 - these three are imported so that configs name classes without their module
import datamodules  # noqa: F401, E402
import lightning_modules  # noqa: F401, E402
from smartkv.errors import SmartKVError  # noqa: E402


def main(args: list[str] | None = None) -> None:
    """Run one subcommand; `args` default to the command line.

    A user's mistake ends with one line on stderr and status 2.
    """
    try:
        LightningCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            args=args,
        )
    except SmartKVError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
