"""python -m train.plan: does training fit on some chips, and how fast can it at best be there.

The real training step is compiled for the chips as `infer.plan` compiles those of inference, and
counted the same way. Layers are stacked, as `--scan` of the training commands does, unless
`--unrolled` is given: compiling then takes the time of all layers. Byte figures are those of one
device. Operations are those of matrix products; XLA counts none in an attention kernel.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from infer import topology
from infer.plan import (
    Compiled,
    account,
    add_case,
    answer,
    check_case,
    compile_program,
    describe_collectives,
    describe_estimate,
    describe_memory,
    describe_weights,
    make_mesh,
    make_quantization,
    plural,
    program_figures,
    quantization_fields,
    too_large,
)
from infer.topology import SLICES, Chip, Slice
from llama_jax import checkpoint, lora, sharding
from llama_jax.checkpoint import format_bytes
from llama_jax.command import FLAGS, ArgumentParser, report, run
from llama_jax.config import LlamaConfig
from llama_jax.errors import UserError
from llama_jax.lora import LoraConfig
from llama_jax.model import REMAT, Params, stack
from llama_jax.quant import Quantization
from train.data import BATCH
from train.flags import flops_per_token
from train.losses import next_token
from train.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from train.placement import batch_sharding, lower_step, refuse_batch, state_shardings
from train.step import State, init_state, make_step

PROG = "train.plan"
STEPS = 1000  # of the schedule, which costs nothing
MEMORY = ("weights", "adapters", "optimizer", "batch", "temporaries", "other")


@dataclass(frozen=True)
class Request:
    """What is planned: everything that decides about the program."""

    model: str
    config: LlamaConfig
    chips: Slice
    mesh: str
    adapters: LoraConfig | None  # None where all parameters learn
    quantization: Quantization | None
    optimizer: str
    dtype: str
    remat: str
    batch: int  # rows of a micro-batch, over all chips
    seq_len: int
    accumulate: int
    unrolled: bool = False

    @property
    def tokens(self) -> int:
        """Positions of a step."""
        return self.accumulate * self.batch * self.seq_len

    @property
    def learns(self) -> Callable[[tuple], bool]:
        """Whether the leaf of a path does."""
        return lora.everything if self.adapters is None else lora.is_adapter

    @property
    def rule(self) -> optax.GradientTransformation:
        """By which it does."""
        return make_optimizer(OptimizerConfig(self.optimizer), STEPS, self.learns)


@dataclass(frozen=True)
class Arrays:
    """What a step takes: abstract, on the devices of a mesh."""

    mesh: Mesh
    state: State
    frozen: Params
    window: dict[str, jax.ShapeDtypeStruct]

    @functools.cached_property
    def bytes(self) -> dict[str, int]:
        """On a device, by kind."""
        trained, frozen = self.state.trained, self.frozen
        adapters = lora.split(trained)[0]
        return {
            "weights": sharding.device_bytes((frozen, lora.split(trained)[1])),
            "adapters": sharding.device_bytes(adapters),
            "optimizer": sharding.device_bytes(self.state.replace(trained=None)),
            "batch": sharding.device_bytes(self.window),
        }


def make_arrays(request: Request) -> Arrays:
    """Raises `UserError` for a mesh that does not match the chips, the model or the batch."""
    config, dtype = request.config, jnp.dtype(request.dtype)
    mesh = make_mesh(request.mesh, config, request.chips)
    refuse_batch(request.batch, mesh)
    stored = jnp.float32 if request.adapters is None else dtype  # what learns is float32
    params = checkpoint.abstract(config, request.quantization, stored)
    if request.adapters is not None:
        add = functools.partial(lora.add, config=request.adapters, key=jax.random.key(0))
        params = jax.eval_shape(add, params)
    if not request.unrolled:
        params = jax.eval_shape(stack, params)
    params = sharding.placed(params, sharding.shardings(params, mesh))
    trained, frozen = lora.split(params, request.learns)
    state = jax.eval_shape(lambda p: init_state(p, request.rule, dtype), trained)
    shape = request.accumulate, request.batch, request.seq_len
    place = batch_sharding(len(shape), mesh)
    return Arrays(
        mesh,
        state=sharding.placed(state, state_shardings(state, trained, mesh)),
        frozen=frozen,
        window={n: jax.ShapeDtypeStruct(shape, d, sharding=place) for n, d in BATCH.items()},
    )


def lower(request: Request, arrays: Arrays) -> Any:
    """The training step, traced for the chips."""
    loss = next_token(request.config, remat=request.remat)
    step = make_step(loss, request.rule, dtype=jnp.dtype(request.dtype))
    return lower_step(step, arrays.state, arrays.frozen, arrays.window, arrays.mesh)


def compile_step(request: Request, arrays: Arrays) -> tuple[Compiled | None, str | None]:
    """The step; None and why where memory is too small."""
    report(f"{PROG}: tracing {request.model} for {request.chips.name} ({request.chips.topology})")
    with topology.quiet():
        lowered = lower(request, arrays)
        try:
            return compile_program(lowered, "the training step", PROG), None
        except jax.errors.JaxRuntimeError as error:
            return None, too_large(error)


# The plan


def plan(request: Request) -> dict[str, Any]:
    """What `--json` prints. Compiles only where weights and optimizer leave room.

    Figures that only a compiled program has are None without one.
    """
    arrays = make_arrays(request)
    room, program = request.chips.chip.memory, None
    memory, reason = account(room, arrays.bytes, "weights, optimizer and batch alone take")
    if reason is None:
        program, reason = compile_step(request, arrays)
    if program:
        memory, reason = account(room, arrays.bytes, "the step takes", [program])
    adapters, learning = request.adapters, jax.tree.leaves(arrays.state.trained)
    return {
        "fits": reason is None,
        "reason": reason,
        "model": request.model,
        "method": "full" if adapters is None else "lora",
        "chips": request.chips.name,
        "mesh": ",".join(f"{name}={n}" for name, n in arrays.mesh.shape.items() if n > 1),
        **quantization_fields(request.quantization),
        "rank": adapters and adapters.rank,
        "targets": adapters and ",".join(adapters.targets),
        "parameters_that_learn": sum(x.size for x in learning),
        "optimizer": request.optimizer,
        "dtype": request.dtype,
        "remat": request.remat,
        "batch": request.batch,
        "seq_len": request.seq_len,
        "accumulate": request.accumulate,
        "memory": memory,
        "step": _figures(request, program, sum(x.size for x in learning)),
    }


def _figures(request: Request, program: Compiled | None, learning: int) -> dict[str, Any]:
    """What is told of a step; operations a token are those of all chips together."""
    chip, adapters = request.chips.chip, None if request.adapters is None else learning
    told = {
        "tokens": request.tokens,
        "necessary_flops_per_token": flops_per_token(request.config, request.seq_len, adapters),
        **program_figures(program, chip),
    }
    if program is None:
        others = ("flops_per_token", "roofline_s", "bound", "roofline_tokens_per_s")
        return told | dict.fromkeys(others)
    bounds = {
        "compute": program.cost.flops / chip.bf16_flops,
        "memory": program.cost.hbm_bytes / chip.bandwidth,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return told | {
        "flops_per_token": program.cost.flops * request.chips.count / request.tokens,
        "roofline_s": bounds[bound],
        "bound": bound,
        "roofline_tokens_per_s": request.tokens / bounds[bound],
    }


# The command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a mistake."""
    parser = ArgumentParser(
        prog=PROG,
        description="Say whether training fits on some chips, and how fast it can at best be there.",
    )
    add = parser.add_argument
    add_case(parser)
    add("--method", choices=("lora", "full"), default="lora", help="what learns (lora)")
    add("--rank", type=int, metavar="N", help="of the adapters (16)")
    add("--targets", metavar="NAMES", help="of q,k,v,o,gate,up,down, or all (q,v)")
    add("--mesh", **dict(FLAGS["--mesh"], help="data=2,fsdp=4,tensor=2 (fsdp takes all chips)"))
    add("--batch", type=int, metavar="N", help="rows at once, over all chips (one a chip)")
    add("--seq-len", type=int, default=2048, metavar="N", help="tokens of a row (2048)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches to a step (1)")
    add("--remat", choices=tuple(REMAT), default="full", help="compute again, for memory (full)")
    add("--dtype", **dict(FLAGS["--dtype"], default="bfloat16", help="(bfloat16)"))
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(adamw)")
    add("--unrolled", action="store_true", help="layers one by one; compiles for long")
    args = parser.parse_args(arguments)
    check_case(parser, args)
    parser.refuse_below(args, batch=1, seq_len=2, accumulate=1, rank=1)
    if args.method == "full":
        for flag, given in (
            ("--rank", args.rank),
            ("--targets", args.targets),
            ("--quantize", args.quantize != "none"),
        ):
            if given:
                parser.error(f"{flag} is for --method lora: quantized weights do not learn")
    return args


def make_request(args: argparse.Namespace, config: LlamaConfig, chips: Slice) -> Request:
    """Raises `UserError` where the model has not so much context, or an adapter is none."""
    if args.seq_len > config.context:
        raise UserError(
            f"--seq-len is {args.seq_len}, expected at most {config.context}, the model's context"
        )
    adapters = None
    if args.method == "lora":
        rank, targets = args.rank or LoraConfig.rank, args.targets or ",".join(LoraConfig.targets)
        adapters = LoraConfig.of(targets, rank=rank, alpha=2.0 * rank)
    quantization = make_quantization(args)
    if quantization is not None and adapters is None:
        raise UserError(f"{args.checkpoint} is quantized, and quantized weights do not learn")
    return Request(
        model=args.preset or args.checkpoint,
        config=config,
        chips=chips,
        mesh=f"fsdp={chips.count}" if args.mesh is None else args.mesh,
        adapters=adapters,
        quantization=quantization,
        optimizer=args.optimizer,
        dtype=args.dtype,
        remat=args.remat,
        batch=chips.count if args.batch is None else args.batch,
        seq_len=args.seq_len,
        accumulate=args.accumulate,
        unrolled=args.unrolled,
    )


def describe(result: dict[str, Any]) -> str:
    """A plan for a person to read."""
    part = SLICES[result["chips"]]
    what = "all parameters"
    if result["method"] == "lora":
        what = f"LoRA of rank {result['rank']} on {result['targets']}"
    micro = f"{result['accumulate']} x " if result["accumulate"] > 1 else ""
    on = f", {result['mesh']}" if result["mesh"] else ""
    return "\n".join(
        [
            f"{result['model']}, {describe_weights(result)}{result['dtype']}, {what} "
            f"({result['parameters_that_learn']:,} parameters), {result['optimizer']}, "
            f"{micro}{result['batch']} x {result['seq_len']} tokens, remat {result['remat']}, "
            f"on {part.name}: {plural(part.count, 'chip')}{on}",
            *describe_memory(result, MEMORY),
            *_describe_step(result["step"], part.chip),
        ]
    )


def _describe_step(step: dict[str, Any], chip: Chip) -> list[str]:
    necessary = step["necessary_flops_per_token"]
    lines = [f"a step of {step['tokens']:,} tokens"]
    if step["flops"] is None:
        return [*lines, f"  {necessary / 1e9:,.1f} GFLOP a token are necessary"]
    limit = {
        "compute": f"{chip.bf16_flops / 1e12:,.0f} TFLOP/s",
        "memory": f"{chip.bandwidth / 1e9:,.0f} GB/s",
    }[step["bound"]]
    return [
        *lines,
        f"  {step['flops_per_token'] / 1e9:,.1f} GFLOP a token without attention, where "
        f"{necessary / 1e9:,.1f} with it are necessary",
        f"  {format_bytes(step['hbm_bytes'])} a chip to and from memory",
        f"  at best {step['roofline_tokens_per_s']:,.0f} tokens/s ({step['roofline_s'] * 1e3:,.1f} "
        f"ms), bound by {step['bound']}: {limit}",
        describe_collectives(step["collectives"]),
        *describe_estimate(step, chip),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; raises `UserError` for what the user can mend."""
    args = parse(arguments)
    answer(args, lambda config, part: plan(make_request(args, config, part)), describe, PROG)


if __name__ == "__main__":
    run(main, PROG)
