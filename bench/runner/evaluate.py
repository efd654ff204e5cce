"""The evaluation job: asks a defense about crafted images, and keeps a row of outcomes for each."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.errors import OvertimeError
from bench.noise import seed_of
from bench.protocols import Decision, Images, Split, answered, distance
from bench.registry import AttackEntry, labels_of
from bench.results.metrics import is_correct
from bench.results.outcomes import BROKEN_SHARE, WATCHED, schema
from bench.results.store import Store
from bench.runner.context import CHUNK, WorkerContext, load
from bench.runner.limits import out_of_memory
from bench.runner.referee import frozen, reseed
from bench.runner.train import fitted
from bench.suite.jobs import Craft, Evaluate
from bench.suite.resolve import Resolved, inner

ASKED_TWICE = 32
"""Number of examples of a shard that are asked a second time, in another order and in other batches."""


ROUNDING = 1e-4
"""Largest difference of logits between both answers at which another label or refusal counts as a tie, as a
share of the range of an example's logits. In another batch sums are computed in another order.
"""


DRIFT = 0.01
"""Largest difference of logits at which the answers count as the same, as a share of the same range."""


def evaluate(
    job: Evaluate, context: WorkerContext, store: Store
) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Ask a defense about the images of several shards, and make a table with a row for each image.

    Args:
        job: The defense, its read-out and the shards.
        context: The surroundings of the job.
        store: The results folder, with the training and the shards.

    Returns:
        The function that writes the table to a path (Parquet, the columns of `bench.results.outcomes`), and
        entries for the receipt.

    Raises:
        RuntimeError: The images of a shard belong to other examples.
    """
    model = fitted(job.victim, context, store)
    most = max(each.stop for each in job.crafts)
    split = load(job.crafts[0].attack_run.data, context, most)
    crafted = (load_file(store.artefact("craft", each.key)) for each in job.crafts)
    columns = answers_to(job, crafted, model, split, torch.device(context.device))
    table = table_of(columns)
    receipts = [store.receipt(each.kind, each.key) or {} for each in job.crafts]
    facts = {
        "examples": table.num_rows,
        # Of a defense that is asked once there is nothing to tell.
        **({} if job.draws == 1 else {"queries_per_example": {"forwards": float(job.draws)}}),
        **killed(table, job.crafts[0].attack_run.attack),
        # Crafted images are not published with a table, but their cost is.
        "crafting": {
            "seconds": round(sum(each.get("seconds", 0.0) for each in receipts), 3),
            "devices": sorted({each["device"] for each in receipts if "device" in each}),
        },
    }
    return lambda path: pq.write_table(table, path, compression="zstd"), facts


def killed(table: pa.Table, attack: Resolved[AttackEntry]) -> dict[str, Any]:
    """Return how many examples an attack broke, for the order of attacks in worst mode.

    Args:
        table: The outcomes.
        attack: The attack.

    Returns:
        ``kills``: how many images were moved and are answered wrongly; of an attack made of attacks also
        ``members``: the kills of each, and its passes, forward and backward, over all examples.
    """
    broken = ~is_correct(table) & (np.asarray(table["distance"]) > 0)
    facts: dict[str, Any] = {"kills": int(broken.sum())}
    if inner(attack):
        found_by = np.asarray(table["found_by"])
        facts["members"] = {
            label: {
                "kills": int((broken & (found_by == place)).sum()),
                "passes": sum(
                    float(np.asarray(table[f"{way}.{label}"]).sum()) for way in ("forwards", "backwards")
                ),
            }
            for place, label in enumerate(labels_of(attack.params["of"]))
        }
    return facts


def answers_to(
    job: Evaluate, crafted: Iterable[Mapping[str, Tensor]], model: Any, split: Split, device: torch.device
) -> list[dict[str, Any]]:
    """Ask a fitted defense about crafted images.

    Args:
        job: The evaluation.
        crafted: What is kept of each of its shards (`bench.runner.craft.attacked`), in their order.
        model: The fitted defense.
        split: The data set of the shards.
        device: The device of the defense.

    Returns:
        The columns of outcomes of each shard.
    """
    with frozen(model, seed=seed_of(job.key)), torch.no_grad():
        return [
            _outcomes(job, craft_job, found, model, split, device)
            for craft_job, found in zip(job.crafts, crafted, strict=True)
        ]


def shown_images(rows: slice, crafted: Mapping[str, Tensor], split: Split) -> Images:
    """Return the images that a defense is shown: those of a shard, moved where the attack moved them.

    Args:
        rows: The positions of the shard in its data set.
        crafted: What is kept of the shard.
        split: The data set.

    Returns:
        Images (N, C, H, W) on the CPU.

    Raises:
        RuntimeError: What is kept is of other examples.
    """
    if not torch.equal(crafted["index"], split.index[rows]):
        raise RuntimeError(f"crafted images are of other examples than {rows}")
    z = split.images[rows].clone()
    z[crafted["moved"]] = crafted["images"]
    return z


def _outcomes(
    job: Evaluate,
    craft_job: Craft,
    crafted: Mapping[str, Tensor],
    model: Any,
    split: Split,
    device: torch.device,
) -> dict[str, Any]:
    rows = slice(craft_job.start, craft_job.stop)
    x, truth, index = split.images[rows], split.labels[rows], split.index[rows]
    z = shown_images(rows, crafted, split)
    wide = x.double(), z.double()
    far = distance(*wide, craft_job.attack_run.threat.norm)
    if job.draws == 1:
        answers, broken = ask(model, z, job.readout, device), {}
    else:
        draws = ask_often(model, z, index, job, device)
        judged = {"truth": truth, "distance": far, "invalid": crafted["invalid"]}
        answers = draws[0]
        broken = {BROKEN_SHARE: np.mean([~is_correct({**each, **judged}) for each in draws], axis=0)}
    target = crafted["target"].tolist()
    return {
        "index": index,
        "target": [None if each < 0 else each for each in target],
        "truth": truth,
        "label": answers["label"],
        "rejected": answers["rejected"],
        "score": answers["score"].float(),
        "logits": _listed(answers.get("logits")),
        "thresholds": _listed(answers.get("thresholds")),
        "l0": distance(*wide, "l0").long(),
        "l2": distance(*wide, "l2"),
        "linf": distance(*wide, "linf"),
        "distance": far,
        "invalid": crafted["invalid"],
        "forwards": crafted["forwards"],
        "backwards": crafted["backwards"],
        "differs": _asked_again(model, z, answers, job, craft_job, device),
        "parameters": [sum(each.numel() for each in model.parameters())] * len(truth),
        **broken,
        **{name.removeprefix("note."): value for name, value in crafted.items() if name.startswith("note.")},
        **{
            name.removeprefix("watch."): [None if math.isnan(each) else each for each in values.tolist()]
            for name, values in crafted.items()
            if name.startswith("watch.")
        },
    }


def _listed(values: Tensor | None) -> list[list[float]] | None:
    """Return a matrix (N, K) as lists for a column; None with more than 100 classes."""
    return None if values is None or values.shape[1] > 100 else values.float().tolist()


def ask(model: Any, images: Images, readout: str, device: torch.device) -> dict[str, Tensor]:
    """Return the answers of a read-out, as a table keeps them.

    Args:
        model: The fitted defense.
        images: Images (N, C, H, W) on the CPU.
        readout: The name of the read-out.
        device: The device of the defense.

    Returns:
        Columns on the CPU: ``label`` int64 (N,), -1 where there is no answer, ``rejected`` bool (N,),
        ``score`` float32 (N,), and ``logits`` and ``thresholds`` float32 (N, K) where the read-out gives
        them.
    """
    decision = decided(model, images, readout, device)
    # A defense that answers NaN to a valid image counts as broken, and no class has the label -1.
    lost = decision.score.isnan()
    if decision.logits is not None:
        lost = lost | ~answered(decision.logits)
    found = {
        "label": decision.label.long().masked_fill(lost, -1),
        "rejected": decision.rejected.bool(),
        "score": decision.score.float(),
    }
    if decision.logits is not None:
        found["logits"] = decision.logits.float()
    if decision.thresholds is not None:
        found["thresholds"] = decision.thresholds.float()
    return {name: values.detach().cpu() for name, values in found.items()}


def ask_often(
    model: Any, images: Images, index: Tensor, job: Evaluate, device: torch.device
) -> list[dict[str, Tensor]]:
    """Return several answers of a random defense to each image, by independent draws.

    An image is asked alone, each time after the global generators were seeded by the example, the seed of the
    attack and the number of the draw: neither the shard nor its order nor other images decide what is drawn.
    The attack decides nothing either. An image that it leaves as it is, or that is shown again later, gets
    the same draws again, so that two conditions differ by their images and not by luck.

    Args:
        model: The fitted defense.
        images: Images (N, C, H, W) on the CPU.
        index: The places of the examples in the data set, int64 (N,).
        job: The evaluation, which says how often (`draws`) and by which read-out.
        device: The device of the defense.

    Returns:
        For each draw the columns of `ask`.
    """
    attack_run = job.crafts[0].attack_run
    found: list[list[dict[str, Tensor]]] = [[] for _ in range(job.draws)]
    for image, place in zip(images.split(1), index.tolist(), strict=True):
        for draw, answers in enumerate(found):
            reseed(seed_of("draw", attack_run.data.key, attack_run.seed, place, draw))
            answers.append(ask(model, image, job.readout, device))
    return [{name: torch.cat([each[name] for each in answers]) for name in answers[0]} for answers in found]


def decided(model: Any, images: Images, readout: str, device: torch.device) -> Decision:
    """Return the answers of a read-out, in chunks of a fixed size, or of half the size where memory is short.

    Args:
        model: The fitted defense.
        images: Images (N, C, H, W) on any device.
        readout: The name of the read-out.
        device: The device of the defense.

    Returns:
        The decision for N images, its thresholds repeated for each image: (N, K).

    Raises:
        ValueError: The read-out gave a wrong number of labels.
    """
    size, parts, start = CHUNK[device.type], [], 0
    while start < len(images):
        chunk = images[start : start + size].to(device)
        try:
            decision = model.decide(chunk, readout)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or len(chunk) == 1:
                raise
            size = max(len(chunk) // 2, 1)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if decision.label.shape != (len(chunk),):
            raise ValueError(
                f"read-out {readout!r} gave {tuple(decision.label.shape)} labels for {len(chunk)} images"
            )
        parts.append(decision)
        start += len(chunk)
    return Decision(
        label=torch.cat([each.label for each in parts]),
        rejected=torch.cat([each.rejected for each in parts]),
        score=torch.cat([each.score for each in parts]),
        logits=_joined([each.logits for each in parts]),
        # A row of thresholds for each image, so that a row of outcomes needs no other.
        thresholds=_joined(
            [
                None if each.thresholds is None else each.thresholds.expand(len(each.label), -1)
                for each in parts
            ]
        ),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [each for each in parts if each is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def _asked_again(
    model: Any,
    images: Images,
    first: Mapping[str, Tensor],
    job: Evaluate,
    craft_job: Craft,
    device: torch.device,
) -> list[bool | None]:
    """Return for each example whether its answer differed when asked again; None where it was asked once.

    Up to `ASKED_TWICE` examples are asked in another order and in other batches: one image alone, the others
    in two batches. A network that fails then depends on its batches, and counts as one that differs. A tie
    that rounding decides is no difference. A network that runs code of other people is asked with gradients
    in the last batch, as an attack asks.
    """
    as_attacked = bool(job.victim.train.foreign)
    found: list[bool | None] = [None] * len(images)
    draw = torch.Generator().manual_seed(seed_of(craft_job.key, job.readout, "again"))
    rows = torch.randperm(len(images), generator=draw)[:ASKED_TWICE]
    # A lone image is asked beside its own copy, since the first question showed it alone.
    rest = len(rows) - 1
    batches = rows.split([1, rest * 2 // 5, rest - rest * 2 // 5]) if rest else [rows.repeat(2)]
    for batch in batches:
        if len(batch) == 0:
            continue
        before = {name: values[batch] for name, values in first.items()}
        z, now = images[batch], None
        if as_attacked and batch is batches[-1]:
            # A network that cannot answer with gradients (numpy accepts no such tensor) does not count as one
            # that differs. A time limit that is suppressed here raises again within a second.
            with torch.enable_grad(), contextlib.suppress(Exception):
                # Times 1, so that it is no leaf: a network may write into its argument.
                now = ask(model, z.clone().requires_grad_() * 1, job.readout, device)
        try:
            differing = changed(before, now or ask(model, z, job.readout, device)).tolist()
        except OvertimeError:
            raise
        except Exception:  # noqa: BLE001 - any failure differs from the first answer
            differing = [True] * len(batch)
        for row, differs in zip(batch.tolist(), differing, strict=True):
            found[row] = differs
    return found


def changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Tensor:
    """Return which answers differ in label or refusal, or by more than `DRIFT` in their logits.

    Ties that rounding decides are no difference.

    Args:
        before: The columns of `ask` for N images.
        now: Those of another question about the same images.

    Returns:
        bool (N,).
    """
    relabelled, refused = (before[name] != now[name] for name in ("label", "rejected"))
    if "logits" not in before:
        # The score tells how near a refusal was; for a label there is no such measure.
        one, other = before["score"], now["score"]
        return relabelled | (refused & ((one - other).abs() > ROUNDING * one.abs()))
    apart = moved(before["logits"], now["logits"])
    return ((relabelled | refused) & (apart > ROUNDING)) | (apart > DRIFT)


def moved(before: Tensor, now: Tensor) -> Tensor:
    """Return how far logits moved, as a share of the range of those before.

    Args:
        before: Logits (N, K); values that are not finite count as 0.
        now: Logits of the same shape.

    Returns:
        float64 (N,), 0 or more; infinite where logits without a range moved.
    """
    one, other = (each.double().nan_to_num(0.0, 0.0, 0.0) for each in (before, now))
    apart, spread = (one - other).abs().amax(1), one.amax(1) - one.amin(1)
    return torch.where(apart > 0, apart / spread, 0.0)


def table_of(shards: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return the outcomes of several shards as one table.

    Args:
        shards: The columns of each shard, from `answers_to`.

    Returns:
        A pyarrow table with the columns of `bench.results.outcomes`, and the attack's notes after them.
    """
    return pa.concat_tables([_table(each) for each in shards], promote_options="default")


def _table(columns: Mapping[str, Any]) -> pa.Table:
    known = schema()
    arrays, fields = [], []
    for name, values in columns.items():
        plain = values.numpy() if isinstance(values, Tensor) else values
        kind = known.field(name).type if name in known.names else pa.float64() if name in WATCHED else None
        if plain is None:
            plain = [None] * len(columns["truth"])
        arrays.append(pa.array(plain, type=kind))
        fields.append(pa.field(name, arrays[-1].type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))
