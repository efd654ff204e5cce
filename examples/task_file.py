"""Run a task file from Python, read its table, and look at what a defense was shown."""

from pathlib import Path
from tempfile import mkdtemp

import bench

folder = Path(mkdtemp())
suite = folder / "tasks.yaml"
suite.write_text("""
data:
  digits: {name: digits, split: test, size: 100}
defenses:
  cnn: {use: cnn, training: standard, net: b2, width: 0.25, hidden: [16], epochs: 2, batch: 64}
attacks:
  clean: {use: none}
  pgd: {use: pgd, steps: 5}
tasks:
  - {data: digits, threat: {norm: linf, radius: 0.1}, views: [first]}
tables:
  one:
    title: A small network
    rows: [defense]
    columns: {Clean: {attack: clean}, PGD: {attack: pgd}}
    extra: [Worst]
""")
bench.run(suite, results=folder / "results", executor="inline")
table = bench.table(folder / "results", "one")
print(table.to_markdown())
table.figure().savefig(folder / "table.png")

shown = bench.images(folder / "results", defense="cnn", attack="pgd")
fooled = shown.label != shown.truth
print(f"{100 * fooled.double().mean():.0f} % of {len(fooled)} images fool the network")

model = bench.load(folder / "results", "cnn")
print(f"views: {', '.join(model.views)}; read-outs: {', '.join(model.readouts)}")
