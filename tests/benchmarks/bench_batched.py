"""Train many adapters in one pass, against one by one and against `transformers.Trainer` with peft.

`python -m tests.benchmarks.bench_batched [--base shipped | --shape 1.2b] [--quick] [--out figures.json]`: a base of this
project (on a CPU: `shipped` and `smollm2`), or random weights in the shape of a Llama, made on the device. Every adapter
has a micro-batch of its own of at most 512 tokens. `together` is `train_together`, `one by one` the learner's `train`;
both start from weights on the host and return the new ones there. Trainer's time is that of `Trainer.train()` alone.
The last line is JSON; the exit code is 1 where a goal was missed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from perennial.learner.costs.operations import WeightCounts, training_flops
from perennial.learner.model.base import Base, load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.loss import OutOfMemoryError, is_out_of_memory
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.together.train_together import AdapterJob, train_together
from perennial.learner.training.trainer import TrainConfig, TrainResult, train

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 1024, "tie_word_embeddings": True},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1.2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
"""Llama shapes: SmolLM2-135M, Llama 3.2 1B, Llama 3.1 8B, and one for trying the benchmark."""
RANK = {"shipped": 8}
DEFAULT_RANK = 16
STEPS, ROWS, ROW_TOKENS = 3, 2, 256
"""A micro-batch: so many steps of so many rows of up to so many tokens."""
ALONE = 4
"""Adapters that are trained one by one; their time is taken for the others too."""
SMALL_STEPS, LARGE_STEPS = 4, 2
GOALS = {
    "cuda 135m": {"vs_trainer": 5.0, "vs_trainer_large": 1.8},
    "cuda 1.2b": {"together_16": 40.0, "vs_trainer": 5.0, "vs_trainer_large": 1.8},
    "cuda 8b": {"together_16": 20.0, "vs_trainer": 5.0, "vs_trainer_large": 1.8, "peak_share": 0.5},
    "cpu shipped": {"together_16": 1.2, "vs_trainer": 2.0},
    "cpu smollm2": {"together_16": 1.0, "vs_trainer": 2.0},
}
MOST_GB = {"cuda 8b": 60.0}


@dataclass
class Bench:
    """A base with what is measured on it."""

    name: str
    lora: Lora
    texts: Callable[[int, int, int], list[TokenRow]]
    quick: bool
    profile: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device(self.lora.base.device)

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(1e-3, 1.0, 0)

    def rows(self, count: int, most_tokens: int, seed: int) -> list[TokenRow]:
        """Return ragged rows."""
        return self.texts(count, most_tokens, seed)

    def jobs(self, count: int) -> list[AdapterJob]:
        tokens, steps = (48, 2) if self.quick else (ROW_TOKENS, STEPS)
        weights = [self.lora.initial_weights(f"bench/{index}", 0) for index in range(2)]  # making more takes long
        return [
            AdapterJob(
                weights[index % 2], None,
                [self.rows(ROWS, tokens, 1000 * index + step) for step in range(steps)], self.config,
            )
            for index in range(count)
        ]  # fmt: skip

    def timed(self, work: Callable[[], Any], repeat: int = 1) -> tuple[float, Any]:
        """Return the least seconds of some runs, and the result of the last."""
        seconds = []
        for _ in range(repeat):
            result = None  # results are kept in pinned memory, which takes long to make
            self.wait()
            began = time.perf_counter()
            result = work()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return min(seconds), result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def made_bench(base_name: str | None, shape: str | None, device: str, *, quick: bool) -> Bench:
    """Load or make the base."""
    name = shape or base_name or "shipped"
    base = _random_base(name, torch.device(device)) if shape else load_base(name, device)
    lora = Lora(base, LoraConfig(RANK.get(name, DEFAULT_RANK), 2 * RANK.get(name, DEFAULT_RANK)))
    return Bench(name, lora, _random_rows(base) if shape else _document_rows(base), quick)


def _random_base(shape: str, device: torch.device) -> Base:
    stored = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    torch.set_default_dtype(stored)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False).eval()
    return Base(model, None, shape, f"sha256:{shape:0>64}", device, stored, 8192)  # type: ignore[arg-type]


def _random_rows(base: Base) -> Callable[[int, int, int], list[TokenRow]]:
    words = base.model.config.vocab_size

    def rows(count: int, most_tokens: int, seed: int) -> list[TokenRow]:
        rng = random.Random(seed)
        return [
            TokenRow(tuple(rng.randrange(words) for _ in range(rng.randint(most_tokens // 16, most_tokens))))
            for _ in range(count)
        ]

    return rows


def _document_rows(base: Base) -> Callable[[int, int, int], list[TokenRow]]:
    from perennial.learner.model.general_text import general_texts

    texts, codec = general_texts("train"), ExampleTokenizer(base.tokenizer)

    def rows(count: int, most_tokens: int, seed: int) -> list[TokenRow]:
        return [text_rows(text, codec, most_tokens)[0] for text in random.Random(seed).sample(texts, count)]

    return rows


def matmul_flops(bench: Bench) -> float:
    """Return the measured rate of products of two large matrices in the number format of training, FLOP/s."""
    on_cuda = bench.device.type == "cuda"
    size, times = (8192, 10) if on_cuda else (2048, 3)
    dtype = torch.bfloat16 if on_cuda else (bench.lora.compute_dtype or torch.float32)
    a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
    seconds, _ = bench.timed(lambda: [a @ b for _ in range(times)], 3)
    return 2 * size**3 * times / seconds


def update_flops(bench: Bench, rows: Sequence[TokenRow]) -> float:
    """Return the operations of one step: forward and backward through the frozen products and the LoRA.

    Attention and everything computed twice are left out. The frozen weights need no gradient: 4 operations per weight.
    """
    return training_flops(WeightCounts.of(bench.lora), rows)


def one_by_one(bench: Bench, jobs: Sequence[AdapterJob]) -> list[TrainResult]:
    """Train as the learner did before: each adapter alone."""
    return [train(bench.lora, job.weights, job.optimizer, job.schedule, job.config) for job in jobs]


def together(bench: Bench, jobs: Sequence[AdapterJob], *, graphs: bool = True) -> list[TrainResult]:
    return train_together(bench.lora, jobs, graphs=graphs)


def service_seconds(bench: Bench, jobs: Sequence[AdapterJob], together: int, updates: int) -> float:
    """Return the seconds per adapter of updates that the threads of a learner make one behind the other.

    There are more adapters than share a pass, as in a learner under load: while some train, the results of others go to
    the host. An adapter's next update starts from its result; what is still on the device is used.
    """
    passes = GatheredPasses(most_adapters=together, wait_s=1.0)
    ready = threading.Barrier(len(jobs) + 1)
    errors: list[BaseException] = []

    def work(job: AdapterJob) -> None:
        weights, optimizer = job.weights, job.optimizer
        try:
            with passes.joining():  # as an update does, until it ends: rounds wait for it
                for update in range(updates + 2):
                    if update in {0, 2}:  # the first two are not timed: the second pass of a size is captured
                        ready.wait()
                    result = passes.train(bench.lora, weights, optimizer, job.schedule, job.config, None, lambda: None)
                    weights, optimizer = result.weights, result.optimizer
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread of the benchmark
            errors.append(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        ready.wait()
        ready.wait()
        began = time.perf_counter()
    except threading.BrokenBarrierError:
        began = float("nan")
    for thread in threads:
        thread.join()
    bench.wait()
    took = time.perf_counter() - began
    if errors:
        raise errors[0]
    return took / updates / len(jobs)


def step_seconds(bench: Bench, jobs: Sequence[AdapterJob]) -> list[float]:
    """Return the seconds until the first step is done, which holds the loading of the weights, and those of the others."""
    times = [time.perf_counter()]

    def stop() -> None:
        bench.wait()
        times.append(time.perf_counter())

    train_together(bench.lora, jobs, on_step=stop)
    stop()  # the last entry: copying the results to the host
    return [after - before for before, after in itertools.pairwise(times)]


def kernels(bench: Bench, jobs: Sequence[AdapterJob], most: int = 30) -> list[str]:
    """Return what the device spends its time with in one pass over the jobs: milliseconds, calls and name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        together(bench, jobs)
        bench.wait()
    on_device = [event for event in profiled.key_averages() if str(event.device_type).endswith("CUDA")]
    ordered = sorted(on_device, key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in on_device)
    return [f"{total / 1e3:.2f} in all"] + [
        f"{event.self_device_time_total / 1e3:.2f} {event.count} {event.key[:100]}" for event in ordered[:most]
    ]


def relative_difference(
    jobs: Sequence[AdapterJob], some: Sequence[TrainResult], others: Sequence[TrainResult]
) -> float:
    """Return the largest difference of an adapter's change from the other one, as a share of the change."""
    worst = 0.0
    for job, one, other in zip(jobs, some, others, strict=True):
        apart = sum(float((one.weights[name] - other.weights[name]).double().square().sum()) for name in one.weights)
        change = sum(float((other.weights[name] - job.weights[name]).double().square().sum()) for name in one.weights)
        worst = max(worst, (apart / change) ** 0.5)
    return worst


def equal_bits(some: Sequence[TrainResult], others: Sequence[TrainResult]) -> bool:
    """Return True if all new weights are equal, bit for bit."""
    return all(
        torch.equal(one.weights[name], other.weights[name])
        for one, other in zip(some, others, strict=True) for name in one.weights
    )  # fmt: skip


class _Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self._rows[index]
        return {"input_ids": list(row.ids), "labels": [-100] * row.train_from + list(row.ids[row.train_from :])}


def _collate(items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(item["input_ids"]) for item in items)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([item[name] + [filler] * (width - len(item[name])) for item in items])

    mask = torch.tensor([[1] * len(item["input_ids"]) + [0] * (width - len(item["input_ids"])) for item in items])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def trainer_seconds(bench: Bench, rows: Sequence[TokenRow], steps: int) -> tuple[float, str]:
    """Return the seconds of `Trainer.train()` over the rows, and the batch that fitted the memory."""
    for parts in (1, 2, 4, 16):
        if len(rows) % parts:
            continue
        try:
            return _trainer_seconds(bench, rows, steps, parts), f"{len(rows) // parts} x {parts}"
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()
        torch.cuda.empty_cache()
    return float("nan"), "out of memory"


def _trainer_seconds(bench: Bench, rows: Sequence[TokenRow], steps: int, parts: int) -> float:
    lora, model = bench.lora, bench.lora.model
    lora.load(lora.initial_weights("bench/trainer", 0))
    lora.select()
    folder = tempfile.mkdtemp(prefix="bench-batched-")
    on_cuda = bench.device.type == "cuda"

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=len(rows) // parts, gradient_accumulation_steps=parts,
            max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=1.0, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not on_cuda, optim="adamw_torch_fused",
            bf16=on_cuda or lora.compute_dtype == torch.bfloat16, dataloader_pin_memory=on_cuda, remove_unused_columns=False,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=_Rows(rows), data_collator=_collate)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(1).train()  # warm
            made = trainer(steps)
            seconds, _ = bench.timed(made.train)
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
        model.__dict__.pop("forward", None)  # accelerate wraps it for mixed precision
        shutil.rmtree(folder, ignore_errors=True)
    return seconds


def measure_many(bench: Bench, counts: Sequence[int], figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure adapters together against one by one."""
    jobs = bench.jobs(max(counts))
    alone = min(ALONE, len(jobs))
    one_by_one(bench, jobs[:1])
    seconds, singles = bench.timed(lambda: one_by_one(bench, jobs[:alone]))
    per_adapter = seconds / alone
    figures["one_by_one_s_per_adapter"] = per_adapter
    for count in counts:
        some = jobs[:count]
        try:
            for _ in range(2 if bench.device.type == "cuda" else 1):  # the second pass of a size is captured
                together(bench, some)
            took, results = bench.timed(lambda some=some: together(bench, some), 2 if count < 64 else 1)
        except OutOfMemoryError as error:
            figures[f"together_{count}_error"] = str(error)
            continue
        figures[f"together_{count}_s"] = took
        figures[f"together_{count}"] = per_adapter * count / took
        log(bench, f"{count} adapters together: {took:.3f} s, {per_adapter * count / took:.1f} times one by one")
        if count in {16, max(counts)}:
            own = [together(bench, [job])[0] for job in jobs[:alone]]
            figures["max_rel_diff_alone"] = relative_difference(jobs[:alone], results[:alone], own)
            figures["max_rel_diff_train"] = relative_difference(jobs[:alone], results[:alone], singles)
        figures[f"steps_{count}_s"] = step_seconds(bench, some)
        if count == min(16, max(counts)):
            del results
            took = service_seconds(bench, bench.jobs(2 * count), count, 4)
            figures["service_s_per_adapter"], figures["service"] = took, per_adapter / took
            log(
                bench, f"{2 * count} adapters in a learner, {count} together: {per_adapter / took:.1f} times one by one"
            )
            results = together(bench, some)
        if count == min(16, max(counts)):
            figures[f"again_equal_{count}"] = equal_bits(results, together(bench, some))
            took, eager = bench.timed(lambda some=some: together(bench, some, graphs=False), 2)
            figures[f"eager_{count}_s"], figures[f"eager_equal_{count}"] = took, equal_bits(results, eager)
            reset_memory(bench)
        figures["real_tokens_per_step_16"] = sum(len(row.ids) for job in jobs[:16] for row in job.schedule[0])
        save()
        if bench.profile and count == min(16, max(counts)):
            figures[f"kernels_{count}"] = kernels(bench, some)
        del results


def measure_update(bench: Bench, count: int, most_tokens: int, steps: int, flops: float) -> dict[str, Any]:
    """Measure one adapter's update on ragged rows: this package, the learner's `train`, Trainer."""
    rows = bench.rows(count, most_tokens, 7)
    job = AdapterJob(bench.lora.initial_weights("bench/one", 0), None, [rows] * steps, bench.config)
    reset_memory(bench)
    together(bench, [job])
    ours, _ = bench.timed(lambda: together(bench, [job]), 2)
    memory = memory_gb(bench)
    figures: dict[str, Any] = {
        "tokens": sum(len(row.ids) for row in rows), "steps": steps, "s": ours, "peak_gb": memory,
        "peak_share": steps * update_flops(bench, rows) / ours / flops,
    }  # fmt: skip
    eager = replace(job, schedule=[rows])
    figures["eager_step_s"], _ = bench.timed(lambda: together(bench, [eager], graphs=False), 2)
    try:
        figures["train_s"], _ = bench.timed(lambda: one_by_one(bench, [job]))
    except OutOfMemoryError as error:
        figures["train_error"] = str(error)
    figures["trainer_s"], figures["trainer_batch"] = trainer_seconds(bench, rows, steps)
    figures["vs_trainer"] = figures["trainer_s"] / ours
    log(bench, f"{count} x <={most_tokens}: {ours:.3f} s, Trainer {figures['trainer_s']:.3f} s")
    return figures


def measure_full(bench: Bench, flops: float) -> dict[str, Any]:
    """Measure an update of full rows: the share of the peak, and the memory."""
    count, width = (4, 64) if bench.quick else (16, 1024) if bench.device.type == "cuda" else (8, 256)
    rng = random.Random(3)
    words = bench.lora.model.get_input_embeddings().weight.shape[0]
    rows = [TokenRow(tuple(rng.randrange(words) for _ in range(width))) for _ in range(count)]
    job = AdapterJob(bench.lora.initial_weights("bench/full", 0), None, [rows] * LARGE_STEPS, bench.config)
    reset_memory(bench)
    together(bench, [job])
    seconds, _ = bench.timed(lambda: together(bench, [job]), 2)
    share = LARGE_STEPS * update_flops(bench, rows) / seconds / flops
    log(
        bench, f"{count} x {width} full: {LARGE_STEPS * count * width / seconds:,.0f} tokens/s, {share:.1%} of the peak"
    )
    profiled = {"kernels": kernels(bench, [job])} if bench.profile else {}
    return profiled | {
        "tokens_per_s": LARGE_STEPS * count * width / seconds, "s": seconds, "peak_share": share,
        "peak_gb": memory_gb(bench),
    }  # fmt: skip


def reset_memory(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        for shared in bench.lora.model.__dict__.get("_shared_passes", {}).values():
            shared.release()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_gb(bench: Bench) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else None


def log(bench: Bench, text: str) -> None:
    print(f"{bench.name} on {bench.device}: {text}", flush=True)


def run(bench: Bench, counts: Sequence[int], out: Path | None) -> dict[str, Any]:
    """Measure everything on one base, and write the summary after each part: time on a lent machine may end before.

    Returns:
        The summary, with all figures under `figures`.
    """
    flops = matmul_flops(bench)
    log(bench, f"matrix products: {flops / 1e12:.3g} TFLOP/s")
    parts: dict[str, dict[str, Any]] = {"many": {}, "full": {}, "small": {}, "large": {}}

    def save() -> None:
        if out:
            out.write_text(json.dumps(rounded(summary_of(bench, flops, parts)), indent=1) + "\n")

    def large() -> dict[str, Any]:
        if bench.device.type != "cuda" or bench.quick:
            return {}
        return measure_update(bench, 16, 1024, LARGE_STEPS, flops)

    for name, measure in (
        ("many", lambda: measure_many(bench, counts, parts["many"], save)),
        ("small", lambda: measure_update(bench, 12, 32 if bench.quick else 128, SMALL_STEPS, flops)),
        ("full", lambda: measure_full(bench, flops)),
        ("large", large),
    ):
        parts[name] |= attempt(measure) or {}
        save()
    return rounded(summary_of(bench, flops, parts))  # type: ignore[no-any-return]


def summary_of(bench: Bench, flops: float, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that have goals, and all others under `figures`."""
    many, full, small, large = (parts[name] for name in ("many", "full", "small", "large"))
    kind = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    return {
        "device": kind,
        "base": bench.name,
        "together_16": many.get("together_16"),
        "together_64": many.get("together_64"),
        "service": many.get("service"),
        "vs_trainer": small.get("vs_trainer"),
        "vs_trainer_large": large.get("vs_trainer"),
        "peak_share": full.get("peak_share"),
        "max_rel_diff_alone": many.get("max_rel_diff_alone"),
        "peak_gb": full.get("peak_gb"),
        "matmul_tflops": flops / 1e12,
        "figures": parts,
    }


def attempt(measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return what is measured, or the error: the other figures of a lent machine are not to be lost with it."""
    try:
        return measure()
    except (RuntimeError, OutOfMemoryError) as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def missed(summary: dict[str, Any]) -> list[str]:
    """Return the goals that were missed."""
    where = f"{'cpu' if summary['device'] == 'cpu' else 'cuda'} {summary['base']}"
    found = [
        f"{name} {summary[name]} < {goal}" for name, goal in GOALS.get(where, {}).items()
        if summary[name] is None or not summary[name] >= goal
    ]  # fmt: skip
    if where in MOST_GB and not (summary["peak_gb"] or 1e9) <= MOST_GB[where]:
        found.append(f"peak_gb {summary['peak_gb']} > {MOST_GB[where]}")
    return found


def rounded(value: Any) -> Any:
    """Return the value with its numbers to four digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="shipped, smollm2, or any base that load_base takes")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights in this shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--counts", default="1,4,16,64", help="adapters in one pass")
    parser.add_argument("--quick", action="store_true", help="short rows, for trying the benchmark")
    parser.add_argument("--profile", action="store_true", help="also say what a GPU spends its time with")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args()
    make_deterministic(torch.get_num_threads())
    bench = made_bench(options.base, options.shape, options.device, quick=options.quick)
    bench.profile = options.profile
    summary = run(bench, [int(count) for count in options.counts.split(",")], options.out)
    failures = [] if options.quick else missed(summary)
    for failure in failures:
        print(f"missed: {failure}")
    print(json.dumps({name: value for name, value in summary.items() if name != "figures"}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
