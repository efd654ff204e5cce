"""No attack: the image as it is. Clean accuracy is a table's column like any other."""

from bench import Images, Labels, Randomness, Threat, View, attack


@attack("none", norms={"linf", "l2", "l1", "l0"}, version=1, access="none", kind="minimum-norm", idle=True)
def none(view: View, x: Images, y: Labels, threat: Threat, noise: Randomness) -> Images:
    """Leave the image as it is: the column that papers call clean.

    Args:
        view: Not asked.
        x: Images (N, C, H, W).
        y: Not used.
        threat: Not used.
        noise: Not used.

    Returns:
        `x` itself.
    """
    return x
