"""Stored images, shown again: what an earlier attack left is asked of other weights, without a new search."""

from bench import Images, Labels, Randomness, Threat, View, attack


@attack("replay", norms={"linf", "l2", "l1", "l0"}, version=1, access="none", targeted=False, starts="stored")
def replay(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    """Return the stored images as they are; the referee looks at range and distance as with any attack.

    Args:
        view: Its `starts` alone are looked at.
        x: Not used.
        y: Not used.
        threat: Not used.
        noise: Not used.

    Returns:
        The stored images.

    Raises:
        ValueError: None are given.
    """
    if view.starts is None:
        raise ValueError("replay has no stored images to show")
    return view.starts
