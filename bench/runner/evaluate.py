"""The evaluation job: asks a defense about crafted images, and keeps a row of outcomes for each."""

import contextlib
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.errors import DamagedError, OvertimeError
from bench.noise import seed_of
from bench.protocols import Images, Split, distance
from bench.referee.answers import ask, changed
from bench.referee.freezing import frozen, reseed
from bench.registry import AttackEntry, labels_of
from bench.results.metrics import is_correct
from bench.results.outcomes import BROKEN_SHARE, JUDGED, OWN_SOURCE, RAISED, TIED, WATCHED, schema
from bench.results.store import Store
from bench.runner.context import WorkerContext, load
from bench.runner.train import fitted
from bench.suite.jobs import Craft, Evaluate
from bench.suite.resolve import Resolved, inner

ASKED_TWICE = 32
"""Number of examples of a shard that are asked a second time, in another order and in other batches."""


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
    if (own := crafted_on_own_weights(job, store)) is not None:
        columns = [{**each, OWN_SOURCE: [own] * len(each["truth"])} for each in columns]
    table = table_of(columns)
    receipts = [store.receipt(each.kind, each.key) or {} for each in job.crafts]
    facts = {
        "examples": table.num_rows,
        # Of a defense that is asked once there is nothing to tell.
        **({} if job.draws == 1 else {"queries_per_example": {"forwards": float(job.draws)}}),
        **killed(table, job.crafts[0].attack_run.attack),
        **_invalid(receipts),
        # Crafted images are not published with a table, but their cost is.
        "crafting": {
            "seconds": round(sum(each.get("seconds", 0.0) for each in receipts), 3),
            "devices": sorted({each["device"] for each in receipts if "device" in each}),
        },
    }
    return lambda path: pq.write_table(table, path, compression="zstd"), facts


def _invalid(receipts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return why moves were invalid, as tables read it: by reason how many, and by how much at most."""
    counts: dict[str, int] = defaultdict(int)
    most: dict[str, float] = {}
    for each in receipts:
        for reason, count in (each.get("invalid_because") or {}).items():
            counts[reason] += count
        for reason, length in (each.get("invalid_by") or {}).items():
            most[reason] = max(length, most.get(reason, 0.0))
    told = {reason: [count, most.get(reason)] for reason, count in counts.items()}
    return {"found": {"invalid": told}} if told else {}


def crafted_on_own_weights(job: Evaluate, store: Store) -> bool | None:
    """Return whether the images of a transfer were crafted on the weights that are asked now.

    The same network may stand in a suite twice, by another label and with settings that do not matter.

    Args:
        job: The evaluation.
        store: The results folder, with the trainings of both.

    Returns:
        Whether both have the same tensors, whatever these are called; None where the attack is no transfer,
        or where the weights of its source are not there any more.
    """
    source, victim = job.crafts[0].attack_run.source, job.victim.train
    if source is None or source.train == victim:
        return None
    try:
        one, other = (_tensors(store.artefact("train", each.key)) for each in (source.train, victim))
    except DamagedError:
        return None
    return bool(one) and one == other


def _tensors(path: Path) -> list[tuple[tuple[int, ...], str, str]]:
    """Return the form, type and digest of each tensor in a file, in an order that no name decides."""
    return sorted(
        (
            tuple(value.shape),
            str(value.dtype),
            hashlib.sha256(value.flatten().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for value in load_file(path).values()
    )


def killed(table: pa.Table, attack: Resolved[AttackEntry]) -> dict[str, Any]:
    """Return how many examples an attack broke, for the order of attacks in worst mode.

    Args:
        table: The outcomes.
        attack: The attack.

    Returns:
        ``kills``: how many images were moved and are answered wrongly; of an attack made of attacks also
        ``members``: the kills of each, its passes, forward and backward, over all examples, and on how many
        it ``raised``, where it did.
    """
    broken = ~is_correct(table) & (np.asarray(table["distance"]) > 0)
    facts: dict[str, Any] = {"kills": int(broken.sum())}
    if inner(attack):
        found_by = np.asarray(table["found_by"])
        raised = {
            name.removeprefix(RAISED): int(pc.sum(table[name]).as_py() or 0)
            for name in table.column_names
            if name.startswith(RAISED)
        }
        facts["members"] = {
            label: {
                "kills": int((broken & (found_by == place)).sum()),
                "passes": sum(
                    float(np.asarray(table[f"{way}.{label}"]).sum()) for way in ("forwards", "backwards")
                ),
                **({"raised": raised[label]} if raised.get(label) else {}),
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
        TIED: answers.get("tied"),
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


def table_of(shards: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return the outcomes of several shards as one table.

    Args:
        shards: The columns of each shard, from `answers_to`.

    Returns:
        A pyarrow table with the columns of `bench.results.outcomes`, and the attack's notes after them.
    """
    return pa.concat_tables([_table(each) for each in shards], promote_options="default")


def _table(columns: Mapping[str, Any]) -> pa.Table:
    known = {each.name: each.type for each in schema()}
    known |= {**dict.fromkeys(WATCHED, pa.float64()), **dict.fromkeys(JUDGED, pa.bool_())}
    arrays, fields = [], []
    for name, values in columns.items():
        plain = values.numpy() if isinstance(values, Tensor) else values
        if plain is None:
            plain = [None] * len(columns["truth"])
        arrays.append(pa.array(plain, type=known.get(name)))
        fields.append(pa.field(name, arrays[-1].type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))
