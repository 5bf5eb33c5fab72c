"""Packaging of distpad. TensorFlow is an extra, since which build of it is right depends on the machine."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "distpad" / "__init__.py").read_text(encoding="utf-8")).group(1)

MANIFESTS = [str(path.relative_to(HERE / "k8s")) for path in (HERE / "k8s").rglob("*.yaml")]  # for distpad launch --k8s

EXTRAS = {
    "tensorflow": ["tensorflow>=2.15"],
    "addons": ["tensorflow-addons>=0.23"],  # for TensorFlow 2.15 alone; its life ended in May 2024
    "horovod": ["horovod>=0.28.1"],  # better: launch/install_horovod.sh, which builds it for the TensorFlow at hand
    "plots": ["matplotlib>=3.7"],
    "tensorboard": ["tensorboard>=2.15"],  # for PaddingStats.callback and PaddingStats.write
    "examples": ["matplotlib>=3.7", "pillow>=10", "scikit-learn>=1.3", "scipy>=1.9", "tqdm>=4.65"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
    "dev": ["hypothesis>=6", "mypy>=1.8", "pytest>=7", "pytest-timeout>=2.2", "ruff>=0.4"],
}

setup(
    name="distpad",
    version=VERSION,
    description="Labels of varying length on many devices: padded alike, averaged exactly (TensorFlow, Horovod)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # k8s/ is no Python, but belongs beside the code that reads it; images are built without it
    packages=[*find_packages(include=["distpad", "distpad.*"]), *(["distpad.k8s"] if MANIFESTS else [])],
    package_dir={"distpad.k8s": "k8s"},
    package_data={"distpad.k8s": MANIFESTS},
    python_requires=">=3.9",
    install_requires=[
        "numpy>=1.23",
        "psutil>=5.9",
        "pyyaml>=6",
        "rich>=13",
        "typer>=0.12",
    ],  # all but numpy for the command line
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["distpad=distpad.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
    keywords="tensorflow horovod distributed padding masking loss ctc variable-length",
)
