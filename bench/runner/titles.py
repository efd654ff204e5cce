"""What messages call jobs and networks: by the words of the suite, since several may use one defense."""

from bench.suite.jobs import Craft, Evaluate, Examination, Job, Train, Trial


def defense_title(train: Train) -> str:
    """Return how messages name a network: its defense as the suite calls it, and the code that it runs.

    Args:
        train: Its training.
    """
    defense = train.defense
    code = [str(defense.params[name]) for name in defense.entry.parameters("code") if defense.params[name]]
    return f"defense {defense.called}" + (f" ({', '.join(code)})" if code else "")


def title(job: Job) -> str:
    """Return a job in a few words, with the suite's labels of its defense and of its attack.

    Labels are no part of a key: of two labels for the same work, the first is named.

    Args:
        job: The job.
    """
    match job:
        case Train():
            return f"train {job.defense.called}, seed {job.seed}"
        case Craft():
            attack_run = job.attack_run
            through = f" on {attack_run.source.train.defense.called}" if attack_run.source else ""
            view = f"/{attack_run.view.use}" if attack_run.view else ""
            return f"{attack_run.attack.called}{through}{view} [{job.start}:{job.stop}]"
        case Evaluate():
            of = job.crafts[0].attack_run.attack.called
            return f"ask {job.victim.train.defense.called}/{job.readout} about {of}"
        case Trial():
            return f"try {job.attack.called}, {job.threat.norm}"
        case Examination():
            return f"examine {job.victim.train.defense.called}/{job.readout}"


def whole_title(job: Job) -> str:
    """Return a job in a few words, with its kind and the beginning of its key, by which its files are found.

    Args:
        job: The job.
    """
    return f"{title(job)} ({job.kind} {job.key[:8]})"
