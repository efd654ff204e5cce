"""Put the pages of docs/ into the package, for `bench explain`; everything else stands in pyproject.toml."""

from pathlib import Path
from shutil import copy2

from setuptools import setup
from setuptools.command.build_py import build_py


class WithPages(build_py):
    """Builds the packages, and copies the pages of the documentation beside them."""

    def run(self) -> None:
        """Build; an editable installation reads the pages where they are."""
        super().run()
        if not self.editable_mode:
            place = Path(self.build_lib) / "bench" / "docs"
            place.mkdir(parents=True, exist_ok=True)
            for page in sorted(Path("docs").glob("*.md")):
                copy2(page, place)


setup(cmdclass={"build_py": WithPages})
