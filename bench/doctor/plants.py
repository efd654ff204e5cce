"""Planted adversarial examples: a wrong image is known to be in the ball of each image, at one place."""

import torch
from torch import Tensor, nn

from bench.protocols import Images, Norm, Threat, View

CELLS = 8
"""Images are seen as so many rows and columns of cells at most, which are the pixels of a small image."""

RADII: dict[Norm, float] = {"linf": 0.1, "l2": 0.5, "l1": 2.0, "l0": 6.0}
"""The radii of the balls in an image of cells, where no other is asked for."""

WIDEST: dict[Norm, float] = {"linf": 3.5, "l2": 1.3, "l1": 1.0, "l0": 1.0}
"""How many times as large a ball around an image near grey may be, so that it lies in the box."""

LEAD = 0.15
"""The score at the planted point; 0 is the boundary, and -1 is the image's."""


class Planted:
    """Images, each with a binary classifier of its own that is known to be wrong at one place of its ball.

    The binarisation test (Zimmermann et al. 2022, arXiv:2206.13991): on the features of a fixed random
    network, each head is solved so that its score is -1 at the image and at random points on the ball's
    surface, and `LEAD` at one more of them. An attack that reports nothing there has failed, not the
    network. A step along the first gradient is too coarse to get there, and so is half the radius.

    The network sees the means of the cells of an image, at most `CELLS` in a row (in l0, one pixel of each),
    and magnifies them in a small ball, so that the problem is as hard in any form and at any radius.

    Args:
        norm: The norm of the balls.
        cases: The number of images, at least 1.
        form: Channels, height and width of an image.
        radius: The radius of the balls, above 0, in l0 at least 2; None for that of `RADII`, by cells. The
            plants of a ball that does not fit into the box lie in a smaller one (`WIDEST`).
        classes: The number of labels, at least 2.
        scale: What logits are multiplied by, above 0.
        seed: The seed of images, network and points.

    Raises:
        ValueError: The radius is below 2 pixels in l0.
    """

    def __init__(
        self,
        norm: Norm,
        cases: int = 40,
        *,
        form: tuple[int, int, int] = (1, CELLS, CELLS),
        radius: float | None = None,
        classes: int = 2,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.classes, self.form, self._sparse, self._scale = classes, form, norm == "l0", scale
        self._places = tuple(torch.arange(size) * min(size, CELLS) // size for size in form[1:])
        # The values of the smallest cell: what a move of all of them costs in each norm.
        size = form[0] * int(torch.stack([each.bincount().amin() for each in self._places]).prod())
        unit = RADII[norm] * {"linf": 1.0, "l2": size**0.5, "l1": size, "l0": 1.0}[norm]
        self.threat = Threat(norm, unit if radius is None else radius)
        self.planted = min(self.threat.radius, unit * WIDEST[norm])
        """How far from its image each plant is; in l0 whole pixels."""
        if norm == "l0":
            self.planted = float(int(self.planted))
            if self.planted < 2:
                raise ValueError("nothing can be planted where fewer than 2 pixels may change")
        self._magnified = 1.0 if norm == "l0" else unit / self.planted
        # Where pixels go all the way, the network changes as much on its way as in the other balls.
        self.net = _rough(draw, 0.5 if norm == "l0" else 4.0)
        near = 0.15 / max(1.0, self._magnified)
        grey = torch.empty(cases, 1, *self._cells).uniform_(0.5 - near, 0.5 + near, generator=draw)
        self.x = self._lifted(grey).contiguous()
        self.y = torch.arange(cases) % 2
        self.points = torch.stack([self.surface(draw) for _ in range(32)], 1)
        """Random points on the surface of each ball, (N, 32, C, H, W); the first is the planted one."""
        start = self.features(self.x)
        ways = self.features(self.points.flatten(0, 1)).view(cases, 32, -1) - start[:, None]
        rise = torch.zeros(cases, 32, 1, dtype=torch.float64)
        rise[:, 0] = 1 + LEAD
        # The shortest of all heads that rise so: the others' rows are orthogonal to it.
        gram = ways @ ways.mT
        # Where few pixels change, some points are the same.
        solved = (
            torch.linalg.pinv(gram, hermitian=True) @ rise if self._sparse else torch.linalg.solve(gram, rise)
        )
        head = ways.mT @ solved
        self.start, self.head = start, head.squeeze(2)

    @property
    def _cells(self) -> tuple[int, int]:
        rows, columns = (int(each[-1]) + 1 for each in self._places)
        return rows, columns

    def _lifted(self, cells: Tensor) -> Tensor:
        """Return images (N, C, H, W) whose cells have the values (N, 1, h, w)."""
        rows, columns = self._places
        image: Tensor = cells[:, :, rows][..., columns]
        return image.expand(-1, self.form[0], -1, -1)

    def _seen(self, z: Images) -> Tensor:
        """Return the values of the cells, float64 (n, 1, h, w), of images (n, C, H, W)."""
        wide = z.double().mean(1, keepdim=True)
        for axis, places in zip((2, 3), self._places, strict=True):
            if self._sparse:
                wide = wide.index_select(axis, _firsts(places))
            else:
                count = torch.bincount(places)
                form = [1] * 4
                form[axis] = -1
                sums = wide.new_zeros(*wide.shape[:axis], len(count), *wide.shape[axis + 1 :])
                wide = sums.index_add(axis, places, wide) / count.view(form)
        return wide

    def features(self, z: Images) -> Tensor:
        """Return the features of images: the answers of the random network to their cells.

        Args:
            z: Images (n, C, H, W).

        Returns:
            Features, float64 (n, D).
        """
        found: Tensor = self.net((self._seen(z) - 0.5) * self._magnified + 0.5)
        return found

    def surface(self, draw: torch.Generator) -> Images:
        """Return a random point on the surface of each image's ball; in l1 and l0, a few cells differ.

        Args:
            draw: Where the draws come from.

        Returns:
            Images (N, C, H, W).
        """
        x, radius, form = self.x, self.planted, (len(self.x), 1, *self._cells)
        signs = torch.randint(2, form, generator=draw) * 2.0 - 1
        if self.threat.norm == "linf":
            corner: Tensor = x + radius * self._lifted(signs)
            return corner
        if self.threat.norm == "l2":
            move = self._lifted(torch.randn(form, generator=draw))
            unit: Tensor = move / torch.linalg.vector_norm(move, dim=(1, 2, 3), keepdim=True)
            return x.add(unit, alpha=radius)
        many = int(radius) if self._sparse else 6
        few = torch.rand(form, generator=draw).flatten(1).argsort(1).argsort(1).view(form) < many
        if self._sparse:
            rows, columns = (torch.zeros(len(each), dtype=torch.bool) for each in self._places)
            rows[_firsts(self._places[0])], columns[_firsts(self._places[1])] = True, True
            return torch.where(self._lifted(few) & rows[:, None] & columns, self._lifted((signs + 1) / 2), x)
        move = self._lifted(few * signs)
        return x.add(move * (radius / move.abs().sum((1, 2, 3), keepdim=True)))

    def score(self, z: Images, rows: Tensor) -> Tensor:
        """Return how much the heads of some examples are for the other label.

        Args:
            z: Points (n, C, H, W), one for each example.
            rows: Positions of the examples, int64 (n,).

        Returns:
            Scores, float64 (n,): above 0 for the other label.
        """
        way = self.features(z) - self.start[rows]
        rise: Tensor = (way * self.head[rows]).sum(1)
        return rise - 1

    def logits(self, z: Images, rows: Tensor) -> Tensor:
        """Return logits of points: the score, minus the score, and what lies far below both.

        Args:
            z: Points (n, C, H, W), one for each example.
            rows: Positions of the examples, int64 (n,).

        Returns:
            Logits (n, K) in the dtype of the points.
        """
        # Label 1 leads where the score's sign says so: of every second example it is the true one.
        lead = self.score(z, rows) * (1 - 2.0 * self.y[rows])
        others = [torch.full_like(lead, -20.0 - each) for each in range(self.classes - 2)]
        return (torch.stack([-lead, lead, *others], 1) * self._scale).to(z.dtype)

    def found(self, z: Images, rows: Tensor, rounding: float) -> Tensor:
        """Return where images are wrong, in their balls and in the box.

        Args:
            z: Images (n, C, H, W), one for each example.
            rows: Positions of the examples, int64 (n,).
            rounding: How far, per value, an image may lie beyond the box or the ball.

        Returns:
            bool (n,).
        """
        near = (
            self.threat.distance(self.x[rows].double(), z.double())
            <= self.threat.radius + rounding * self.x[0].numel() ** 0.5
        )
        inside = ((z >= -rounding) & (z <= 1 + rounding)).flatten(1).all(1)
        with torch.no_grad():
            wrong = self.logits(z, rows).argmax(1) != self.y[rows]
        found: Tensor = wrong & near & inside
        return found

    def view(self) -> View:
        """Return the view of logits (N, K), each example's by its own head."""
        return View(Heads(self, torch.arange(len(self.x))))


def _firsts(places: Tensor) -> Tensor:
    """Return the first row, or column, of each cell."""
    return torch.cat([torch.ones(1, dtype=torch.bool), places[1:] != places[:-1]]).nonzero().flatten()


def _rough(draw: torch.Generator, spread: float) -> nn.Sequential:
    """Return a random network whose gradients change on their way, the more the larger its first weights."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.Flatten()
    ).double()
    for layer, size in ((net[0], spread), (net[2], 0.5)):
        assert isinstance(layer, nn.Conv2d)
        nn.init.normal_(layer.weight, std=size, generator=draw)
        assert layer.bias is not None
        nn.init.uniform_(layer.bias, -1, 1, generator=draw)
    return net.requires_grad_(False)


class Unnarrowed(AssertionError):
    """Points of some of the examples were asked about through the view of all of them."""


class Heads:
    """The heads of some of the examples, as a view's callable.

    Args:
        planted: The examples.
        rows: Positions of the examples, int64 (n,).
    """

    def __init__(self, planted: Planted, rows: Tensor) -> None:
        self._planted, self._rows = planted, rows

    def select(self, rows: Tensor) -> "Heads":
        """Return the heads of some of these.

        Args:
            rows: Positions among these, int64 (m,).
        """
        return Heads(self._planted, self._rows[rows])

    def __call__(self, z: Tensor) -> Tensor:
        """Return logits of points (copies * n, C, H, W), copy after copy."""
        copies, rest = divmod(len(z), max(len(self._rows), 1))
        if rest:
            raise Unnarrowed(
                f"{len(z)} points were asked about for {len(self._rows)} examples: narrow the view with "
                "view.select, or check the attack with alone=True"
            )
        return self._planted.logits(z, self._rows.repeat(copies))
