"""The wheel brings the course: lessons/ and data_samples/ as folders in trackkit/_data.

All else stands in pyproject.toml. An editable install keeps using the folders of the checkout.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# of the lessons what is a lesson, and not what somebody has made in there
COURSE = {"data_samples": "**/*", "lessons": "[0-9][0-9]_*.ipynb"}


class BuildWithCourse(build_py):
    """`build_py`, and then the course."""

    def run(self) -> None:
        """Build the package; outside of editable installs with trackkit/_data, made anew."""
        super().run()
        if self.editable_mode:
            return
        data = Path(self.build_lib, "trackkit", "_data")
        shutil.rmtree(data, ignore_errors=True)
        for folder, pattern in COURSE.items():
            for path in Path(folder).glob(pattern):
                if path.is_file() and not any(part.startswith(".") for part in path.parts):
                    target = data / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithCourse})
