"""A training step of LoRA on CPU beside PEFT with transformers, on the same weights, in one run.

    python -m benchmarks.lora_vs_peft [--steps 4] [--repeats 3] [--batch 4] [--length 256]

The shape of a 110M-parameter Llama with random weights, float32, rank 16 on queries and values,
AdamW with clipping, full rows without padding. Each side is a process of its own, so that its peak
memory is its own; processes take turns, and their first step, which compiles or allocates, does
not count. Steps are timed from data on the host to the loss on the host, medians are reported.
Both must find the same loss in the first step. The last line is JSON.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.shape import CONFIG

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).parents[1]
RANK, ALPHA, RATE, CLIP = 16, 32.0, 2e-4, 1.0
SIDES = "llama_jax", "peft"


def batches(batch: int, length: int):
    """Random tokens, the same on both sides: [batch, length + 1]."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(3, CONFIG.vocab_size, (batch, length + 1))


def write_models(folder: Path) -> None:
    """The same random weights as a model directory and for transformers."""
    import jax.numpy as jnp
    import torch
    import transformers

    from convert.names import weights
    from llama_jax.checkpoint import nested, save_model

    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(**CONFIG.to_hf("float32"))
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "peft")
    tensors = model.state_dict()
    params = nested({w.path: jnp.asarray(tensors[w.hf].numpy()) for w in weights(CONFIG)})
    save_model(folder / "llama_jax", CONFIG, params, tokenizer=None, provenance={})


def our_steps(folder: Path, batch: int, length: int):
    """Losses, a step each."""
    import jax
    import jax.numpy as jnp

    from llama_jax import lora
    from llama_jax.checkpoint import load_params
    from train.losses import next_token
    from train.optimizer import OptimizerConfig, make_optimizer
    from train.step import init_state, make_step

    adapters = lora.LoraConfig(rank=RANK, alpha=ALPHA)
    params = lora.add(load_params(folder / "llama_jax"), adapters, jax.random.key(0))
    trained, frozen = lora.split(params)
    config = OptimizerConfig(learning_rate=RATE, schedule="constant", clip=CLIP)
    optimizer = make_optimizer(config, 1, lora.is_adapter)
    state = init_state(trained, optimizer, jnp.float32)
    step = jax.jit(make_step(next_token(CONFIG), optimizer, dtype=jnp.float32), donate_argnums=0)
    ones = np.ones((1, batch, length), np.int32)
    for rows in batches(batch, length):
        window = {"tokens": rows[None, :, :-1], "targets": rows[None, :, 1:], "segments": ones}
        window = {name: x.astype(np.int32) for name, x in window.items()}
        state, metrics = step(state, frozen, window | {"weights": ones.astype(np.float32)})
        yield float(metrics["loss"])


def their_steps(folder: Path, batch: int, length: int):
    """The same of PEFT."""
    import peft
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "peft", dtype=torch.float32)
    targets = ["q_proj", "v_proj"]
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    ).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0)
    for rows in batches(batch, length):
        ids = torch.from_numpy(rows[:, :-1])
        logits = model(ids, use_cache=False).logits
        target = torch.from_numpy(rows[:, 1:])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def measure(side: str, folder: Path, steps: int, batch: int, length: int) -> dict:
    """In this process: seconds of each step but the first, the losses, and peak memory."""
    run = {"llama_jax": our_steps, "peft": their_steps}[side](folder, batch, length)
    losses, seconds = [next(run)], []
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(next(run))
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "losses": losses, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.folder, args.steps, args.batch, args.length)))
        return
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        write_models(Path(scratch))
        for _ in range(args.repeats):
            for side in SIDES:
                command = [sys.executable, "-m", "benchmarks.lora_vs_peft", "--side", side]
                command += ["--folder", scratch, "--steps", str(args.steps)]
                command += ["--batch", str(args.batch), "--length", str(args.length)]
                done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    first = [runs[side][0]["losses"][0] for side in SIDES]
    np.testing.assert_allclose(first[0], first[1], rtol=1e-4)
    result = {}
    for side in SIDES:
        seconds = statistics.median(s for run in runs[side] for s in run["seconds"])
        result[side] = {
            "step_s": seconds,
            "tokens_per_s": args.batch * args.length / seconds,
            "peak_gb": statistics.median(run["peak_bytes"] for run in runs[side]) / 1e9,
        }
    ours, theirs = (result[side] for side in SIDES)
    print(
        f"\n110M, float32, rank {RANK} on q and v, {args.batch} x {args.length}, {os.cpu_count()} cores"
    )
    print("\n| | s/step | tokens/s | peak memory |\n|---|---|---|---|")
    for side, values in result.items():
        print(
            f"| {side} | {values['step_s']:.2f} | {values['tokens_per_s']:.0f} | "
            f"{values['peak_gb']:.2f} GB |"
        )
    result["ratio"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
    print(f"\n{result['ratio']:.2f} times as fast")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
