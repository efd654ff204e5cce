"""Ask a defense about crafted images: a row of outcomes for each."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.context import CHUNK, Desk, load
from bench.errors import OvertimeError
from bench.jobs import Craft, Evaluate
from bench.limits import out_of_memory
from bench.noise import seed_of
from bench.outcomes import schema
from bench.protocols import Decision, Images, Split, answered, distance
from bench.referee import undisturbed
from bench.store import Store
from bench.train import fitted

ASKED_TWICE = 32
"""How many examples of a shard are asked a second time, in another order and in other batches."""


ROUNDING = 1e-4
"""How far logits may be from those of the first ask, as a share of what they spread over, for an answer that
changed with them to count as a tie: in another batch, sums are taken in another order."""


DRIFT = 0.01
"""How far they may be for an answer to be the same that it was, on the same scale."""


def evaluate(job: Evaluate, desk: Desk, store: Store) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """Ask a defense about crafted images; a row for each."""
    model = fitted(job.victim, desk, store)
    split = load(job.crafts[0].attempt.data, desk)
    columns: list[dict[str, Any]] = []
    with undisturbed(model, seed=seed_of(job.key)), torch.no_grad():
        for craft_job in job.crafts:
            columns.append(_outcomes(job, craft_job, model, split, desk, store))
    table = pa.concat_tables([_table(each) for each in columns], promote_options="default")
    receipts = [store.receipt(each.kind, each.key) or {} for each in job.crafts]
    facts = {
        "examples": table.num_rows,
        # Crafted images are not published with a table; what they took is.
        "crafting": {
            "seconds": round(sum(each.get("seconds", 0.0) for each in receipts), 3),
            "devices": sorted({each["device"] for each in receipts if "device" in each}),
        },
    }
    return lambda path: pq.write_table(table, path, compression="zstd"), facts


def _outcomes(
    job: Evaluate, craft_job: Craft, model: Any, split: Split, desk: Desk, store: Store
) -> dict[str, Any]:
    crafted = load_file(store.artefact("craft", craft_job.key))
    rows = slice(craft_job.start, craft_job.stop)
    x, truth, index = split.images[rows], split.labels[rows], split.index[rows]
    if not torch.equal(crafted["index"], index):
        raise RuntimeError(f"craft {craft_job.key} is of other examples than {rows}")
    z = x.clone()
    z[crafted["moved"]] = crafted["images"]
    answers = ask(model, z, job.readout, desk)
    wide = x.double(), z.double()
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
        "distance": distance(*wide, craft_job.attempt.threat.norm),
        "void": crafted["void"],
        "forwards": crafted["forwards"],
        "backwards": crafted["backwards"],
        "differs": _asked_again(model, z, answers, job, craft_job, desk),
        "parameters": [sum(each.numel() for each in model.parameters())] * len(truth),
        **{name.removeprefix("note."): value for name, value in crafted.items() if name.startswith("note.")},
    }


def _listed(values: Tensor | None) -> list[list[float]] | None:
    """Return (N, K) as lists for a column, up to 100 classes."""
    return None if values is None or values.shape[1] > 100 else values.float().tolist()


def ask(model: Any, images: Images, readout: str, desk: Desk) -> dict[str, Tensor]:
    """Return a read-out's answers in a fixed layout of chunks, on the CPU, each as a table keeps it."""
    decision = decided(model, images, readout, torch.device(desk.device))
    # A defense that answers NaN to a lawful image has not held; -1 is nobody's label.
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


def decided(model: Any, images: Images, readout: str, device: torch.device) -> Decision:
    """Return a read-out's answers, chunk by chunk; where a chunk does not fit in memory, by smaller ones."""
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
        # One row of thresholds for each image, so that a row of outcomes can be judged alone.
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
    model: Any, images: Images, first: Mapping[str, Tensor], job: Evaluate, craft_job: Craft, desk: Desk
) -> list[bool | None]:
    """Return of each example whether its answer differed at a second ask, None where it was asked once.

    Asked in another order and in other company: one image alone, the others in two batches. Where a network
    cannot answer so at all, its answers depend on company. A tie that rounding decides is no difference. Of
    other people's code the last batch is asked as an attack asks: with gradients.
    """
    as_attacked = bool(job.victim.train.foreign)
    found: list[bool | None] = [None] * len(images)
    draw = torch.Generator().manual_seed(seed_of(craft_job.key, job.readout, "again"))
    rows = torch.randperm(len(images), generator=draw)[:ASKED_TWICE]
    # A lone image is asked beside itself: alone is how it was asked before.
    rest = len(rows) - 1
    batches = rows.split([1, rest * 2 // 5, rest - rest * 2 // 5]) if rest else [rows.repeat(2)]
    for batch in batches:
        if len(batch) == 0:
            continue
        before = {name: values[batch] for name, values in first.items()}
        z, now = images[batch], None
        if as_attacked and batch is batches[-1]:
            # Some cannot answer so (numpy takes no tensor with a gradient): that is no difference. A limit
            # that rings in there rings again.
            with torch.enable_grad(), contextlib.suppress(Exception):
                # No leaf: a network may write into what it is given.
                now = ask(model, z.clone().requires_grad_() * 1, job.readout, desk)
        try:
            changed = _changed(before, now or ask(model, z, job.readout, desk)).tolist()
        except OvertimeError:
            raise
        except Exception:  # noqa: BLE001 - it could answer before
            changed = [True] * len(batch)
        for row, differs in zip(batch.tolist(), changed, strict=True):
            found[row] = differs
    return found


def _changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Tensor:
    """Return bool (N,): which answers are not the same: another label or refusal, or logits far from before.

    Ties that rounding decides are left out.
    """
    relabelled, refused = (before[name] != now[name] for name in ("label", "rejected"))
    if "logits" not in before:
        # A score says how near a refusal was, and nothing of labels.
        one, other = before["score"], now["score"]
        return relabelled | (refused & ((one - other).abs() > ROUNDING * one.abs()))
    one, other = (each["logits"].double().nan_to_num(0.0, 0.0, 0.0) for each in (before, now))
    apart, spread = (one - other).abs().amax(1), one.amax(1) - one.amin(1)
    return ((relabelled | refused) & (apart > ROUNDING * spread)) | (apart > DRIFT * spread)


def _table(columns: Mapping[str, Any]) -> pa.Table:
    known = schema()
    arrays, fields = [], []
    for name, values in columns.items():
        plain = values.numpy() if isinstance(values, Tensor) else values
        kind = known.field(name).type if name in known.names else None
        if plain is None:
            plain = [None] * len(columns["truth"])
        arrays.append(pa.array(plain, type=kind))
        fields.append(pa.field(name, arrays[-1].type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))
