"""Old name of `python main.py fit -c configs/eviction_tuning/base.yaml -c …`: eviction tuning with its old options."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that the script runs from any folder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B", help="hub id, local folder, .gguf file or smollm2-135m")
parser.add_argument("--output_dir", default="runs/eit/trained", help="folder of checkpoints/, final/ and the curves")
parser.add_argument("--num_samples", type=int, default=10_000, help="windows")
parser.add_argument("--max_length", type=int, default=2048, help="tokens per window")
parser.add_argument("--batch_size", type=int, default=1, help="windows per batch")
parser.add_argument("--gradient_accumulation", type=int, default=8, help="batches per optimiser step")
parser.add_argument("--save_steps", type=int, default=500, help="steps between checkpoints")
parser.add_argument("--keep_ratio_start", type=float, default=0.9, help="share of the keys kept at the first step")
parser.add_argument("--keep_ratio_end", type=float, default=0.3, help="share of the keys kept at the last step")
parser.add_argument("--kl_weight", type=float, default=1.0, help="of KL(student ‖ teacher)")
parser.add_argument("--lora_r", type=int, default=64, help="LoRA rank")
parser.add_argument("--learning_rate", type=float, default=2e-4, help="of AdamW")
parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in output_dir")
args, more = parser.parse_known_args()
if min(args.num_samples, args.batch_size, args.gradient_accumulation, args.save_steps) < 1:
    parser.error("num_samples, batch_size, gradient_accumulation and save_steps must be at least 1")

import yaml  # noqa: E402

from main import main  # noqa: E402 - takes seconds, which --help skips

configs = ROOT / "configs" / "eviction_tuning"
base, model_overlay = configs / "base.yaml", configs / "qwen2.5-0.5b.yaml"
batches = max(1, args.num_samples // args.batch_size)
trainer = {
    "max_steps": max(1, batches // args.gradient_accumulation),
    "accumulate_grad_batches": args.gradient_accumulation,
    "val_check_interval": min(batches, args.save_steps * args.gradient_accumulation),
}
model = {
    "backbone": args.model,
    "kl_weight": args.kl_weight,
    "rank": args.lora_r,
    "alpha": 2 * args.lora_r,
    "learning_rate": args.learning_rate,
    "schedule": {"init_args": {"start": args.keep_ratio_start, "end": args.keep_ratio_end}},
}
data = {
    "backbone": args.model,
    "window": args.max_length,
    "batch_size": args.batch_size,
    "windows": {"train": args.num_samples, "validation": max(1, min(32, args.num_samples // 10)), "test": 0},
}
Path(args.output_dir).mkdir(parents=True, exist_ok=True)
options = Path(args.output_dir) / "options.yaml"
run = {"out": args.output_dir, "trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}
options.write_text(yaml.safe_dump(run), encoding="utf-8")
overlays = [argument for path in (base, model_overlay, options) for argument in ("-c", str(path))]
checkpoints = ["--trainer.callbacks.ModelCheckpoint.every_n_train_steps", str(args.save_steps)]
main(["fit", *overlays, *checkpoints, *more, *(["--ckpt_path", "last"] if args.resume else [])])
